"""A store appears whole under its name: what comes between, a kill between renames, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import files
from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.ingest import plan, staging
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.store.ingest.staging import StagedFolder, check_target
from geneformer_mcore.store.layout import MANIFEST_FILE, Manifest
from tests.support import commands
from tests.support.small_cells import random_counts, vocabulary_of, write_h5ad

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
        fill(staged.store, "new")
        meanwhile()
        staged.publish()


def break_off(target: Path, error: Exception) -> None:
    """Writes half a store."""
    with StagedFolder(target, overwrite=True) as staged:
        fill(staged.store, "new")
        raise error


@pytest.mark.parametrize(
    ("name", "overwrite", "checked", "message"),
    [
        ("thesis.txt", False, True, r"exists already.*`overwrite=True`"),
        ("thesis.txt", True, True, "exists and is no store"),
        (MANIFEST_FILE, False, True, r"exists already.*`overwrite=True`"),
        # At the last moment, after the check.
        (MANIFEST_FILE, False, False, "cannot take this name"),
        (MANIFEST_FILE, True, True, ""),
    ],
)
def test_what_appeared_meanwhile_is_kept_unless_it_is_a_store_and_was_to_be_replaced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    overwrite: bool,
    checked: bool,
    message: str,
) -> None:
    target = tmp_path / "store"

    def appear() -> None:
        target.mkdir()
        (target / name).write_text("another's")

    if not checked:
        monkeypatch.setattr(staging, "check_target", lambda *_: None)
    with pytest.raises(DataError, match=message) if message else nullcontext():
        publish(target, overwrite, appear)
    assert (target / name).read_text() == ("another's" if message else "new")
    assert os.listdir(tmp_path) == ["store"]


def test_a_store_moved_aside_by_a_killed_writer_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "store"
    fill(target, "old")
    target.rename(tmp_path / ".store.replaced")
    (tmp_path / ".store.staging").mkdir()
    fill(tmp_path / ".store.staging" / "store", "new")
    with pytest.raises(DataError, match=r"which is now back.*`overwrite=True`"):
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
        if source.name == "store" and to == target:
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
from geneformer_mcore.exit_codes import run
from geneformer_mcore.store.ingest import build as ingest, merge, plan, tokenise
from data_prep.build_store import main

plan.LEAST_ROWS_PER_UNIT = 50
stage, limit = sys.argv.pop(1), int(sys.argv.pop(1))
owner, name = {
    "first unit": (tokenise, "write_cells"),
    "later unit": (ingest._Build, "_estimate"),
    "frames": (merge.SomaWriter, "__enter__"),
    "rows": (merge.SomaWriter, "write"),
}[stage]
original = getattr(owner, name)

before = resource.getrlimit(resource.RLIMIT_FSIZE)

def limited(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    return original(*arguments)

def main_and_room_for_its_message():
    try:
        return main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

setattr(owner, name, limited)
run(main_and_room_for_its_message)
"""


@pytest.mark.parametrize(
    ("stage", "units"), [("first unit", 0), ("later unit", 1), ("frames", 4), ("rows", 4)]
)
def test_no_room_ends_with_two_and_work_is_kept(
    tmp_path: Path,
    file: Path,
    stage: str,
    units: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "store"
    before = build_store([file], target, vocabulary_of(NUM_GENES))
    vocabulary_of(NUM_GENES).save(tmp_path / "v.json")
    names = sorted(os.listdir(tmp_path))
    (tmp_path / "limited.py").write_text(LIMITED)
    arguments = ["--out", target, "--overwrite", "--vocabulary", "v.json", "--workers", 1, file]
    result = commands.run(tmp_path / "limited.py", stage, 1000, *arguments, cwd=tmp_path)
    (tmp_path / "limited.py").unlink()
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    *told, error = result.stderr.splitlines()
    assert error.startswith(f"error: {target}: there is no room for the store: File too large.")
    assert "what was at this path before is as it was. Remedy: make room" in error
    assert Manifest.load(target) == before
    assert check_store(target) == []
    if not units:
        assert "is not known yet, no unit of work is done; nothing of it is left" in error
        assert not told
        assert sorted(os.listdir(tmp_path)) == names
        return
    assert "bytes are free now, about " in error
    assert "are needed: a quota or ulimit -f is in the way; finished units stay in " in error
    kept = (
        f"{units} finished units of work stay in {tmp_path}/.store.staging: start the same again."
    )
    assert told == [kept]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, ".store.staging"])
    lines: list[str] = []
    monkeypatch.setattr(plan, "LEAST_ROWS_PER_UNIT", 50)
    again = build_store([file], target, vocabulary_of(NUM_GENES), overwrite=True, log=lines.append)
    assert lines == [f"continues: {units} of 4 units of work are there"]
    assert again.content_hash == before.content_hash
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_disk_is_told(tmp_path: Path, code: int) -> None:
    quoted = RuntimeError(f"IO Error: Cannot write; POSIX write error:{os.strerror(code)}")
    for error in (OSError(code, os.strerror(code)), quoted):
        with pytest.raises(DataError, match=f"{os.strerror(code)}. [0-9,]+ bytes are free now"):
            break_off(tmp_path / "store", error)
    assert os.listdir(tmp_path) == []


def test_an_all_but_full_disk_never_reaches_tiledb(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"No space left on device\. 4,096 bytes are free") as error:
        build_store([file], tmp_path / "store", vocabulary_of(NUM_GENES))
    unit = next((tmp_path / ".store.staging" / "units").glob("*.arrows"))
    # The unit is there, its rows take as much again, and a mebibyte must stay free.
    missing = unit.stat().st_size + (1 << 20) - 4096
    told = int(str(error.value).split("about ")[1].split()[0].replace(",", ""))
    assert missing - 8192 < told <= missing
    assert not (tmp_path / "store").exists()


# Locks, and what a kill after publishing leaves


def hold(path: Path, part: str | None = None) -> StagedFolder:
    return StagedFolder(path, part=part).__enter__()


def test_parts_share_the_folder_and_a_whole_build_does_not(tmp_path: Path) -> None:
    target = tmp_path / "store"
    parts = [hold(target, "0/3"), hold(target, "1/3")]
    with pytest.raises(DataError, match="another process is doing part 1/3 of it now"):
        hold(target, "1/3")
    with pytest.raises(DataError, match="another process is writing it now"):
        hold(target)
    parts.append(hold(target, "2/3"))
    (parts[0].units / "x.json").write_text("{}")
    for part in parts:
        part.__exit__(None, None, None)
    whole = hold(target)
    assert (whole.units / "x.json").exists()
    with pytest.raises(DataError, match="another process is writing it now"):
        hold(target, "0/3")
    whole.__exit__(None, None, None)


def test_a_part_that_fails_clears_nothing_of_others(tmp_path: Path) -> None:
    target = tmp_path / "store"
    other = hold(target, "0/2")
    with pytest.raises(RuntimeError), StagedFolder(target, part="1/2"):
        raise RuntimeError
    (other.units / "x").write_text("")
    other.__exit__(None, None, None)
    with pytest.raises(RuntimeError), StagedFolder(target, part="1/2"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_lock_on_a_folder_that_was_cleared_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store"
    flock, cleared = files.fcntl.flock, []

    def clear_first(file: object, kind: int) -> None:
        if not cleared:
            cleared.append(shutil.rmtree(tmp_path / ".store.staging"))
        flock(file, kind)

    monkeypatch.setattr(files.fcntl, "flock", clear_first)
    first = hold(target)
    with pytest.raises(DataError, match="another process is writing it now"):
        hold(target)
    assert cleared
    first.__exit__(None, None, None)


def test_what_a_writer_left_that_was_killed_after_publishing_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store"
    with monkeypatch.context() as killed:
        killed.setattr(staging.shutil, "rmtree", lambda *_, **__: None)
        publish(target)
    (tmp_path / ".store.staging" / "units" / "x.json").write_text("{}")
    # Of another store by that name it is not known whether it is finished.
    sound = (target / MANIFEST_FILE).read_text()
    fill(target, "another")
    with pytest.raises(DataError, match="exists already"):
        check_target(target, overwrite=False)
    assert sorted(os.listdir(tmp_path)) == [".store.staging", "store"]
    fill(target, sound)
    with pytest.raises(DataError, match="exists already"):
        check_target(target, overwrite=False)
    assert os.listdir(tmp_path) == ["store"]


@pytest.mark.parametrize("after", range(5))
def test_a_kill_while_the_rest_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    target, removed = tmp_path / "store", []

    def killed(original: Callable[..., object]) -> Callable[..., object]:
        def remove(path: Path, *arguments: object, **options: object) -> object:
            if ".staging" in str(path) and path.name != "store":
                removed.append(path)
                if len(removed) > after:
                    raise SystemError("killed")
            return original(path, *arguments, **options)

        return remove

    with monkeypatch.context() as patch, StagedFolder(target) as staged:
        fill(staged.store, "new")
        (staged.units / "x.json").write_text("{}")
        patch.setattr(staging.shutil, "rmtree", killed(shutil.rmtree))
        patch.setattr(Path, "unlink", killed(Path.unlink))
        patch.setattr(Path, "rmdir", killed(Path.rmdir))
        with suppress(SystemError):
            staged.publish()
    assert content(target) == "new"
    with pytest.raises(DataError, match="exists already"):
        check_target(target, overwrite=False)
    assert os.listdir(tmp_path) == ["store"]


def test_units_outlive_an_error_and_the_store_in_the_making_does_not(tmp_path: Path) -> None:
    target = tmp_path / "store"
    staged = hold(target)
    (staged.units / "x.json").write_text("{}")
    fill(staged.store, "half")
    staged.__exit__(RuntimeError, RuntimeError(), None)
    assert sorted(os.listdir(tmp_path / ".store.staging")) == ["lock", "units"]
    assert not target.exists()
