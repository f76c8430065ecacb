"""A file that a command writes: refused before any work, and never found half written.

path  ->  check_output  ->  (the work)  ->  whole_file: .NAME.partial, filled  ->  renamed to NAME
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from geneformer_mcore.errors import DataError


class UnwritableError(DataError):
    """There is no room for a file, or no right to write it."""


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Raises DataError if no file can be written at `path`, or one is there and must stay."""
    check_place(path)
    path = Path(path)
    if not path.exists():
        return
    if not path.is_file():
        raise DataError(f"{path}: is no file, and a file is to be written. Remedy: name another.")
    if not overwrite:
        raise DataError(
            f"{path}: exists already. Remedy: choose another path, or --overwrite to replace it."
        )


def check_place(path: str | Path) -> None:
    """Raises DataError if nothing can be made at `path`, by trying in the nearest folder there is.

    Permissions alone do not tell: root has them all, even where the file system is read-only.
    """
    path = Path(path)
    try:
        path.exists()  # Fails where the name is too long.
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` at the end; after an error nothing is left.

    Raises UnwritableError where writing fails.
    """
    path = Path(path)
    # Several processes may write one file: each has a name of its own for the time being.
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> UnwritableError:
    return UnwritableError(
        f"{path}: cannot be written: {error.strerror or error}. Remedy: choose another path, or "
        "make room and give yourself the right to write there."
    )
