"""A folder that appears under its final name complete, or not at all.

.NAME.staging (locked by its one writer)  ->  filled  ->  synced to disk  ->  renamed to NAME

To replace a store takes two renames: NAME to .NAME.replaced, .NAME.staging to NAME. A kill between
them leaves no NAME, and the next writer puts the old store back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from geneformer_mcore.cells.output import check_place
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.layout import MANIFEST_FILE

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What the system says of a full disk, a used up quota, a limit to a file's size. TileDB quotes it
in errors that are no OSError, so it is looked for in their text."""

_LEAST_BYTES = 1 << 20
"""Free space below which no frame of SOMA is begun."""


class StagedFolder:
    """A context manager: `path` is a fresh folder beside `target`; `publish` renames it.

    Left without `publish` (an error), it is removed; a kill leaves it, and the next writer clears
    it. The lock belongs to the process and goes with it, however it ends. An error that comes of a
    full disk leaves as a DataError.
    """

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        """overwrite: a store at `target` is replaced at the end.

        Raises DataError if `target` exists and may not be replaced (see check_target).
        """
        self.target = target
        self.path = target.parent / f".{target.name}.staging"
        self._replaced = target.parent / f".{target.name}.replaced"
        self._overwrite = overwrite
        self._lock = -1
        check_target(target, overwrite)

    def __enter__(self) -> StagedFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            self._take_lock()
            for item in self.path.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()
            self._put_back()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}.") from error
        return self

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise DataError(
                f"{self.target}: another process is writing it now. Remedy: wait for it, or choose "
                "another path."
            ) from None

    def _put_back(self) -> None:
        """Gives a store its name back that a killed writer had moved aside."""
        if os.path.lexists(self.target) or not (self._replaced / MANIFEST_FILE).exists():
            return
        os.rename(self._replaced, self.target)
        if not self._overwrite:
            self._remove()
            raise DataError(
                f"{self.target}: exists already: a writer was killed while it replaced this store, "
                "which is now back. Remedy: choose another path, or --overwrite to replace it."
            )

    def check_room(self) -> None:
        """Raises OSError if the disk is all but full: TileDB would end the process on the spot.

        (tiledbsoma 2.3.0, a segmentation fault where the schema of a new frame finds no room.)
        """
        if shutil.disk_usage(self.path).free < _LEAST_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def publish(self) -> None:
        """Makes the folder durable and gives it its final name.

        Raises DataError if something came to be at `target` meanwhile that may not be replaced.
        """
        _sync_tree(self.path)
        check_target(self.target, self._overwrite)
        try:
            self._rename()
        except OSError as error:
            raise DataError(
                f"{self.target}: the finished store cannot take this name: {error.strerror}. "
                "Remedy: choose another path."
            ) from error
        _sync(self.target.parent)
        _discard(self._replaced)

    def _rename(self) -> None:
        if not self._overwrite or not self.target.exists():
            # Fails if a file or a folder with content appears just now.
            os.rename(self.path, self.target)
            return
        _discard(self._replaced)
        os.rename(self.target, self._replaced)
        try:
            os.rename(self.path, self.target)
        except OSError:
            os.rename(self._replaced, self.target)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            os.close(self._lock)
            return
        why = next((reason for reason in _FULL if reason in str(error)), None)
        written = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        self._remove()
        if why:
            raise self._disk_full(why, written) from error

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _disk_full(self, why: str, written: int) -> DataError:
        return DataError(
            f"{self.target}: there is no room for the store: {why}. {written:,} bytes were written "
            f"and are removed again, {shutil.disk_usage(self.target.parent).free:,} are free now; "
            "what was at this path before is as it was. Remedy: make room (building takes up to "
            "twice the finished store; see also quota and ulimit -f), or --out on another disk."
        )


def check_target(target: str | Path, overwrite: bool) -> None:
    """Raises DataError if no store can be made at `target`, or something is there and must stay.

    Only a store (or an empty folder) is replaced, and that if `overwrite` says so.
    """
    check_place(target)
    target = Path(target)
    if not target.exists():
        return
    if not overwrite:
        raise DataError(
            f"{target}: exists already. Remedy: choose another path, or --overwrite to replace it."
        )
    is_ours = target.is_dir() and ((target / MANIFEST_FILE).exists() or not any(target.iterdir()))
    if not is_ours:
        raise DataError(
            f"{target}: exists and is no store ({MANIFEST_FILE} is missing), so it is not "
            "overwritten. Remedy: choose another path."
        )


def _discard(folder: Path) -> None:
    """Removes a store, its manifest first: half removed it is not taken for a whole one."""
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
