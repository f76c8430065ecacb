"""A small file system of its own, to be filled or made read-only."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BLOCK = 4096


@contextlib.contextmanager
def mounted(disk: Path, size: str = "3m") -> Iterator[Path]:
    """A file system at the new folder `disk`. Skips the test where none may be mounted."""
    disk.mkdir()
    if not _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)):
        pytest.skip("no permission to mount a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--recursive", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Takes every free block of it; returns the file that did."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(BLOCK))
    free = os.statvfs(disk).f_bfree
    assert free == 0, f"{free} blocks are left"
    return filler


def make_read_only(disk: Path, read_only: bool = True) -> None:
    """The whole file system; nothing on it may be open for writing."""
    assert _mount("-o", f"remount,{'ro' if read_only else 'rw'}", str(disk))


def cover_read_only(folder: Path) -> None:
    """What looks up `folder`, which must lie on a mounted disk, finds it read-only from now on."""
    assert _mount("--bind", str(folder), str(folder))
    assert _mount("-o", "remount,bind,ro", str(folder))


def uncover(folder: Path) -> None:
    """Undoes cover_read_only."""
    subprocess.run(["umount", str(folder)], check=True)


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0
