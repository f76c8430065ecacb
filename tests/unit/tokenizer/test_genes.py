"""Which gene a column is: versions, blanks, duplicates, symbols, overlap."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from unittest.mock import Mock

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.memory import MemoryCounts
from geneformer_mcore.tokenizer.gencode import clean_id, load_symbols
from geneformer_mcore.tokenizer.genes import (
    GeneIds,
    InputOptions,
    find_gene_ids,
    map_genes,
    names_as_symbols,
)
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.support.small_cells import adata_of, gene_id, gene_ids, vocabulary_of

THREE, FOUR = vocabulary_of(3), vocabulary_of(4)
TABLE = {"TP53": gene_id(1), "MYC": gene_id(2)}
TABLES = {"t": lambda: TABLE}
NOVEL = [f"novel{i}" for i in range(19)]


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
        *((blank, "") for blank in ("", "  ", "NA", "nan", float("nan"), None, "<NA>")),
    ],
)
def test_clean_id(raw, cleaned) -> None:
    assert clean_id(raw) == cleaned


def test_map_counts_each_kind_of_column() -> None:
    ids = (gene_id(1), gene_id(0), "", gene_id(1), "ENSG99999999999", "", gene_id(1))
    found = map_genes(GeneIds(ids, "index"), THREE, counts_of(ids))
    assert found.token_of_column.tolist() == [6, 5, 0, 6, 0, 0, 6]
    assert (found.num_known, found.num_unknown) == (2, 1)
    assert (found.num_blank, found.num_repeated) == (2, 2)
    assert found.share_of_vocabulary == 2 / 3


def test_places_are_tried_in_order_until_one_knows_a_gene() -> None:
    known = THREE.token_ids
    columns = {"index": ["TP53", "MYC"], "gene_ids": [gene_id(0), "x"], "ensembl_id": ["", "y"]}
    assert find_gene_ids(columns, known).location == "gene_ids"
    columns["ensembl_id"] = [gene_id(1), ""]
    assert find_gene_ids(columns, known).location == "ensembl_id"
    columns["feature_id"] = [gene_id(2) + ".3", ""]
    found = find_gene_ids(columns, known)
    assert (found.location, found.ids) == ("feature_id", (gene_id(2), ""))
    assert find_gene_ids({"index": ["TP53", "MYC"]}, known).location == "index"
    # A column of another name may hold the ids.
    columns = {"index": ["TP53", "MYC"], "kind": ["x", "y"], "ENSEMBL": [gene_id(1), gene_id(7)]}
    assert find_gene_ids(columns, known).location == "ENSEMBL"
    assert find_gene_ids(columns).ids == (gene_id(1), gene_id(7))


def test_symbols_are_mapped_where_the_id_is_not_known() -> None:
    symbols = {"TP53": gene_id(1), gene_id(0): gene_id(2)}
    columns = {"index": ["TP53", gene_id(0), "NOVEL"]}
    found = find_gene_ids(columns, THREE.token_ids, symbols)
    assert (found.ids, found.num_mapped_symbols) == ((gene_id(1), gene_id(0), "NOVEL"), 1)
    assert find_gene_ids(columns, None, symbols).ids == (gene_id(1), gene_id(0), "")


def test_tables_are_asked_only_where_there_are_no_ids() -> None:
    tables = {"table": lambda: pytest.fail("asked for")}
    few, others = gene_ids([1, *range(100, 120)]), gene_ids(range(100, 104))
    for ids, known in ((few, THREE.token_ids), (few, None), (others, THREE.token_ids)):
        assert find_gene_ids({"index": ids}, known, tables=tables).ids == tuple(ids)
    mixed = [gene_id(1), gene_id(2), "x", "y", "z"]
    for columns, location in (
        ({"feature_id": [gene_id(1), *others], "index": mixed}, "feature_id"),
        ({"index": list("abc"), "ensembl_id": [gene_id(1), "", gene_id(50)]}, "ensembl_id"),
    ):
        assert find_gene_ids(columns, THREE.token_ids, tables=tables).location == location


def test_tables_are_asked_in_turn_until_nearly_all_is_known() -> None:
    first = Mock(return_value={"TP53": gene_id(1)})
    second = Mock(return_value={"TP53": gene_id(0), "MYC": gene_id(2)})
    tables = {"a": first, "b": second}
    found = find_gene_ids({"index": ["TP53"]}, FOUR.token_ids, tables=tables)
    assert (found.ids, found.symbols_from) == ((gene_id(1),), "a")
    assert (first.call_count, second.call_count) == (1, 0)
    found = find_gene_ids({"index": ["TP53", "MYC", "n1"]}, FOUR.token_ids, tables=tables)
    assert found.ids == (gene_id(1), gene_id(2), "n1"), "the first table's word stands"
    assert (found.symbols_from, found.num_mapped_symbols) == ("a and b", 2)
    none = {"a": lambda: None}
    assert find_gene_ids({"index": ["TP53"]}, FOUR.token_ids, tables=none).ids == ("TP53",)


def test_symbols_by_a_table() -> None:
    index, both = ["TP53", "MYC", gene_id(0), "novel", "other"], (gene_id(1), gene_id(2))
    some, known = (*both, *index[2:]), FOUR.token_ids
    for tokens, columns, location, expected in (
        # Ids among symbols stay.
        (known, {"index": index}, "index", some),
        (known, {"index": list("01234"), "gene_symbols": index}, "gene_symbols", some),
        # Without a vocabulary: a table that fits, and one that does not.
        (None, {"index": ["TP53", "MYC", "novel"]}, "index", (*both, "")),
        (None, {"index": ["Trp53", "Myc", "MYC"]}, "index", ("Trp53", "Myc", "MYC")),
    ):
        found = find_gene_ids(columns, tokens, tables=TABLES)
        assert (found.location, found.ids) == (location, expected)


def test_names_of_the_vocabulary_that_are_one_genes_alone() -> None:
    names = ("TP53", "MYC", "MYC", gene_id(3))
    vocabulary = Vocabulary(tuple(gene_ids(4)), names, (1.0,) * 4)
    assert names_as_symbols(vocabulary) == {"TP53": gene_id(0)}


FIFTY = vocabulary_of(50)


def counts_of(ids: Sequence[str], of_first: int = 1) -> MemoryCounts:
    """Cells with 1 of every gene, and `of_first` of the first."""
    counts = np.ones((300, len(ids)), np.float32)
    counts[:, 0] = of_first
    return MemoryCounts(adata_of(counts, [f"row {place}" for place in range(len(ids))]))


@pytest.mark.parametrize(
    ("ids", "mapped", "allowed", "message"),
    [
        (
            (gene_id(0), *NOVEL),
            (1, "GENCODE"),
            {},
            r"1 of 20 genes are in the vocabulary, 1 of them mapped.*by GENCODE: 2\.0% of its "
            r"genes and 5\.0% of the counts, and one must be at least 10%",
        ),
        (
            ("TP53", "MYC"),
            (),
            {"allow_low_overlap": True},
            rf"the AnnData: 0 of 2 genes .*MYC, TP53.*{gene_id(0)}.*`symbols=FILE`",
        ),
        ((gene_id(0), *NOVEL[:10]), (), {}, r"1 of 11 genes .*9\.1%.*`allow_low_overlap=True`"),
        (("", ""), (), dict.fromkeys(("allow_low_overlap", "allow_no_overlap"), True),
         r"0 of 0 genes.*all blank"),
    ],
    ids=["with symbols", "none", "few", "blank"],
)  # fmt: skip
def test_low_overlap_is_refused(ids, mapped, allowed, message: str) -> None:
    with pytest.raises(DataError, match=message):
        map_genes(GeneIds(ids, "index", *mapped), FIFTY, counts_of(ids), InputOptions(**allowed))


@pytest.mark.parametrize(
    ("vocabulary", "num_others", "of_first"),
    [(FIFTY, 9, 1), (FIFTY, 99, 11), (vocabulary_of(10), 9000, 1)],
    ids=["a panel", "few genes with many counts", "a small vocabulary"],
)
def test_overlap_is_of_the_counts_or_of_the_vocabulary(vocabulary, num_others, of_first) -> None:
    """Not of the file's genes: a whole genome has many that no vocabulary needs."""
    ids = (gene_id(0), *gene_ids(range(100_000, 100_000 + num_others)))
    found = map_genes(GeneIds(ids, "index"), vocabulary, counts_of(ids, of_first))
    assert (found.num_known, found.num_unknown) == (1, num_others)


def test_low_or_no_overlap_may_be_allowed() -> None:
    few, none = (gene_id(0), *NOVEL[:10]), ("TP53", "")
    low, no = InputOptions(allow_low_overlap=True), InputOptions(allow_no_overlap=True)
    assert map_genes(GeneIds(few, "index"), FIFTY, counts_of(few), low).num_known == 1
    found = map_genes(GeneIds(none, "index"), FIFTY, counts_of(none), no)
    assert (found.num_known, found.num_unknown, found.num_blank) == (0, 1, 1)


def test_symbol_tables(tmp_path) -> None:
    table = "ENSG00000290825.1,DDX11L16,2,1396,lncRNA\nENSG00000223972,WASH7P,6,632,x\n"
    table += "ENSG00000310526,WASH7P,1,1226,lncRNA\nENSG00000000001,,1,1,x\n"
    expected = {"DDX11L16": "ENSG00000290825", "WASH7P": "ENSG00000223972"}
    (tmp_path / "genes.csv.gz").write_bytes(gzip.compress(table.encode()))
    (tmp_path / "genes.csv").write_text(table)
    (tmp_path / "genes.json").write_text(json.dumps({**expected, "NONE": ""}))
    for name in ("genes.csv.gz", "genes.csv", "genes.json"):
        assert load_symbols(tmp_path / name) == expected


@pytest.mark.parametrize(
    "raw", [b"", b"a,b\n", b"{broken", b'{"a": 1}', b"\x1f\x8b broken", b"\xff\xfe", None]
)
def test_wrong_symbol_table_is_refused(tmp_path, raw) -> None:
    if raw is not None:
        (tmp_path / "genes").write_bytes(raw)
    with pytest.raises(DataError, match="genes" if raw is not None else "cannot be read"):
        load_symbols(tmp_path / "genes")
