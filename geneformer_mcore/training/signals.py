"""Requests to stop: signals and the wall-clock limit."""

from __future__ import annotations

import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Interrupted(Exception):  # noqa: N818  it is no error
    """Raised where a signal comes, or the time is up, while there is nothing to finish first."""


class Interruption:
    """Notes signals from the start of a command on; the loop reads `reason` between steps, and all
    ranks agree on it there, so a step, a save or a validation is finished first."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._deadline: float | None = None
        self._signal: str | None = None
        self._raises = False
        for number in _SIGNALS:
            signal.signal(number, self._note)

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

    def raise_from_now(self) -> None:
        """From now on a signal raises Interrupted; at once if `reason` is set already."""
        self._raises = True
        if self.reason:
            raise Interrupted(self.reason)

    def note_only(self) -> None:
        self._raises = False

    def over(self) -> None:
        """Ignore signals while the interpreter ends: the outcome is written."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if self._raises:
            self._raises = False
            raise Interrupted(self.reason)
