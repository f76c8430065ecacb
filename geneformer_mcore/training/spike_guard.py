"""Spike guard: an update is skipped if its loss or gradient is not finite or a spike.

(loss, gradient norm) of a step, the same on every rank  ->  reason to skip it, or none
                                                         ->  counted; too many in a row: the end
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from geneformer_mcore.config.sections import NonFinite, Precision, TrainConfig
from geneformer_mcore.errors import CheckpointError, DivergedError
from geneformer_mcore.io.schema import Count, as_type


class TooManySkippedUpdatesError(DivergedError):
    """The settings allow no further update to be skipped. No weight was changed by this one."""


def _sigmas_above(values: deque[float], value: float) -> float:
    """Standard deviations that `value` lies above the mean of `values`."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((each - mean) ** 2 for each in values) / len(values)
    return (value - mean) / max(math.sqrt(variance), 1e-12 * max(1.0, abs(mean)))


@dataclass
class _State:
    skipped: Count
    in_a_row: Count
    recent: dict[str, list[float]]


class SpikeGuard:
    """Decides on updates; its state is part of a checkpoint.
    skipped:  updates skipped since step 0;  in_a_row: since the last one that was made"""

    def __init__(self, settings: TrainConfig) -> None:
        self.skipped = 0
        self.in_a_row = 0
        self._spike_sigma = settings.spike_sigma
        self._stops = settings.non_finite is NonFinite.stop
        self._is_scaled = settings.precision is Precision.fp16
        self._max_skips = settings.max_skips
        window = settings.spike_window
        self._recent = {name: deque[float](maxlen=window) for name in ("loss", "gradient norm")}

    def reason(self, loss: float, grad_norm: float) -> str:
        """Why the update must be skipped, or "".
        loss, grad_norm: nats per predicted gene, before clipping"""
        found = {"loss": loss, "gradient norm": grad_norm}
        for name, value in found.items():
            if not math.isfinite(value):
                return f"the {name} is not finite"
        return self._spike(found) if self._spike_sigma else ""

    def _spike(self, found: dict[str, float]) -> str:
        for name, value in found.items():
            recent = self._recent[name]
            if len(recent) < (recent.maxlen or 0):
                continue
            sigmas = _sigmas_above(recent, value)
            if sigmas > self._spike_sigma:
                return (
                    f"the {name} is a spike, {sigmas:.1f} standard deviations above the mean of "
                    f"the last {len(recent)} updates"
                )
        return ""

    def made(self, loss: float, grad_norm: float) -> None:
        self.in_a_row = 0
        if math.isfinite(loss):
            self._recent["loss"].append(loss)
            self._recent["gradient norm"].append(grad_norm)

    def left_out(self, what: str, loss: float, grad_norm: float) -> None:
        """Count a skipped update, `what`. Raises TooManySkippedUpdatesError if one too many."""
        # An infinite gradient of a scaled loss only lowers the scale.
        is_finite = math.isfinite(loss) and (math.isfinite(grad_norm) or self._is_scaled)
        self.skipped += 1
        self.in_a_row += 1
        if not is_finite and self._stops:
            raise TooManySkippedUpdatesError(
                f"{what}. train.non_finite=skip would leave out such steps."
            )
        if self.in_a_row > self._max_skips:
            raise TooManySkippedUpdatesError(
                f"{what}. It is number {self.in_a_row} in a row, and train.max_skips is "
                f"{self._max_skips}."
            )

    def check_learned(self, steps: int) -> None:
        """Raise TooManySkippedUpdatesError where none of the `steps` so far updated the weights."""
        if 0 < steps <= self.skipped:
            raise TooManySkippedUpdatesError(
                f"all {steps} updates were left out, so the model has learned nothing: the reasons "
                "are in skipped.jsonl. Remedy: a new run.dir with a smaller optim.lr, another "
                "precision, or other cells."
            )

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(each) for name, each in self._recent.items()}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError unless `state` is of `state_dict`."""
        remedy = "take another checkpoint"
        found = as_type(state, _State, "the record's guard", remedy, CheckpointError)
        self.skipped, self.in_a_row = found.skipped, found.in_a_row
        for name, recent in self._recent.items():
            recent.extend(found.recent.get(name, []))
