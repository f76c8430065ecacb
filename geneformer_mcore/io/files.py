"""A file of a run that cannot be written is the user's to mend: one message, with the room left.

OSError of a write  ->  which file, why, how much is free, what stays, what to do
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from geneformer_mcore.errors import ConfigError, DataError

# A file that a command writes: refused before any work, and never found half written.
#
# path  ->  check_output  ->  (the work)  ->  whole_file: .NAME.partial, filled  ->  renamed to NAME


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


# Small JSON files that tell when they were changed.
#
# content -> + SHA-256 of its canonical form -> written beside, renamed -> read: whole, or None


def checksum_of(content: Any) -> str:
    """SHA-256, as hex, of plain JSON content in its canonical form."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` with its checksum, whole or not at all. Raises OSError where it cannot."""
    text = json.dumps(content | {"checksum": checksum_of(content)})
    # Several processes may write one file: each has a name of its own for the time being.
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
    partial.write_text(text + "\n")
    os.replace(partial, path)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None if it is not there, not whole or was changed since."""
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return content if checksum == checksum_of(content) else None


# Who may write in a folder: one process for all of it, or several that each do a part.
#
# folder/lock                  held alone by a writer of the whole, shared by writers of parts
# folder/part_I_of_N.lock      held by the one writer of that part
#
# Locks are the system's (flock): they belong to the process and go with it, however it ends.

_LOCK = "lock"


class FolderLock:
    """The lock of a folder that may not exist yet."""

    def __init__(self, folder: Path, subject: str, part: str | None = None) -> None:
        """subject: what messages say is written there; part: "I/N" for a part, None for all."""
        self._folder = folder
        self._subject = subject
        self._part = part
        self._held: list[int] = []

    def take(self) -> None:
        """Makes the folder and locks it. DataError if another process is at it; OSError."""
        kind = fcntl.LOCK_EX if self._part is None else fcntl.LOCK_SH
        while not self._lock(_LOCK, kind, "another process is writing it now"):
            pass
        if self._part is not None:
            name = f"part_{self._part.replace('/', '_of_')}.lock"
            self._lock(name, fcntl.LOCK_EX, f"another process is doing part {self._part} of it now")

    def _lock(self, name: str, kind: int, message: str) -> bool:
        """False if the folder was cleared by its last writer while the lock was taken."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._held.append(descriptor)
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return True
        except FileNotFoundError:
            pass
        except BlockingIOError:
            self.release()
            raise DataError(
                f"{self._subject}: {message}. Remedy: wait for it, or choose another path."
            ) from None
        except OSError:
            self.release()
            raise
        self.release()
        return False

    def is_alone(self) -> bool:
        """Whether no other process is at work here; none can come then until the release."""
        if not self._held:
            return False
        try:
            fcntl.flock(self._held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Gives the folder back."""
        while self._held:
            os.close(self._held.pop())


# Numbers that are kept: one JSON file, written beside its place and renamed into it.


def check_result_place(path: Path) -> None:
    """Makes the folder of `path`. Raises DataError if no file can be written there: to be asked
    before what takes minutes to measure."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Asking for permissions would not do: root has them all, on a read-only disk too.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}): name a file in a folder that can be "
            "written."
        ) from None


def save_json(path: Path, numbers: dict[str, Any]) -> None:
    """Writes `numbers` to `path`. Raises DataError where it cannot."""
    check_result_place(path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(numbers, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}).") from None


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
