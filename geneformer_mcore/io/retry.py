"""Transient I/O errors: distinguished from bad inputs, and retried where they are the network's.

    error while an input is read  ->  a network's?            ->  NetworkError
                                  ->  out of memory?          ->  MemoryError
                                  ->  the disk's, a limit's?  ->  ExternalIOError
                                  ->  none of these: the input is bad, and the caller raises
    work  ->  NetworkError  ->  wait 2, 4, 8, ... s  ->  work again | NetworkError at the end

Mistaken for a bad input, a transient error would leave it out of a store for good.
"""

from __future__ import annotations

import errno
import math
import os
import random
import re
import socket
import sys
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from geneformer_mcore.errors import DataError, ExternalIOError, NetworkError

_REMOTE = re.compile(
    r"curl|HTTP[^0-9-]*(-1|429|5\d\d)|timed? ?out|connection|network|slow ?down", re.IGNORECASE
)
"""TileDB has no error of its own for a network that fails, only a message. A 403 or 404 is none."""

_ADDRESS = re.compile(r"\w+://\S*")
"""Addresses, which may contain any word."""

_OF_NETWORKS = (ConnectionError, TimeoutError, socket.gaierror, urllib.error.URLError)

_CODES = (
    errno.EIO,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENOTCONN,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
)
_TEXTS = tuple(os.strerror(code) for code in _CODES)
"""TileDB quotes them in errors that have no number."""


def raise_if_io_error(name: str, error: BaseException) -> None:
    """Raises the transient I/O error that `error` is, if any; name: the input, a path or URI.

    HDF5 reports a lack of memory and a damaged size alike: both are blamed on the input.
    """
    if is_network_fault(error, by_text="://" in name and not name.startswith("file://")):
        raise NetworkError(
            f"{name}: the network failed: {_first_line(error)}. Remedy: start the same command "
            "again; what is done is kept."
        ) from error
    if _is_lack_of_memory(error):
        raise MemoryError(f"{name}: {_first_line(error)}") from error
    number = getattr(error, "errno", None)
    if "unable to lock file" in str(error):
        raise ExternalIOError(
            f"{name}: it is not damaged, but cannot be locked, as while another program has it "
            f"open for writing: {_first_line(error)}. Remedy: close it there, and start the same "
            "command again; where the file system knows no locks, set "
            "HDF5_USE_FILE_LOCKING=FALSE."
        ) from error
    if number in _CODES or (number is None and any(text in str(error) for text in _TEXTS)):
        raise ExternalIOError(
            f"{name}: reading failed, and not by what the input holds: {_first_line(error)}. "
            "Remedy: see to the disk or the limit, and start the same command again, which goes "
            "on; or leave the input out."
        ) from error


def is_network_fault(error: BaseException, by_text: bool = True) -> bool:
    """Whether an error, or one of its causes, is a network's.

    by_text: also by its message, for what is read over a network
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (*_OF_NETWORKS, NetworkError)):
            return True
        # Our messages quote paths and filters, which may contain any word; an errno is local.
        is_local = isinstance(found, DataError) or getattr(found, "errno", None) is not None
        if by_text and not is_local and _REMOTE.search(_ADDRESS.sub("", str(found))):
            return True
        found = found.__cause__
    return False


def _is_lack_of_memory(error: BaseException) -> bool:
    if not isinstance(error, MemoryError):
        return getattr(error, "errno", None) == errno.ENOMEM or "bad_alloc" in str(error)
    array: Any = error
    if not hasattr(error, "shape"):
        return True
    # numpy's: an array larger than all memory is due to a damaged size.
    wanted = math.prod(array.shape) * array.dtype.itemsize
    return wanted <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__


Result = TypeVar("Result")


@dataclass(frozen=True)
class Retry:
    """attempts: at most; wait_s: before the second, doubled before each further one."""

    attempts: int = 6
    wait_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise DataError(f"`attempts=` must be 1 or more, not {self.attempts}.")

    def call(self, what: str, work: Callable[[], Result]) -> Result:
        """The result of `work`; `what` names it in messages, one per retry on stderr.

        Raises NetworkError after the last attempt, and any other error at once.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return work()
            except (OSError, RuntimeError, DataError) as error:
                if not is_network_fault(error):
                    raise
                if attempt == self.attempts:
                    message = f"{what}: failed {attempt} times, last with: {_reason(error)}"
                    raise NetworkError(message) from error
                self._wait(what, attempt, error)
        raise AssertionError("there is at least one attempt")

    def _wait(self, what: str, attempt: int, error: Exception) -> None:
        # Jitter: tasks of an array that failed together must not retry together.
        seconds = self.wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
        again = f"Again in {seconds:.0f} s ({attempt} of {self.attempts} attempts made)."
        print(f"warning: {what}: {_reason(error)}. {again}", file=sys.stderr, flush=True)
        time.sleep(seconds)


def _reason(error: Exception) -> str:
    # Without its remedy, which is for the user.
    return str(error).split("\n")[0].split(" Remedy:")[0].rstrip(".")
