"""From steps to the lines of metrics.jsonl: sums over a window, divided once.

    add(step) add(step) ... add(step) -> record() -> add(step) ...
    `------------- window ---------'  loss, rates   new window; cells and tokens seen go on

Sums are over all data-parallel ranks. Rates in cells and tokens are the job's; TFLOPS and MFU are
per rank (per GPU).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.io.schema import Count, as_type
from geneformer_mcore.model.flops import (
    ModelShape,
    Workload,
    executed_flops,
    padded_equivalent_flops,
)

if TYPE_CHECKING:
    import torch

FLOPS_PER_TFLOPS = 1e12


@dataclass
class Window:
    """Sums since the last record."""

    steps: int = 0
    loss_sum: float = 0.0
    num_predicted: int = 0
    cells: int = 0
    tokens: int = 0
    sum_squared_lengths: int = 0
    data_wait_s: float = 0.0
    step_s: float = 0.0


@dataclass
class _State:
    cells_seen: Count
    tokens_seen: Count
    window: Window


class Meter:
    """Accumulates steps into one record per log step.

    shape, seq_length    of the model and a full cell, for FLOPs; without a shape there are none
    world_size           by which TFLOPS are divided
    peak_flops_per_s     of one rank's device, for MFU; None if unknown
    """

    def __init__(
        self,
        shape: ModelShape | None,
        seq_length: int,
        world_size: int,
        peak_flops_per_s: float | None = None,
    ) -> None:
        self.shape = shape
        self.seq_length = seq_length
        self.world_size = world_size
        self.peak_flops_per_s = peak_flops_per_s
        self.cells_seen = 0
        self.tokens_seen = 0
        self._window = Window()

    def add(
        self,
        *,
        loss_sum: float | torch.Tensor,
        num_predicted: int | torch.Tensor,
        cells: int,
        tokens: int,
        sum_squared_lengths: int,
        data_wait_s: float,
        step_s: float,
        steps: int = 1,
    ) -> None:
        """Add one step, or the sums of `steps` steps.

        loss_sum             nats over the predicted positions; a 0-d tensor is added on its device
                             and read only by `record` and `state_dict`
        num_predicted        predicted positions, a number or a 0-d tensor
        cells, tokens        [CLS] counted, padding not
        sum_squared_lengths  sum over cells of (tokens of the cell)^2
        data_wait_s          part of step_s spent waiting for the batch
        step_s               seconds of wait, forward, backward and update; logging, validation and
                             saving are not in it, nor in the rates
        """
        window = self._window
        window.steps += steps
        # Not `+=`, which would change the caller's tensor.
        window.loss_sum = window.loss_sum + loss_sum  # type: ignore[assignment]
        window.num_predicted = window.num_predicted + num_predicted  # type: ignore[assignment]
        window.cells += cells
        window.tokens += tokens
        window.sum_squared_lengths += sum_squared_lengths
        window.data_wait_s += data_wait_s
        window.step_s += step_s
        self.cells_seen += cells
        self.tokens_seen += tokens

    def record(self, *, step: int, grad_norm: float, lr: float) -> dict[str, Any]:
        """The line of metrics.jsonl for the window; starts a new one.

        loss         nats per predicted position, or None
        grad_norm    of the last step, before clipping
        cells_seen, tokens_seen    since step 0, restarts included
        cells_per_s, tokens_per_s  of the whole job
        tflops_padded_equivalent, tflops_executed    10^12 FLOP/s per rank, or None (model/flops.py)
        mfu          tflops_executed / the device's peak, as a fraction, or None
        data_wait_fraction, step_s    share of the time waiting for a batch; mean seconds per step
        """
        window = self._read()
        assert window.steps > 0, "a record needs a step"
        self._window = Window()
        seconds = max(window.step_s, 1e-9)
        executed = self._executed_tflops(window, seconds)
        peak = self.peak_flops_per_s
        return {
            "step": step,
            "loss": window.loss_sum / window.num_predicted if window.num_predicted else None,
            "grad_norm": grad_norm,
            "lr": lr,
            "cells_seen": self.cells_seen,
            "tokens_seen": self.tokens_seen,
            "cells_per_s": window.cells / seconds,
            "tokens_per_s": window.tokens / seconds,
            "tflops_padded_equivalent": self._padded_tflops(window, seconds),
            "tflops_executed": executed,
            "mfu": executed * FLOPS_PER_TFLOPS / peak if peak and executed is not None else None,
            "data_wait_fraction": window.data_wait_s / seconds,
            "step_s": window.step_s / window.steps,
        }

    def state_dict(self) -> dict[str, Any]:
        """Totals and the open window as plain JSON, for a checkpoint."""
        self._window = self._read()
        return {
            "cells_seen": self.cells_seen,
            "tokens_seen": self.tokens_seen,
            "window": asdict(self._window),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError unless `state` is of `state_dict`."""
        remedy = "take another checkpoint"
        found = as_type(state, _State, "the record's meters", remedy, CheckpointError)
        self.cells_seen, self.tokens_seen = found.cells_seen, found.tokens_seen
        self._window = found.window

    def _read(self) -> Window:
        """The window in plain numbers; waits for the device."""
        window = self._window
        window.loss_sum = float(window.loss_sum)
        window.num_predicted = int(window.num_predicted)
        return window

    def _padded_tflops(self, window: Window, seconds: float) -> float | None:
        if self.shape is None:
            return None
        flops = padded_equivalent_flops(self.shape, self.seq_length, window.cells)
        return flops / seconds / self.world_size / FLOPS_PER_TFLOPS

    def _executed_tflops(self, window: Window, seconds: float) -> float | None:
        if self.shape is None:
            return None
        work = Workload(window.tokens, window.sum_squared_lengths, window.num_predicted)
        return executed_flops(self.shape, work) / seconds / self.world_size / FLOPS_PER_TFLOPS
