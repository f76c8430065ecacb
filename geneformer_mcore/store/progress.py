"""A progress line with rate and time left, for work counted in cells."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

_TERMINAL_INTERVAL_S = 0.2
_LOG_INTERVAL_S = 30.0


class ProgressLine:
    """A context manager; `update` fits store.writer.Progress.

    On a terminal one line that is rewritten; elsewhere (a log file) a new line every 30 seconds.
    """

    def __init__(self, unit: str, stream: TextIO | None = None) -> None:
        self._unit = unit
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._what = ""
        self._started_s = self._shown_s = time.monotonic()

    def update(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done of the work `what`; most calls show nothing."""
        now_s = time.monotonic()
        if what != self._what:
            self._what, self._started_s = what, now_s
        interval_s = _TERMINAL_INTERVAL_S if self._on_terminal else _LOG_INTERVAL_S
        if now_s - self._shown_s < interval_s:
            return
        self._shown_s = now_s
        rate = done / max(1e-9, now_s - self._started_s)
        left = f"{(total - done) / rate:.0f} s left" if rate else ""
        line = f"{what}: {done:,} of {total:,} {self._unit}, {rate:,.0f}/s, {left}"
        text = f"\r\x1b[K{line}" if self._on_terminal else f"{line}\n"
        print(text, end="", file=self._stream, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._on_terminal:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
