"""Requests to stop: signals, the wall-clock limit, and the end of torchrun.

before `job.ended`    a signal ends the process
raising               it raises Interrupted: there is nothing to finish first
note_only             it is noted, and the loop reads `reason` between steps
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from geneformer_mcore.distributed.launcher import LOOK_S, Launcher
from geneformer_mcore.exit_codes import DEFECT, INTERRUPTED, Interrupted, print_stderr

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_UNWIND_S = 3.0
"""Seconds in which the main thread should have raised Interrupted. In a rendezvous, in an import or
in a long kernel it runs no Python."""

End = Callable[[int, str], None]
"""Called with exit code and reason from another thread than the main one; ends the process."""


class Interruption:
    """Notes signals from the start of a command on; all ranks agree on it between two steps, so a
    step, a save or a validation is finished first."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._deadline: float | None = None
        self._signal: str | None = None
        self._raises = False
        self._left_undone = ""
        self._limit_s = float("inf")
        self._end: End = _end_at_once
        self.launcher = Launcher()
        # Python's handlers wait for the main thread; a byte on this socket does not.
        self._woken, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._note)
        threading.Thread(target=self._watch, name="requests to stop", daemon=True).start()

    def limit(self, max_minutes: float) -> None:
        """Set the wall-clock limit, in minutes since construction; 0 is none."""
        self._deadline = self._started + 60 * max_minutes if max_minutes else None

    @property
    def reason(self) -> str | None:
        """Why this rank should stop; None if it should not."""
        if self._signal:
            return f"signal {self._signal}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time limit (train.max_minutes)"
        return None

    def end_by(self, end: End, limit_s: float) -> None:
        """From now on the process is ended by `end` where its main thread cannot do it, or if
        torchrun is gone or was stopped for `limit_s` seconds."""
        self._end, self._limit_s = end, limit_s
        self.launcher.guard(limit_s)

    @contextmanager
    def raising(self, left_undone: str) -> Iterator[None]:
        """Inside, and until `note_only`, a signal raises Interrupted with `left_undone` in its
        message; at once if `reason` is set already."""
        self._raises, self._left_undone = True, left_undone
        try:
            if self.reason:
                self._raise(self.reason)
            yield
        finally:
            self._raises = False

    def note_only(self) -> None:
        """From now on a signal is noted."""
        self._raises = False

    def over(self) -> None:
        """Ignore signals while the interpreter ends: the outcome is written."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._end = _not_any_more
        self.launcher.release()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if self._end is _end_at_once:
            self._end(INTERRUPTED, f"signal {self._signal}; nothing was begun")
        if self._raises:
            self._raise(f"signal {self._signal}")

    def _raise(self, reason: str) -> None:
        self._raises = False
        raise Interrupted(f"{reason}; {self._left_undone}")

    def _watch(self) -> None:
        while True:
            if select.select([self._woken], [], [], LOOK_S)[0]:
                self._unwound({number for number in self._woken.recv(64) if number in _SIGNALS})
            elif lost := self.launcher.lost(self._limit_s):
                self._end(DEFECT, lost)

    def _unwound(self, numbers: set[int]) -> None:
        """Ends the process if its main thread is to raise Interrupted and cannot."""
        if not numbers or not self._raises:
            return
        deadline = time.monotonic() + _UNWIND_S
        while self._raises and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._raises:
            name = signal.Signals(min(numbers)).name
            self._end(INTERRUPTED, f"signal {name}; {self._left_undone}")


def _end_at_once(code: int, reason: str) -> None:
    print_stderr(f"ended by {reason}")
    os._exit(code)


def _not_any_more(_code: int, _reason: str) -> None:
    """The process is ending by itself."""
