"""Files that commands write: refused before the work, whole or not there after it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import check_output, whole_file


def test_a_new_file_in_new_folders_is_fine_and_nothing_is_made(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "c.json")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["/proc/x", "file/c.json", "file/a/c.json", "n" * 300])
def test_no_place_for_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: .*Remedy"):
        check_output(tmp_path / name, overwrite=True)
    with pytest.raises(DataError, match="cannot be written"), whole_file(tmp_path / name) as out:
        out.write_text("new")
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"exists already.*--overwrite"):
        check_output(tmp_path / "file")
    check_output(tmp_path / "file", overwrite=True)
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(DataError, match="is no file"):
            check_output(path, overwrite=True)


def write_half(path: Path, error: BaseException) -> None:
    with whole_file(path) as partial:
        partial.write_text("ne")
        raise error


def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    full = OSError(errno.ENOSPC, "No space left on device")
    for error, told in ((full, DataError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(told):
            write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]
