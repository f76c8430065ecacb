"""A folder that appears under its final name complete, or not at all.

.NAME.staging (locked by its one writer)  ->  filled  ->  synced to disk  ->  renamed to NAME
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.layout import MANIFEST_FILE


class StagedFolder:
    """A context manager: `path` is a fresh folder beside `target`; `publish` renames it.

    Left without `publish` (an error), it is removed; a kill leaves it, and the next writer clears
    it. The lock belongs to the process and goes with it, however it ends.
    """

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        """overwrite: a store at `target` is replaced at the end.

        Raises DataError if `target` exists and may not be replaced (see check_target).
        """
        self.target = target
        self.path = target.parent / f".{target.name}.staging"
        self._lock = -1
        check_target(target, overwrite)

    def __enter__(self) -> StagedFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            self._take_lock()
            for item in self.path.iterdir():
                shutil.rmtree(item) if item.is_dir() else item.unlink()
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

    def publish(self) -> None:
        """Makes the folder durable and gives it its final name."""
        _sync_tree(self.path)
        replaced = self.target.parent / f".{self.target.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if self.target.exists():
            os.rename(self.target, replaced)
        os.rename(self.path, self.target)
        _sync(self.target.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def check_target(target: str | Path, overwrite: bool) -> None:
    """Raises DataError if `target` exists, unless it is a store (or empty) and to be replaced."""
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
