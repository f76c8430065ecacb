"""Files that are written: refused before the work, whole or not there after it, sealed, locked."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import (
    check_free,
    check_output,
    free_bytes,
    lock_file,
    read_sealed,
    replacing,
    whole_file,
    whole_folder,
    write_json,
    write_sealed,
)

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_new_file_in_new_folders_is_fine_and_nothing_is_made(tmp_path) -> None:
    check_output(tmp_path / "a" / "b" / "c.json")
    assert free_bytes(tmp_path / "a" / "b") > 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["/proc/x", "file/c.json", "file/a/c.json", "n" * 300])
def test_no_place_for_a_file(tmp_path, name) -> None:
    (tmp_path / "file").write_text("")
    for write in (
        lambda path: check_output(path, overwrite=True),
        lambda path: write_json(path, {}),
    ):
        with pytest.raises(DataError, match=rf"{name}: cannot be written: .*Remedy"):
            write(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_there_is_kept(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"exists already.*`overwrite=True`"):
        check_output(tmp_path / "file")
    check_output(tmp_path / "file", overwrite=True)
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(DataError, match="is no file"):
            check_output(path, overwrite=True)
    with pytest.raises(DataError, match="cannot be written: Is a directory"):
        write_json(tmp_path, {})


def write_text(path: Path, text: str, error: BaseException | None, within: Any = None) -> None:
    with within or whole_file(path) as partial:
        partial.write_text(text)
        if error:
            raise error


def write_numbers(path: Path, text: str, error: BaseException | None) -> None:
    write_json(path, {"text": text, "more": object() if error else ""})


def write_alone(path: Path, text: str, error: BaseException | None) -> None:
    write_text(path, text, error, replacing(path, durable=True, alone=True))


@pytest.mark.parametrize(
    ("write", "error", "raised"),
    [
        (write_text, FULL, DataError),
        (write_text, KeyboardInterrupt(), KeyboardInterrupt),
        (write_numbers, TypeError(), TypeError),
        (write_alone, FULL, OSError),
    ],
)
def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path, write, error, raised) -> None:
    path = tmp_path / "new folder" / "file"
    write_text(path, "old", None)
    with pytest.raises(raised):
        write(path, "new", error)
    assert os.listdir(path.parent) == ["file"]
    assert path.read_text() == "old"
    write(path, "new", None)
    assert "new" in path.read_text()
    assert os.listdir(path.parent) == ["file"]


def test_a_folder_is_whole_or_not_there(tmp_path) -> None:
    def fill(name: str, error: BaseException | None = None) -> None:
        with whole_folder(tmp_path / name) as partial:
            (partial / "file").write_text("new")
            if error:
                raise error

    fill("new/folder")
    assert (tmp_path / "new" / "folder" / "file").read_text() == "new"
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("new/folder", "link"):
        with pytest.raises(DataError, match="exists already, and nothing is replaced"):
            fill(name)
        with pytest.raises(DataError, match="exists already"):
            check_free(tmp_path / name)
    with pytest.raises(DataError, match=r"other: cannot be written: No space left.*make room"):
        fill("other", FULL)
    assert sorted(os.listdir(tmp_path)) == ["link", "new"]


def test_a_change_breaks_the_seal(tmp_path) -> None:
    path = tmp_path / "sealed.json"
    assert read_sealed(path) is None
    write_sealed(path, {"step": 1})
    assert read_sealed(path) == {"step": 1}
    sound = json.loads(path.read_text())
    for damaged in ("", "[]", '{"step": 1}', json.dumps(sound | {"step": 2})):
        path.write_text(damaged)
        assert read_sealed(path) is None, damaged


def test_a_lock_is_shared_or_held_alone_and_can_be_waited_for(tmp_path, monkeypatch) -> None:
    path, flock = tmp_path / ".lock", fcntl.flock
    with lock_file(path, shared=True), lock_file(path, shared=True), pytest.raises(BlockingIOError):
        lock_file(path)
    holder = lock_file(path)
    with pytest.raises(BlockingIOError):
        lock_file(path, shared=True)

    def flock_and_release(file: object, kind: int) -> None:
        """Gives the lock back when the system is asked to wait for it."""
        if not kind & fcntl.LOCK_NB:
            holder.close()
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock_and_release)
    with lock_file(path, wait=True), pytest.raises(BlockingIOError):
        lock_file(path)
