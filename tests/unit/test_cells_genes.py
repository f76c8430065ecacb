"""Which gene a column is: versions, blanks, duplicates, symbols, overlap."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer.genes import (
    GeneIds,
    clean_id,
    find_gene_ids,
    load_symbols,
    map_genes,
    names_as_symbols,
)
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.small_cells import gene_id, vocabulary_of


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("ENSG00000141510", "ENSG00000141510"),
        ("ENSG00000141510.17", "ENSG00000141510"),
        (" ENSG00000141510.17 ", "ENSG00000141510"),
        ("ENSMUSG00000059552.5", "ENSMUSG00000059552"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378"),
        ("AC000061.1", "AC000061.1"),
        ("RP11-34P13.7", "RP11-34P13.7"),
        ("", ""),
        ("  ", ""),
        ("NA", ""),
        ("nan", ""),
        (float("nan"), ""),
        (None, ""),
        ("<NA>", ""),
    ],
)
def test_clean_id(raw: object, cleaned: str) -> None:
    assert clean_id(raw) == cleaned


def test_map_counts_each_kind_of_column() -> None:
    ids = (gene_id(1), gene_id(0), "", gene_id(1), "ENSG99999999999", "", gene_id(1))
    found = map_genes(GeneIds(ids, "index"), vocabulary_of(3), "file")
    assert found.token_of_column.tolist() == [6, 5, 0, 6, 0, 0, 6]
    assert (found.num_known, found.num_unknown) == (2, 1)
    assert (found.num_blank, found.num_repeated) == (2, 2)
    assert found.overlap == 2 / 3


def test_places_are_tried_in_order_until_one_knows_a_gene() -> None:
    known = vocabulary_of(3).token_ids
    columns = {"index": ["TP53", "MYC"], "gene_ids": [gene_id(0), "x"], "ensembl_id": ["", "y"]}
    assert find_gene_ids(columns, known).location == "gene_ids"
    columns["ensembl_id"] = [gene_id(1), ""]
    assert find_gene_ids(columns, known).location == "ensembl_id"
    columns["feature_id"] = [gene_id(2) + ".3", ""]
    found = find_gene_ids(columns, known)
    assert (found.location, found.ids) == ("feature_id", (gene_id(2), ""))
    assert find_gene_ids({"index": ["TP53", "MYC"]}, known).location == "index"


def test_symbols_are_mapped_where_the_id_is_not_known() -> None:
    symbols = {"TP53": gene_id(1), gene_id(0): gene_id(2)}
    columns = {"index": ["TP53", gene_id(0), "NOVEL"]}
    found = find_gene_ids(columns, vocabulary_of(3).token_ids, symbols)
    assert found.ids == (gene_id(1), gene_id(0), "NOVEL")
    assert found.num_mapped_symbols == 1
    without_vocabulary = find_gene_ids(columns, None, symbols)
    assert without_vocabulary.ids == (gene_id(1), gene_id(0), "")


def test_a_column_of_another_name_may_hold_the_ids() -> None:
    columns = {"index": ["TP53", "MYC"], "kind": ["x", "y"], "ENSEMBL": [gene_id(1), gene_id(7)]}
    assert find_gene_ids(columns, vocabulary_of(3).token_ids).location == "ENSEMBL"
    assert find_gene_ids(columns).ids == (gene_id(1), gene_id(7))


def test_tables_are_asked_only_where_there_are_no_ids() -> None:
    def forbidden() -> dict[str, str]:
        raise AssertionError("asked for")

    tables = {"table": forbidden}
    known = vocabulary_of(3).token_ids
    few = [gene_id(1), *(gene_id(number) for number in range(100, 120))]
    assert find_gene_ids({"index": few}, known, tables=tables).ids == tuple(few)
    assert find_gene_ids({"index": few}, None, tables=tables).ids == tuple(few)
    others = [gene_id(number) for number in range(100, 104)]
    assert find_gene_ids({"index": others}, known, tables=tables).ids == tuple(others)
    mixed = [gene_id(1), gene_id(2), "x", "y", "z"]
    columns = {"feature_id": [gene_id(1), *others], "index": mixed}
    assert find_gene_ids(columns, known, tables=tables).location == "feature_id"
    columns = {"index": ["TP53", "MYC", "ACTB"], "ensembl_id": [gene_id(1), "", gene_id(50)]}
    assert find_gene_ids(columns, known, tables=tables).location == "ensembl_id"


def test_tables_are_asked_in_turn_until_nearly_all_is_known() -> None:
    known = vocabulary_of(4).token_ids
    first = {"TP53": gene_id(1)}
    second = {"TP53": gene_id(0), "MYC": gene_id(2)}
    asked = []

    def table(name: str, content: dict[str, str] | None) -> dict[str, str] | None:
        asked.append(name)
        return content

    tables = {"a": lambda: table("a", first), "b": lambda: table("b", second)}
    found = find_gene_ids({"index": ["TP53"]}, known, tables=tables)
    assert (found.ids, found.symbols_from, asked) == ((gene_id(1),), "a", ["a"])
    found = find_gene_ids({"index": ["TP53", "MYC", "n1"]}, known, tables=tables)
    assert found.ids == (gene_id(1), gene_id(2), "n1"), "the first table's word stands"
    assert (found.symbols_from, found.num_mapped_symbols) == ("a and b", 2)
    none = {"a": lambda: table("a", None)}
    assert find_gene_ids({"index": ["TP53"]}, known, tables=none).ids == ("TP53",)


def test_ids_among_symbols_stay() -> None:
    tables = {"t": lambda: {"TP53": gene_id(1), "MYC": gene_id(2)}}
    index = ["TP53", "MYC", gene_id(0), "novel", "other"]
    found = find_gene_ids({"index": index}, vocabulary_of(4).token_ids, tables=tables)
    assert found.ids == (gene_id(1), gene_id(2), gene_id(0), "novel", "other")


def test_without_a_vocabulary_a_table_that_fits_drops_the_rest_and_one_that_does_not_nothing() -> (
    None
):
    table = {"TP53": gene_id(1), "MYC": gene_id(2)}
    fits = find_gene_ids({"index": ["TP53", "MYC", "novel"]}, tables={"t": lambda: table})
    assert fits.ids == (gene_id(1), gene_id(2), "")
    mouse = find_gene_ids({"index": ["Trp53", "Myc", "MYC"]}, tables={"t": lambda: table})
    assert mouse.ids == ("Trp53", "Myc", "MYC")


def test_symbols_in_a_column_beside_a_meaningless_index() -> None:
    tables = {"t": lambda: {"TP53": gene_id(1), "MYC": gene_id(2)}}
    columns = {"index": ["0", "1"], "gene_symbols": ["TP53", "MYC"]}
    found = find_gene_ids(columns, vocabulary_of(4).token_ids, tables=tables)
    assert (found.location, found.ids) == ("gene_symbols", (gene_id(1), gene_id(2)))


def test_names_of_the_vocabulary_that_are_one_genes_alone() -> None:
    names = ("TP53", "MYC", "MYC", gene_id(3))
    vocabulary = Vocabulary(tuple(gene_id(i) for i in range(4)), names, (1.0,) * 4)
    assert names_as_symbols(vocabulary) == {"TP53": gene_id(0)}


def test_refusal_says_how_many_symbols_were_mapped() -> None:
    ids = GeneIds((gene_id(0), *(f"novel{i}" for i in range(19))), "index", 1, "GENCODE")
    message = r"1 of 20 genes \(5\.0%\) are in the vocabulary, 1 of them mapped.*by GENCODE"
    with pytest.raises(DataError, match=message):
        map_genes(ids, vocabulary_of(3), "a.h5ad")


def test_no_overlap_is_refused_with_examples_of_both_sides() -> None:
    with pytest.raises(DataError) as error:
        map_genes(GeneIds(("TP53", "MYC"), "index"), vocabulary_of(3), "a.h5ad", True)
    message = str(error.value)
    assert "a.h5ad: 0 of 2 genes (0.0%)" in message
    assert "MYC, TP53" in message
    assert gene_id(0) in message
    assert "`symbols=FILE`" in message


def test_low_overlap_is_refused_unless_allowed() -> None:
    ids = GeneIds((gene_id(0), *(f"novel{i}" for i in range(10))), "index")
    with pytest.raises(DataError, match=r"1 of 11 genes \(9\.1%\).*`allow_low_overlap=True`"):
        map_genes(ids, vocabulary_of(3), "a.h5ad")
    assert map_genes(ids, vocabulary_of(3), "a.h5ad", allow_low_overlap=True).num_known == 1
    enough = GeneIds(ids.ids[:10], "index")
    assert map_genes(enough, vocabulary_of(3), "a.h5ad").overlap == 0.1


def test_no_overlap_may_be_allowed_but_ids_there_must_be() -> None:
    none = GeneIds(("TP53", ""), "index")
    found = map_genes(none, vocabulary_of(3), "a.h5ad", True, allow_no_overlap=True)
    assert (found.num_known, found.num_unknown, found.num_blank) == (0, 1, 1)
    with pytest.raises(DataError, match=r"0 of 0 genes.*all blank"):
        map_genes(GeneIds(("", ""), "index"), vocabulary_of(3), "a.h5ad", True, True)


def test_symbol_tables(tmp_path: Path) -> None:
    table = "ENSG00000290825.1,DDX11L16,2,1396,lncRNA\nENSG00000223972,WASH7P,6,632,x\n"
    table += "ENSG00000310526,WASH7P,1,1226,lncRNA\nENSG00000000001,,1,1,x\n"
    (tmp_path / "genes.csv.gz").write_bytes(gzip.compress(table.encode()))
    (tmp_path / "genes.csv").write_text(table)
    expected = {"DDX11L16": "ENSG00000290825", "WASH7P": "ENSG00000223972"}
    assert load_symbols(tmp_path / "genes.csv.gz") == expected
    assert load_symbols(tmp_path / "genes.csv") == expected
    (tmp_path / "genes.json").write_text(json.dumps({**expected, "NONE": ""}))
    assert load_symbols(tmp_path / "genes.json") == expected


@pytest.mark.parametrize(
    "raw", [b"", b"a,b\n", b"{broken", b'{"a": 1}', b"\x1f\x8b broken", b"\xff\xfe"]
)
def test_wrong_symbol_table_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "genes").write_bytes(raw)
    with pytest.raises(DataError, match="genes"):
        load_symbols(tmp_path / "genes")
    with pytest.raises(DataError, match="cannot be read"):
        load_symbols(tmp_path / "missing")
