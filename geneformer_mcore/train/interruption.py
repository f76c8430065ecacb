"""Asking a run to stop: signals and the wall-clock limit, agreed on by all ranks."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch

from geneformer_mcore.parallel.collectives import any_rank

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Notes TERM and USR1 without acting on them: a step, a save, an evaluation is finished first.

    max_minutes: wall-clock limit counted from here; 0 is none.
    """

    def __init__(self, max_minutes: float) -> None:
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self._signal: str | None = None
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop. All ranks call it after the same step."""
        return any_rank(self._reason() is not None, device)

    def _reason(self) -> str | None:
        if self._signal:
            return f"signal {self._signal}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time limit (train.max_minutes)"
        return None

    @property
    def reason(self) -> str:
        """Why, as far as this rank knows."""
        return self._reason() or "another rank was asked to stop"

    def close(self) -> None:
        """Gives the signals back to whoever had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
