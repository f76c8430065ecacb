"""Staging folder of a store, which gets its name complete or not at all.

    .NAME.staging/units/   finished units of work, which outlive a kill, an error, a full disk
                  store/   the unfinished store  ->  synchronised to disk  ->  renamed to NAME

To replace a store takes two renames: NAME to .NAME.replaced, .NAME.staging/store to NAME. A kill
between them leaves no NAME, and the next writer puts the old store back.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from geneformer_mcore.errors import DataError, ExternalIOError
from geneformer_mcore.io.files import FolderLock, check_place, file_digest, sync, sync_tree
from geneformer_mcore.store.layout import MANIFEST_FILE

_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""The system's texts for a full disk, a used up quota and a limit of file size, which TileDB quotes
in errors that are no OSError."""

_LEAST_BYTES = 1 << 20
"""Free space below which no SOMA frame is created."""

_PUBLISHED = "published"


class StagedFolder:
    """A context manager: folders `units` and `store` next to `target`; `publish` renames `store`.

    Without `publish`, `units` stays for the next writer if it holds a unit, the rest is removed;
    after a kill the next writer does that. An error due to a full disk becomes a DataError.

    bytes_needed:  to be set: the approximate size of units and store together (0: unknown)
    """

    def __init__(self, target: Path, overwrite: bool = False, part: str | None = None) -> None:
        """overwrite: a store at `target` is replaced at the end
        part: of the units, while other processes do others; None: all
        Raises DataError (see check_target)."""
        self.target = target
        self.path = _staging_of(target)
        self.units = self.path / "units"
        self.store = self.path / "store"
        self.bytes_needed = 0
        self._replaced = target.parent / f".{target.name}.replaced"
        self._overwrite = overwrite
        self._part = part
        self._lock = FolderLock(self.path, str(target), part)
        check_target(target, overwrite)

    def __enter__(self) -> StagedFolder:
        try:
            self._lock.take()
            self._prepare()
        except OSError as error:
            self._lock.release()
            raise DataError(f"{self.path}: cannot be written: {error.strerror}.") from error
        return self

    def _prepare(self) -> None:
        self.units.mkdir(exist_ok=True)
        if self._part is None:
            _discard(self.store)
            (self.path / _PUBLISHED).unlink(missing_ok=True)
            try:
                self._put_back()
            except DataError:
                self._clear()
                raise

    def _put_back(self) -> None:
        """Renames back a store that a killed writer had moved."""
        if os.path.lexists(self.target) or not (self._replaced / MANIFEST_FILE).exists():
            return
        os.rename(self._replaced, self.target)
        if not self._overwrite:
            raise DataError(
                f"{self.target}: exists already: a writer was killed while it replaced this store, "
                "which is now back. Remedy: choose another path, or `overwrite=True` to replace it."
            )

    def check_room(self, num_bytes: int = 0) -> None:
        """Raises OSError without room for `num_bytes` more: TileDB would end the process (version
        2.3.0 of tiledbsoma, a segmentation fault where a new frame's schema has no room)."""
        if shutil.disk_usage(self.path).free < num_bytes + _LEAST_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def publish(self) -> None:
        """Synchronises the store to disk, gives it its final name, and clears the rest.

        Raises DataError if `target` exists meanwhile and may not be replaced.
        """
        sync_tree(self.store)
        check_target(self.target, self._overwrite)
        (self.path / _PUBLISHED).write_text(_seal_of(self.store), encoding="utf-8")
        try:
            self._rename()
        except OSError as error:
            raise DataError(
                f"{self.target}: the finished store cannot take this name: {error.strerror}. "
                "Remedy: choose another path."
            ) from error
        sync(self.target.parent)
        _discard(self._replaced)
        _clear(self.path)

    def _rename(self) -> None:
        if not self._overwrite or not self.target.exists():
            # Fails if a file or a folder with content appears just now.
            os.rename(self.store, self.target)
            return
        _discard(self._replaced)
        os.rename(self.target, self._replaced)
        try:
            os.rename(self.store, self.target)
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
            self._lock.release()
            return
        # One of these is about another folder.
        is_other = isinstance(error, ExternalIOError)
        why = next((each for each in _FULL if each in str(error) and not is_other), None)
        used = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        self._clear()
        if why:
            raise self._disk_full(why, used) from error

    def _clear(self) -> None:
        """Removes what the next writer cannot use, and unlocks the folder."""
        if self._part is None:
            _discard(self.store)
        if not any(self.units.glob("*.json")) and self._lock.is_alone():
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def _disk_full(self, why: str, used: int) -> DataError:
        free = shutil.disk_usage(self.target.parent).free
        needed = self.bytes_needed + _LEAST_BYTES - used
        more = "how much is missing is not known yet, no unit of work is done"
        if self.bytes_needed:
            more = f"about {needed - free:,} bytes more are needed"
        if self.bytes_needed and needed <= free:
            more = f"about {needed:,} are needed: a quota or ulimit -f is in the way"
        kept = f"finished units stay in {self.path} for the next run"
        if not self.path.exists():
            kept = "nothing of it is left"
        return DataError(
            f"{self.target}: there is no room for the store: {why}. {free:,} bytes are free now, "
            f"{more}; {kept}, and what was at this path before is as it was. Remedy: make room and "
            "start the same command again (building takes up to twice the finished store), or "
            "`out=` on another disk."
        )


def check_target(target: str | Path, overwrite: bool) -> None:
    """Raises DataError if no store can be made at `target`: only a store or an empty folder is
    replaced, and only with `overwrite`."""
    check_place(target)
    target = Path(target)
    if not {"#", "?"}.isdisjoint(str(target.absolute())):
        # A new array's place is computed by the rules of URIs, where its path ends at these signs.
        raise DataError(
            f"{target.absolute()}: the path of a store must not hold # or ?: TileDB would write to "
            "another folder. Remedy: another path; a finished store may be moved anywhere."
        )
    if not target.exists():
        return
    if not overwrite:
        _clear_published(target)
        raise DataError(
            f"{target}: exists already. Remedy: another path, or `overwrite=True` to replace it."
        )
    is_ours = target.is_dir() and ((target / MANIFEST_FILE).exists() or not any(target.iterdir()))
    if not is_ours:
        raise DataError(
            f"{target}: exists and is no store ({MANIFEST_FILE} is missing), so it is not "
            "overwritten. Remedy: choose another path."
        )


def _staging_of(target: Path) -> Path:
    return target.parent / f".{target.name}.staging"


def _clear_published(target: Path) -> None:
    """Removes the files of a writer that was killed after it had published this store."""
    staging = _staging_of(target)
    with suppress(OSError):
        staging.rmdir()  # All but gone already, or refused.
    with suppress(OSError, DataError):
        published = (staging / _PUBLISHED).read_text(encoding="utf-8")
        if published == _seal_of(target):
            lock = FolderLock(staging, str(target))
            lock.take()
            _clear(staging)
            lock.release()


def _clear(staging: Path) -> None:
    """Removes the staging folder of a published store; last the mark that all of it may go."""
    mark = staging / _PUBLISHED
    shutil.rmtree(staging / "units", ignore_errors=True)
    with suppress(OSError):
        for path in staging.iterdir():
            if path != mark:
                path.unlink()
        mark.unlink()
        staging.rmdir()


def _seal_of(store: Path) -> str:
    return file_digest(store / MANIFEST_FILE)


def _discard(folder: Path) -> None:
    """Removes a store, its manifest first: half removed it is not taken for a whole one."""
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
