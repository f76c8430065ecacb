"""Who may write in a folder: one process for all of it, or several that each do a part.

folder/lock                  held alone by a writer of the whole, shared by writers of parts
folder/part_I_of_N.lock      held by the one writer of that part

Locks are the system's (flock): they belong to the process and go with it, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from geneformer_mcore.errors import DataError

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
