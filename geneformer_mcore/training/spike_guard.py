"""Which updates are made: those whose loss and gradient are finite and no spike.

    (loss, gradient norm) of a step, the same on every rank  ->  reason to leave it out, or none
                                                             ->  counted; too many in a row: the end

Every rank judges by the same numbers, so all leave out the same steps.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from geneformer_mcore.config.sections import NonFinite, Precision, TrainConfig


class TooManySkippedUpdatesError(RuntimeError):
    """The settings allow no further update to be left out. No weight was changed by this one."""


@dataclass
class _Recent:
    """The last `size` values of one kind, for their mean and standard deviation."""

    values: deque[float]

    @property
    def is_full(self) -> bool:
        return len(self.values) == self.values.maxlen

    def sigmas_above(self, value: float) -> float:
        """How many standard deviations `value` lies above the mean."""
        count = len(self.values)
        mean = math.fsum(self.values) / count
        variance = math.fsum((each - mean) ** 2 for each in self.values) / count
        return (value - mean) / max(math.sqrt(variance), 1e-12 * max(1.0, abs(mean)))


class SpikeGuard:
    """Judges steps; a state of a few numbers, which a checkpoint holds.

    skipped:  updates left out since step 0
    in_a_row: of these, how many since the last one that was made
    """

    def __init__(self, settings: TrainConfig) -> None:
        self.skipped = 0
        self.in_a_row = 0
        self._spike_sigma = settings.spike_sigma
        self._stops = settings.non_finite is NonFinite.stop
        self._is_scaled = settings.precision is Precision.fp16
        self._max_skips = settings.max_skips
        window = settings.spike_window
        self._recent = {name: _Recent(deque(maxlen=window)) for name in ("loss", "gradient norm")}

    def reason(self, loss: float, grad_norm: float) -> str:
        """Why the update of a step with these numbers must not be made; "" if it may.

        loss, grad_norm: nats per predicted gene (0 if there is none), before clipping
        """
        found = {"loss": loss, "gradient norm": grad_norm}
        for name, value in found.items():
            if not math.isfinite(value):
                return f"the {name} is not finite"
        return self._spike(found) if self._spike_sigma else ""

    def _spike(self, found: dict[str, float]) -> str:
        for name, value in found.items():
            recent = self._recent[name]
            if not recent.is_full:
                continue
            sigmas = recent.sigmas_above(value)
            if sigmas > self._spike_sigma:
                return (
                    f"the {name} is a spike, {sigmas:.1f} standard deviations above the mean of "
                    f"the last {len(recent.values)} updates"
                )
        return ""

    def made(self, loss: float, grad_norm: float) -> None:
        """An update was made."""
        self.in_a_row = 0
        if math.isfinite(loss):
            self._recent["loss"].values.append(loss)
            self._recent["gradient norm"].values.append(grad_norm)

    def left_out(self, what: str, loss: float, grad_norm: float) -> None:
        """An update was left out, `what` being told of it. Raises SkippedTooOftenError if the
        settings want the run to end at this one."""
        # An infinite gradient of a scaled loss is how the scale learns that it is too large.
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

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        recent = {name: list(each.values) for name, each in self._recent.items()}
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where `state_dict` left off; a shorter window keeps the newest values."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        for name, values in state["recent"].items():
            self._recent[name].values.extend(values)
