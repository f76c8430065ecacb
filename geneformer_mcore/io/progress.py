"""A progress bar with rate and time left, for work counted in cells or the like."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_TERMINAL_INTERVAL_S = 0.2
_LOG_INTERVAL_S = 30.0
_BAR = 24

Progress = Callable[[str, int, int], None]
"""Called with (name of the work, number done, number in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """Shows nothing."""


class ProgressLine:
    """A context manager; `update` is a Progress.

    On a terminal one line that is rewritten; elsewhere (a log file) a new line every 30 seconds.
    """

    def __init__(self, unit: str, stream: TextIO | None = None) -> None:
        self._unit = unit
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._what = ""
        self._started_s = self._shown_s = time.monotonic()
        self._first = 0
        self.seconds: dict[str, float] = {}
        """Duration of each work, up to its last call."""

    def update(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done of the work `what`, at intervals.

        Rate and time left are without what was done at the first call for a work.
        """
        now_s = time.monotonic()
        if what != self._what:
            self._what, self._started_s, self._first = what, now_s, done
        self.seconds[what] = now_s - self._started_s
        interval_s = _TERMINAL_INTERVAL_S if self._on_terminal else _LOG_INTERVAL_S
        if now_s - self._shown_s < interval_s:
            return
        self._shown_s = now_s
        rate = (done - self._first) / max(1e-9, now_s - self._started_s)
        self.print_line(self._line(done, total, rate), keep=not self._on_terminal)

    def _line(self, done: int, total: int, rate: float) -> str:
        share = done / max(1, total)
        bar = "#" * int(share * _BAR)
        left = f"{clock((total - done) / rate)} left" if rate else "time left unknown"
        return (
            f"{self._what} [{bar:-<{_BAR}}] {share:4.0%}  {done:,} of {total:,} {self._unit}, "
            f"{rate:,.0f}/s, {left}"
        )

    def print_line(self, line: str, keep: bool = True) -> None:
        """Prints a line in place of the bar. keep: it stays, and the bar goes on below."""
        start, end = ("\r\x1b[K", "\n" if keep else "") if self._on_terminal else ("", "\n")
        print(f"{start}{line}", end=end, file=self._stream, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._on_terminal:
            print("\r\x1b[K", end="", file=self._stream, flush=True)


def clock(seconds: float) -> str:
    """ "1:02:03", or "2:03" below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
