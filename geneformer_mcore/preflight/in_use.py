"""Whether a run folder is in use, found out without taking its lock for an instant: a start that
came in that instant would be refused.

Linux lists the locks that are held on this machine; one that is held on another machine of a
network file system is a byte-range lock there, and can be asked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
from pathlib import Path

_LOCKS = Path("/proc/locks")
_PROCESSES = Path("/proc")
_FLOCK = "hhqqi4x"
"""struct flock of 64-bit Linux: type, whence, start, length, pid."""


def is_locked(path: Path) -> bool:
    """Whether any process holds the lock of the file `path`, as far as this machine can know."""
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            return _held_here(path, status.st_ino) or _held_elsewhere(file.fileno())
    except OSError:
        return False


def _held_here(path: Path, inode: int) -> bool:
    """A lock is listed by number of file: which file system that is of, its holder's files tell."""
    with contextlib.suppress(OSError):
        for line in _LOCKS.read_text().splitlines():
            found = re.search(r"FLOCK\s+\S+\s+\S+\s+(-?\d+)\s+\S+:(\d+)\s", line)
            if found and int(found[2]) == inode and _has_open(int(found[1]), path):
                return True
    return False


def _has_open(process: int, path: Path) -> bool:
    """Whether the process has the file open; yes where it cannot be asked."""
    try:
        files = list((_PROCESSES / str(process) / "fd").iterdir())
    except OSError:
        return True
    for file in files:
        with contextlib.suppress(OSError):
            if file.samefile(path):
                return True
    return False


def _held_elsewhere(descriptor: int) -> bool:
    asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    with contextlib.suppress(OSError):
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, asked)
        return struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK
    return False
