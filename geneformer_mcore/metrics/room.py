"""A file of a run that cannot be written is the user's to mend: one message, with the room left.

OSError of a write  ->  which file, why, how much is free, what stays, what to do
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from geneformer_mcore.errors import ConfigError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it `path` is written. Raises ConfigError where that fails, whatever the reason: a disk
    that is full, or read-only now, or over a quota."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> ConfigError:
    """The message on a file of the run folder that cannot be written."""
    why = error.strerror or str(error)
    return ConfigError(
        f"run.dir must be a folder that can be written, and {path} cannot: {why}{_room(path)}. "
        "Checkpoints stay as they were. Remedy: make room, or mend the folder or its permissions, "
        "and start the same command again; or choose another run.dir."
    )


def free_bytes(path: Path) -> int:
    """What is free on the disk of `path`, or of the nearest folder above it that is there; -1 if
    that cannot be told."""
    for place in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return -1


def _room(path: Path) -> str:
    """How much is free on the disk of `path`, or of the nearest folder above it that is there."""
    for place in path.absolute().parents:
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(os.path.realpath(path) if path.exists() else place)
            return f" ({usage.free:,} of {usage.total:,} bytes are free there)"
    return ""
