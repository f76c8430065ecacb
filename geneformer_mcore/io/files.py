"""Files: checked before any work, written atomically, sealed by a checksum, locked; free space.

    path     ->  check_output  ->  (the work)  ->  whole_file: .NAME.partial  ->  renamed to NAME
    several  ->  together: each is written by whole_file, then all are renamed
    content  ->  write_sealed: JSON with its SHA-256  ->  read_sealed: as it was written, or None
    folder   ->  FolderLock: one writer for all of it, or one for each part

A kill at any instant leaves the old file or the new one; its temporary one is removed by the next
writer. (Several files are renamed one by one: a kill between two renames leaves some.) A durable
one is synchronised to the disk before it is renamed. Where one of several outputs cannot be
written, those that are whole already are kept as .NAME.kept: they were computed at cost.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from geneformer_mcore.errors import ConfigError, DataError, GeneformerError
from geneformer_mcore.io.schema import parse_json, read_bytes

_staged: ContextVar[dict[Path, Path] | None] = ContextVar("staged", default=None)
"""Within `together`: {place: what is written for it}."""


_WORDS = (
    *(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    *("StreamWriter", "iostream", "file write failed"),
)
"""Of a file that cannot be written: in errors of safetensors; of torch.save, twice; of HDF5."""


class UnwritableError(DataError):
    """There is no room for a file, or no right to write it."""


# Checks before any work


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
            f"{path}: exists already. Remedy: another path, or `overwrite=True` to replace it."
        )


def check_place(path: str | Path) -> None:
    """Raises DataError if nothing can be created at `path`, by trying in the nearest folder there
    is: root has all permissions, even where the file system is read-only."""
    path = Path(path)
    try:
        path.exists()  # Fails where the name is too long.
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


# Whole files


@contextmanager
def whole_file(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """`replacing`, with the folders of `path` created. UnwritableError where writing fails."""
    path, staged = Path(path), _staged.get()
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path)
        if path.is_dir():  # before it is written, and before others of `together` are renamed
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if staged is None:
            with replacing(path, durable) as partial:
                yield partial
        else:
            with _removed_on_error(_partial(path)) as partial:
                yield partial
            staged[path] = partial


@contextmanager
def together() -> Iterator[None]:
    """The files that `whole_file` writes within it appear at its end, or none does: after an error
    those that are whole are kept beside their places, as .NAME.kept."""
    staged: dict[Path, Path] = {}
    before = _staged.set(staged)
    try:
        yield
        for path in list(staged):
            with _naming(path):
                os.replace(staged[path], path)
            del staged[path]
    except BaseException as error:
        _keep(staged, error)
        raise
    finally:
        _staged.reset(before)


@contextmanager
def replacing(path: Path, durable: bool = False, alone: bool = False) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` at the end; after an error nothing is left.

    durable:  synchronised to the disk before it is renamed
    alone:    no other process writes it: the next writer overwrites what a kill leaves
    """
    partial = path.with_name(f".{path.name}.partial") if alone else _partial(path)
    with _removed_on_error(partial):
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)


def _partial(path: Path) -> Path:
    """Several processes may write one file: each has a temporary name of its own."""
    return path.with_name(f"{_start(path)}{os.getpid()}.partial")


def _start(path: Path) -> str:
    return f".{path.name}.{os.uname().nodename}."


@contextmanager
def _removed_on_error(partial: Path) -> Iterator[Path]:
    try:
        yield partial
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_write_failure(error):
            raise
        raise _unwritable(path, error) from error


def is_write_failure(error: Exception) -> bool:
    """Whether an error, of any library but ours, is that of a file that cannot be written."""
    if isinstance(error, OSError | GeneformerError):
        return isinstance(error, OSError)
    return any(words in str(error) for words in _WORDS)


def _clear(path: Path) -> None:
    """Removes what earlier writers of `path` left: killed ones of this host, and failed ones."""
    start, left = _start(path), [_kept(path)]
    for other in path.parent.iterdir():
        pid = other.name.removeprefix(start).removesuffix(".partial")
        if other.name.startswith(start) and pid.isdecimal() and not _lives(int(pid)):
            left.append(other)
    for each in left:
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _keep(staged: dict[Path, Path], error: BaseException) -> None:
    """Keeps what is whole, and has `error` say so."""
    kept = []
    for path, partial in staged.items():
        with suppress(OSError):
            os.replace(partial, _kept(path))
            kept.append(str(_kept(path)))
    said = f"Kept until the next start: {', '.join(kept)}."
    if kept and isinstance(error, GeneformerError):
        error.args = (f"{error.args[0]} {said}",)
    elif kept:
        error.add_note(said)


def _kept(path: Path) -> Path:
    return path.with_name(f".{path.name}.kept")


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes indented JSON. Raises UnwritableError where it cannot."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _unwritable(path: Path, error: Exception) -> UnwritableError:
    number = getattr(error, "errno", None)
    why = os.strerror(number) if number else " ".join(str(error).split())
    return UnwritableError(
        f"{path}: cannot be written: {why}. Remedy: choose another path, or "
        "make room and give yourself the right to write there."
    )


# Whole folders


def check_free(out: Path) -> None:
    """Raises DataError if `out` exists, or no folder can be made there."""
    if out.exists() or out.is_symlink():
        raise DataError(f"{out}: exists already, and nothing is replaced. Remedy: name another.")
    check_place(out)


@contextmanager
def whole_folder(out: Path, keeps: bool = False) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `out` at the end; after an error nothing is left.

    keeps: after an error, what is in it is kept as .NAME.kept
    """
    check_free(out)
    partial = _partial(out)
    try:
        with _naming(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            _clear(out)
            partial.mkdir()
            yield partial
            check_free(out)
            partial.rename(out)
    except BaseException as error:
        if keeps and partial.is_dir() and any(partial.iterdir()):
            _keep({out: partial}, error)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """fsync of a file's content, or of a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of all files and folders in `folder`, and of itself at the end."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


# Checksums


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of(content: Any) -> str:
    """SHA-256, as hex, of plain JSON content in its canonical form."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` with its checksum, whole or not at all. Raises OSError where it cannot."""
    text = json.dumps(content | {"checksum": checksum_of(content)})
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The content that `write_sealed` wrote; None if it is not there, not whole or was changed."""
    try:
        content = parse_json(read_bytes(path))
        checksum = content.pop("checksum")
        return content if checksum == checksum_of(content) else None
    except (DataError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None


# Locks


def lock_file(path: Path, shared: bool = False, wait: bool = False) -> IO[bytes]:
    """The file, locked (flock) until it is closed or this process ends, however it ends. Whoever
    holds it alone is named in it (see `holder`).

    Raises BlockingIOError if another process holds it, unless `wait`; OSError.
    """
    # Both modes: NFS needs reading for a shared lock and writing for an exclusive one.
    file = path.open("ab+", buffering=0)
    try:
        _flock(file, shared, wait)
        with suppress(OSError):  # on a full disk it is held without a name
            file.truncate(0)
            file.write(b"" if shared else _holder_line().encode())
    except BaseException:
        file.close()
        raise
    return file


def _holder_line() -> str:
    # Imported late, as in `_life`: a benchmark on a bare machine has no psutil and locks nothing.
    import psutil

    process = psutil.Process()
    here = {"pid": process.pid, "created": process.create_time(), "host": os.uname().nodename}
    return json.dumps(here)


def holder(path: Path) -> str:
    """Who holds the lock file `path` alone: process, host and start time, and whether it lives."""
    try:
        found = parse_json(path.read_bytes()[:1000])
        pid, created, host = int(found["pid"]), float(found["created"]), str(found["host"])
        began = datetime.fromtimestamp(created).astimezone().isoformat(" ", "seconds")
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "a process that did not leave its name"
    return f"process {pid} on {host}, started {began}, {_life(pid, created, host)}"


def _life(pid: int, created: float, host: str) -> str:
    if host != os.uname().nodename:
        return "which cannot be looked at from this host"
    import psutil

    try:
        process = psutil.Process(pid)
        if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
            return f"which is alive ({process.status()})"
    except psutil.Error:
        pass
    return "which has ended: a process that it started still holds the lock"


def _flock(file: IO[bytes], shared: bool, wait: bool) -> None:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))


class FolderLock:
    """The lock of a folder that may not exist yet.

    folder/lock                  held alone by a writer of the whole, shared by writers of parts
    folder/part_I_of_N.lock      held by the one writer of that part
    """

    def __init__(self, folder: Path, subject: str, part: str | None = None) -> None:
        """subject: the path that messages name; part: "I/N" for a part, None for all."""
        self._folder = folder
        self._subject = subject
        self._part = part
        self._held: list[IO[bytes]] = []

    def take(self) -> None:
        """Creates and locks the folder. DataError if another process holds it; OSError."""
        shared = self._part is not None
        while not self._lock("lock", shared, "another process is writing it now"):
            pass
        if self._part is not None:
            name = f"part_{self._part.replace('/', '_of_')}.lock"
            self._lock(name, False, f"another process is doing part {self._part} of it now")

    def _lock(self, name: str, shared: bool, message: str) -> bool:
        """False if its last writer removed the folder while the lock was taken."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        try:
            self._held.append(lock_file(path, shared))
            if os.path.samestat(os.fstat(self._held[-1].fileno()), path.stat()):
                return True
        except FileNotFoundError:
            pass
        except BlockingIOError:
            self.release()
            raise DataError(
                f"{self._subject}: {message}: {holder(path)}. Remedy: wait for it, or choose "
                "another path."
            ) from None
        except OSError:
            self.release()
            raise
        self.release()
        return False

    def is_alone(self) -> bool:
        """Whether this process is the only one here; then none can join until the release."""
        if not self._held:
            return False
        try:
            _flock(self._held[0], shared=False, wait=False)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Unlocks the folder."""
        while self._held:
            self._held.pop().close()


# Free space, and files of a run


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of `path`, or of the nearest folder above it; -1 if unknown."""
    for place in (path.absolute(), *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return -1


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing the file `path` of a run: an OSError becomes a ConfigError."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> ConfigError:
    """The error on a file of the run folder that cannot be written."""
    why = error.strerror or str(error)
    return ConfigError(
        f"run.dir must be a folder that can be written, and {path} cannot: {why}{_room(path)}. "
        "Checkpoints stay as they were. Remedy: make room, or fix the folder or its permissions, "
        "and start the same command again; or choose another run.dir."
    )


def _room(path: Path) -> str:
    for place in path.absolute().parents:
        with suppress(OSError):
            usage = shutil.disk_usage(os.path.realpath(path) if path.exists() else place)
            return f" ({usage.free:,} of {usage.total:,} bytes are free there)"
    return ""
