"""A store appears whole under its name: what comes between, a kill between renames, a full disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

from data_prep import build_store as build_store_command
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io import files
from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.ingest import build, merge, plan, staging, tokenise
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.store.ingest.staging import StagedFolder, check_target
from geneformer_mcore.store.layout import MANIFEST_FILE, Manifest
from tests.support.small_cells import random_counts, vocabulary_of, write_h5ad

VOCABULARY = vocabulary_of(30)


@pytest.fixture
def file(tmp_path) -> Path:
    return write_h5ad(tmp_path / "a.h5ad", random_counts(np.random.default_rng(0), 200, 30))


@pytest.fixture
def target(tmp_path) -> Path:
    """Where the store is to be, alone in its folder but for what staging puts there."""
    return tmp_path / "store"


def fill(folder: Path, text: str) -> None:
    """As much of a store as staging looks at."""
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST_FILE).write_text(text)


def assert_alone(target: Path, content: str) -> None:
    """It holds a store of this content, and there is nothing else."""
    assert (target / MANIFEST_FILE).read_text() == content
    assert os.listdir(target.parent) == [target.name]


def assert_taken(target: Path, message: str = "exists already") -> None:
    with pytest.raises(DataError, match=message):
        check_target(target, overwrite=False)


def publish(target: Path, overwrite: bool = False, meanwhile: Callable = nullcontext) -> None:
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
def test_what_appeared_meanwhile(target, monkeypatch, name, overwrite, checked, message) -> None:
    """It is kept, unless it is a store and was to be replaced."""

    def appear() -> None:
        target.mkdir()
        (target / name).write_text("another's")

    if not checked:
        monkeypatch.setattr(staging, "check_target", lambda *_: None)
    with pytest.raises(DataError, match=message) if message else nullcontext():
        publish(target, overwrite, appear)
    assert (target / name).read_text() == ("another's" if message else "new")
    assert os.listdir(target.parent) == ["store"]


def test_a_store_moved_aside_by_a_killed_writer_is_put_back(target) -> None:
    aside, being_made = (target.with_name(f".store.{name}") for name in ("replaced", "staging"))
    fill(aside, "old")
    being_made.mkdir()
    fill(being_made / "store", "new")
    with pytest.raises(DataError, match=r"which is now back.*`overwrite=True`"):
        StagedFolder(target).__enter__()
    assert_alone(target, "old")
    target.rename(aside)
    with pytest.raises(RuntimeError, match="a defect"):
        break_off(target, RuntimeError("a defect"))
    assert_alone(target, "old")
    # Not half a store.
    shutil.rmtree(target)
    (aside / "tokens").mkdir(parents=True)
    publish(target)
    assert_alone(target, "new")


def test_a_rename_that_fails_leaves_the_old_store(target, monkeypatch) -> None:
    fill(target, "old")
    rename = os.rename

    def fail(source: Path, to: Path) -> None:
        if source.name == "store" and to == target:
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, to)

    monkeypatch.setattr(staging.os, "rename", fail)
    with pytest.raises(DataError, match="Permission denied"):
        publish(target, overwrite=True)
    assert_alone(target, "old")


@pytest.mark.parametrize("place", ["/proc/x", "file/store", "a" * 300])
def test_a_place_where_no_store_can_be(tmp_path, monkeypatch, place: str) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert_taken(place, "cannot be written")


@pytest.mark.parametrize("place", ["run#3/store", "a?b", "store"])
def test_no_path_that_tiledb_would_cut(tmp_path, monkeypatch, place: str) -> None:
    folder = tmp_path / ("in#here" if place == "store" else "here")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert_taken(place, r"must not hold # or \?")
    assert not list(folder.iterdir())


STAGES = {
    "first unit": (tokenise, "write_cells", 0),
    "later unit": (build._Build, "_estimate", 1),
    "frames": (merge.SomaWriter, "__enter__", 4),
    "rows": (merge.SomaWriter, "write", 4),
}
"""Where room ends, and how many units of work are finished then."""


def errors_of_limited(words: list[object], owner: object, name: str, patch, capsys) -> list[str]:
    """Of build_store.py, which ends with 2, where files may hold 1,000 bytes from that call on."""
    original, limits = getattr(owner, name), resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments: object) -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return original(*arguments)

    def main_and_room_for_its_message() -> int:
        try:
            return build_store_command.main()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    patch.setattr(sys, "argv", ["build_store.py", *map(str, words)])
    patch.setattr(owner, name, limited)
    with pytest.raises(SystemExit) as ended:
        run(main_and_room_for_its_message)
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, ""), printed.err
    return printed.err.splitlines()


@pytest.mark.parametrize("stage", STAGES)
def test_no_room_keeps_the_work(tmp_path, target, file, stage: str, monkeypatch, capsys) -> None:
    owner, name, units = STAGES[stage]
    monkeypatch.setattr(plan, "LEAST_ROWS_PER_UNIT", 50)
    before = build_store([file], target, VOCABULARY)
    VOCABULARY.save(tmp_path / "v.json")
    names = sorted(os.listdir(tmp_path))
    words = ["--out", target, "--overwrite", "--vocabulary", tmp_path / "v.json", "--workers", 1]
    with monkeypatch.context() as patch:
        *logged, error = errors_of_limited([*words, file], owner, name, patch, capsys)
    assert error.startswith(f"error: {target}: there is no room for the store: File too large.")
    assert "what was at this path before is as it was. Remedy: make room" in error
    assert Manifest.load(target) == before
    assert check_store(target) == []
    if not units:
        assert "is not known yet, no unit of work is done; nothing of it is left" in error
        assert not logged
        assert sorted(os.listdir(tmp_path)) == names
        return
    assert "bytes are free now, about " in error
    assert "are needed: a quota or ulimit -f is in the way; finished units stay in " in error
    kept = f"{units} finished units of work stay in {tmp_path}/.store.staging"
    assert logged == [f"{kept}: start the same again."]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, ".store.staging"])
    lines: list[str] = []
    again = build_store([file], target, VOCABULARY, overwrite=True, log=lines.append)
    assert lines == [f"continues: {units} of 4 units of work are there"]
    assert again.content_hash == before.content_hash
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_disk(target, code: int) -> None:
    quoted = RuntimeError(f"IO Error: Cannot write; POSIX write error:{os.strerror(code)}")
    for error in (OSError(code, os.strerror(code)), quoted):
        with pytest.raises(DataError, match=f"{os.strerror(code)}. [0-9,]+ bytes are free now"):
            break_off(target, error)
    assert os.listdir(target.parent) == []


def test_an_all_but_full_disk_never_reaches_tiledb(tmp_path, target, file, monkeypatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"No space left on device\. 4,096 bytes are free") as error:
        build_store([file], target, VOCABULARY)
    unit = next((tmp_path / ".store.staging" / "units").glob("*.arrows"))
    # The unit is there, its rows take as much again, and a mebibyte must stay free.
    missing = unit.stat().st_size + (1 << 20) - 4096
    stated = int(str(error.value).split("about ")[1].split()[0].replace(",", ""))
    assert missing - 8192 < stated <= missing
    assert not target.exists()


# Locks, and what a kill after publishing leaves


def hold(path: Path, part: str | None = None) -> StagedFolder:
    return StagedFolder(path, part=part).__enter__()


def assert_held(path: Path, part: str | None = None, message: str = "is writing it now") -> None:
    with pytest.raises(DataError, match=f"another process {message}"):
        hold(path, part)


def test_parts_share_the_folder_and_a_whole_build_does_not(target) -> None:
    parts = [hold(target, "0/3"), hold(target, "1/3")]
    (parts[0].units / "x.json").write_text("{}")
    assert_held(target, "1/3", "is doing part 1/3 of it now")
    assert_held(target)
    parts.append(hold(target, "2/3"))
    for part in parts:
        part.__exit__(None, None, None)
    whole = hold(target)
    assert_held(target)
    assert_held(target, "0/3")
    assert (whole.units / "x.json").exists()
    whole.__exit__(None, None, None)


def test_a_part_that_fails_clears_nothing_of_others(target) -> None:
    def fail() -> None:
        with pytest.raises(RuntimeError), StagedFolder(target, part="1/2"):
            raise RuntimeError

    with StagedFolder(target, part="0/2") as other:
        fail()
        (other.units / "x").write_text("")
    fail()
    assert os.listdir(target.parent) == []


def test_a_lock_on_a_folder_that_was_cleared_meanwhile_is_taken_again(target, monkeypatch) -> None:
    flock, cleared = files.fcntl.flock, []

    def clear_first(file: object, kind: int) -> None:
        if not cleared:
            cleared.append(shutil.rmtree(target.with_name(".store.staging")))
        flock(file, kind)

    monkeypatch.setattr(files.fcntl, "flock", clear_first)
    first = hold(target)
    assert_held(target)
    assert cleared
    first.__exit__(None, None, None)


def test_what_a_writer_left_that_was_killed_after_publishing_goes(target, monkeypatch) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(staging.shutil, "rmtree", lambda *_, **__: None)
        publish(target)
    (target.with_name(".store.staging") / "units" / "x.json").write_text("{}")
    # Of another store by that name it is not known whether it is finished.
    sound = (target / MANIFEST_FILE).read_text()
    fill(target, "another")
    assert_taken(target)
    assert sorted(os.listdir(target.parent)) == [".store.staging", "store"]
    fill(target, sound)
    assert_taken(target)
    assert_alone(target, sound)


@pytest.mark.parametrize("after", range(5))
def test_a_kill_while_the_rest_is_cleared(target, monkeypatch, after: int) -> None:
    removed = []

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
        for owner, name in ((staging.shutil, "rmtree"), (Path, "unlink"), (Path, "rmdir")):
            patch.setattr(owner, name, killed(getattr(owner, name)))
        with suppress(SystemError):
            staged.publish()
    assert_taken(target)
    assert_alone(target, "new")


def test_units_outlive_an_error_and_the_store_in_the_making_does_not(target) -> None:
    with suppress(RuntimeError), StagedFolder(target) as staged:
        (staged.units / "x.json").write_text("{}")
        fill(staged.store, "half")
        raise RuntimeError
    assert sorted(os.listdir(target.with_name(".store.staging"))) == ["lock", "units"]
    assert not target.exists()
