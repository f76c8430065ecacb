"""A store appears whole under its name: what comes between, a kill between renames, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.store import staging
from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.ingest import build_store
from geneformer_mcore.store.layout import MANIFEST_FILE, Manifest
from geneformer_mcore.store.staging import StagedFolder, check_target
from tests.small_cells import random_counts, vocabulary_of, write_h5ad

NUM_GENES = 30


@pytest.fixture
def file(tmp_path: Path) -> Path:
    counts = random_counts(np.random.default_rng(0), 200, NUM_GENES)
    return write_h5ad(tmp_path / "a.h5ad", counts)


def fill(folder: Path, text: str) -> None:
    """As much of a store as staging looks at."""
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_FILE).write_text(text)


def content(folder: Path) -> str:
    return (folder / MANIFEST_FILE).read_text()


def publish(
    target: Path, overwrite: bool = False, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Writes a store "new" and publishes it, after `meanwhile`."""
    with StagedFolder(target, overwrite) as staged:
        fill(staged.path, "new")
        meanwhile()
        staged.publish()


def break_off(target: Path, error: Exception) -> None:
    """Writes half a store."""
    with StagedFolder(target, overwrite=True) as staged:
        fill(staged.path, "new")
        raise error


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appeared_meanwhile_is_kept(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "store"

    def appear() -> None:
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")

    with pytest.raises(DataError, match="exists"):
        publish(target, overwrite, appear)
    assert (target / "thesis.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["store"]


def test_a_store_that_appeared_meanwhile_is_replaced_only_if_asked(tmp_path: Path) -> None:
    target = tmp_path / "store"
    with pytest.raises(DataError, match="--overwrite"):
        publish(target, meanwhile=lambda: fill(target, "another's"))
    assert content(target) == "another's"
    shutil.rmtree(target)
    publish(target, True, lambda: fill(target, "another's"))
    assert content(target) == "new"
    assert os.listdir(tmp_path) == ["store"]


def test_what_appears_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store"
    monkeypatch.setattr(staging, "check_target", lambda *_: None)
    with pytest.raises(DataError, match="cannot take this name"):
        publish(target, meanwhile=lambda: fill(target, "another's"))
    assert content(target) == "another's"
    assert os.listdir(tmp_path) == ["store"]


def test_a_store_moved_aside_by_a_killed_writer_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "store"
    fill(target, "old")
    target.rename(tmp_path / ".store.replaced")
    fill(tmp_path / ".store.staging", "new")
    with pytest.raises(DataError, match=r"which is now back.*--overwrite"):
        StagedFolder(target).__enter__()
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["store"]
    target.rename(tmp_path / ".store.replaced")
    with pytest.raises(RuntimeError, match="a defect"):
        break_off(target, RuntimeError("a defect"))
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["store"]


def test_half_a_store_moved_aside_is_not_put_back(tmp_path: Path) -> None:
    (tmp_path / ".store.replaced" / "tokens").mkdir(parents=True)
    publish(tmp_path / "store")
    assert content(tmp_path / "store") == "new"
    assert os.listdir(tmp_path) == ["store"]


def test_a_rename_that_fails_leaves_the_old_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store"
    fill(target, "old")
    rename = os.rename

    def fail(source: Path, to: Path) -> None:
        if source.name == ".store.staging":
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, to)

    monkeypatch.setattr(staging.os, "rename", fail)
    with pytest.raises(DataError, match="Permission denied"):
        publish(target, overwrite=True)
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("place", ["/proc/x", "file/store", "a" * 300])
def test_a_place_where_no_store_can_be_is_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="cannot be written"):
        check_target(place, overwrite=False)


LIMITED = """
import resource, sys
from geneformer_mcore.commands import run
from geneformer_mcore.store import buckets, writer
from data_prep.build_store import main

stage, limit = sys.argv.pop(1), int(sys.argv.pop(1))
owner, name = {
    "buckets": (buckets.Buckets, "__init__"),
    "rows": (writer.SomaWriter, "write"),
    "consolidate": (writer.SomaWriter, "consolidate"),
    "manifest": (writer, "_versions"),
}[stage]
original = getattr(owner, name)

def limited(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return original(*arguments)

setattr(owner, name, limited)
run(main)
"""


@pytest.mark.parametrize("stage", ["buckets", "rows", "consolidate", "manifest"])
def test_no_room_ends_with_two_and_one_message(
    tmp_path: Path, file: Path, stage: str, repository: Path
) -> None:
    target = tmp_path / "store"
    before = build_store([file], target, vocabulary_of(NUM_GENES))
    vocabulary_of(NUM_GENES).save(tmp_path / "v.json")
    names = sorted(os.listdir(tmp_path))
    arguments = ["--out", target, "--overwrite", "--vocabulary", "v.json", file]
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, stage, "1000", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith(f"error: {target}: there is no room for the store: File too")
    assert "bytes were written and are removed again" in result.stderr
    assert "Remedy: make room" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == names
    assert Manifest.load(target) == before
    assert check_store(target) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_disk_is_told(tmp_path: Path, code: int) -> None:
    quoted = RuntimeError(f"IO Error: Cannot write; POSIX write error:{os.strerror(code)}")
    for error in (OSError(code, os.strerror(code)), quoted):
        with pytest.raises(DataError, match=f"{os.strerror(code)}. 3 bytes"):
            break_off(tmp_path / "store", error)
    assert os.listdir(tmp_path) == []


def test_an_all_but_full_disk_never_reaches_tiledb(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"No space left on device.*4,096 are free now"):
        build_store([file], tmp_path / "store", vocabulary_of(NUM_GENES))
    assert os.listdir(tmp_path) == ["a.h5ad"]
