"""From a Census to a store that is split by data set, by the commands a user types."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore.exit_codes import INTERRUPTED, WRONG_INPUT
from geneformer_mcore.store.layout import OBS
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.soma_io import SomaReader
from geneformer_mcore.store.split.table import SplitTable
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.support import commands
from tests.support.small_cells import adata_of, random_counts
from tests.support.small_experiment import write_experiment

SIZES = {"a": 300, "b": 40, "c": 40, "d": 20, "whole": 30}
# In place of Amazon's servers, a port of this machine on which nothing listens.
NO_SERVER = {
    "TILEDB_VFS_S3_ENDPOINT_OVERRIDE": "127.0.0.1:9",
    "TILEDB_VFS_S3_CONNECT_MAX_TRIES": "1",
}
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    def call(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return commands.run(f"data_prep/{name}.py", *arguments, cwd=tmp_path)

    return call


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five data sets, of which `d` alone has its tissue, and every tenth cell is of a disease."""
    rng = np.random.default_rng(0)
    cells = {
        name: adata_of(
            random_counts(rng, size, 30, density=0.5),
            obs={
                "disease": ["cancer" if n % 10 == 9 else "normal" for n in range(size)],
                "tissue_general": ["eye" if name == "d" else "gut"] * size,
            },
            cell_ids=[f"{name}{place}" for place in range(size)],
        )
        for name, size in SIZES.items()
    }
    return write_experiment(tmp_path_factory.mktemp("census") / "census", cells)


def done(result: subprocess.CompletedProcess[str]) -> str:
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


def test_from_the_census_to_a_store(command: Command, address: str, tmp_path: Path) -> None:
    asked = ("--out", "d", "--uri", address, "--cells-per-unit", 100, "--list")
    units = ["a.0000.h5ad\ta\t100\t0\t110", "a.0001.h5ad\ta\t100\t111\t221"]
    assert done(command("download_census", *asked)).splitlines()[:2] == units
    for part in ("0/2", "1/2"):
        printed = done(command("download_census", "--out", "d", "--part", part))
        assert "0 failed, 0 not begun" in printed
    printed = done(command("download_census", "--out", "d", "--check"))
    assert "387 cells of 5 data sets in 7 files, all whole" in printed
    units = sorted((tmp_path / "d").glob("*.h5ad"))

    split = ("make_split", "d", "--out", "split.json", "--held-out-fraction", 0.25)
    printed = done(command(*split, "--test-dataset", "whole"))
    assert "held-out: 2 data sets, 72 cells (18.60%): b, c" in printed
    assert "test: 1 data sets, 27 cells (6.98%): whole" in printed
    assert "all 1 assay and 2 tissue_general in training" in printed

    done(command("build_vocabulary", "--partial", "p0.npz", *units[::2]))
    done(command("build_vocabulary", "--partial", "p1.npz", *units[1::2]))
    done(command("build_vocabulary", "--out", "merged.json", "--merge", "p0.npz", "p1.npz"))
    done(command("build_vocabulary", "--out", "v.json", *units))
    assert (tmp_path / "merged.json").read_bytes() == (tmp_path / "v.json").read_bytes()
    assert len(Vocabulary.load(tmp_path / "v.json").feature_ids) == 30

    store = ("build_store", "--vocabulary", "v.json", "--split", "split.json", "--workers", 1)
    assert command(*store, "--out", "s", *units).returncode == 0
    expected = SplitTable.load(tmp_path / "split.json")
    with TokenStore.open(tmp_path / "s") as opened, SomaReader(tmp_path / "s") as reader:
        assert opened.manifest.split == expected.describe()
        obs = reader.read(OBS, 0, len(opened), ["dataset_id", "cell_key", "split"]).to_pandas()
    assert len(obs) == 387
    found = {name: set(rows["split"]) for name, rows in obs.groupby("dataset_id")}
    train, held_out, test = {"train"}, {"validation", "test"}, {"test"}
    assert found == {"a": train, "b": held_out, "c": held_out, "d": train, "whole": test}


def test_errors_end_as_they_should(command: Command, address: str, tmp_path: Path) -> None:
    arguments = ("download_census", "--out", "d", "--uri", address)
    split, vocabulary = (
        ("make_split", "d", "--out", "s.json"),
        ("build_vocabulary", "--out", "v.json"),
    )
    done(command(*arguments))
    path = tmp_path / "d/b.h5ad"
    path.write_bytes(path.read_bytes()[:-1])
    checked = command("download_census", "--out", "d", "--check")
    assert checked.returncode == WRONG_INPUT
    assert checked.stdout.startswith("problem: d/b.h5ad: ")
    assert "1 files fetched, 4 were there" in done(command(*arguments))

    for words, message in (
        ((*arguments, "--filter", ""), "of another selection"),
        (("download_census", "--out", "e", "--uri", "nowhere"), "cannot be opened"),
        (("download_census", "--out", "d", "--part", "2/2"), "0 <= I < N"),
        (split, "Remedy: --held-out-fraction 0.0"),
        ((*split, "--test-dataset", "x"), "are not there: x"),
        ((*split, "--test-dataset", "d"), "no other data set"),
        (("make_split", "nowhere.csv", "--out", "s.json"), "there is no such file"),
        ((*vocabulary, "--merge", path), "not a whole partial"),
        (vocabulary, "name one h5ad or zarr input or more"),
        ((*vocabulary, path, "--merge", path), "--merge takes"),
    ):
        result = command(*words)
        assert result.returncode == WRONG_INPUT, message
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not [name for name in ("e", "s.json", "v.json") if (tmp_path / name).exists()]


LIMITED = """
import resource
from data_prep.download_census import main
from geneformer_mcore.exit_codes import run

resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
run(main)
"""


def test_a_full_disk_ends_with_2(command: Command, address: str, tmp_path: Path) -> None:
    """In its place a limit to the size of files."""
    arguments = ("download_census", "--out", "d", "--uri", address)
    (tmp_path / "limited.py").write_text(LIMITED)
    ended = commands.run(tmp_path / "limited.py", *arguments[1:], cwd=tmp_path)
    assert ended.returncode == WRONG_INPUT, ended.stderr
    assert ended.stderr.startswith("error: d/a.h5ad: cannot be written: File too large. Remedy: ")
    assert len(ended.stderr.splitlines()) == 1
    assert "0 files fetched, 0 were there, 1 failed, 4 not begun" in ended.stdout
    assert "5 files fetched" in done(command(*arguments))


def test_a_network_that_is_not_there_ends_with_75(tmp_path: Path) -> None:
    words = ("--out", "d", "--attempts", 2, "--uri", "s3://bucket/census")
    result = commands.run(
        "data_prep/download_census.py", *words, cwd=tmp_path, environment=NO_SERVER
    )
    assert result.returncode == INTERRUPTED
    assert result.stderr.startswith("warning: the plan: s3://bucket/census: ")
    assert "failed 2 times" in result.stderr
    assert "Remedy: start the same command again" in result.stderr
    assert not (tmp_path / "d").exists()
