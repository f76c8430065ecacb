"""The training loop.

restore -> feed from the position -> while step < steps: wait for data, step, meter
        -> every N steps log, validate, save -> finished, or interrupted and saved
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing

from geneformer_mcore.backends import describe
from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import state
from geneformer_mcore.checkpoint.record import Record
from geneformer_mcore.commands import FINISHED, INTERRUPTED
from geneformer_mcore.config.sections import NonFinite
from geneformer_mcore.contracts import Batch
from geneformer_mcore.feed.loader import Feed
from geneformer_mcore.feed.transfer import steps_on_device
from geneformer_mcore.optim.schedule import learning_rate
from geneformer_mcore.parallel import collectives
from geneformer_mcore.train.evaluate import evaluate
from geneformer_mcore.train.interruption import Interruption
from geneformer_mcore.train.setup import Run
from geneformer_mcore.train.step import StepResult, Totals, train_step


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite and the settings say to stop. No weight changed."""


def train(run: Run, interruption: Interruption) -> tuple[int, str]:
    """Runs to the last step, or until asked to stop. Returns the exit code and the reason."""
    config, steps = run.config, run.config.train.steps
    if run.step >= steps:
        reason = f"the run is finished: it has made {run.step} of {steps} steps"
        run.say(reason)
        return FINISHED, reason
    prefetch = config.data.prefetch_steps
    feed = steps_on_device(run.feed, run.cells_seen, prefetch, run.device)
    saved_at = run.step
    with closing(feed):  # type: ignore[type-var]
        while run.step < steps:
            stop = collectives.any_rank(interruption.reason is not None, run.device)
            if stop:
                if run.step > saved_at:
                    save(run)
                return INTERRUPTED, _interrupted(run, interruption)
            result = _step(run, feed)
            if _due(run.step, config.metrics.log_every_steps, steps):
                _log(run, result)
            if _due(run.step, config.train.validate_every_steps, steps):
                _validate(run)
            if _due(run.step, config.checkpoint.save_every_steps, steps, always_last=True):
                save(run)
                saved_at = run.step
    return FINISHED, f"all {steps} steps done"


def _interrupted(run: Run, interruption: Interruption) -> str:
    asked = interruption.reason or "another rank was asked to stop"
    reason = f"{asked}; saved at step {run.step} of {run.config.train.steps}"
    run.say(f"interrupted by {reason}; the same command continues")
    return reason


def _due(step: int, every: int, steps: int, always_last: bool = False) -> bool:
    last = step == steps and (always_last or every > 0)
    return last or (every > 0 and step % every == 0)


def _step(run: Run, feed: Iterator[list[Batch]]) -> StepResult:
    began = time.perf_counter()
    batches = next(feed)
    waited = time.perf_counter() - began
    result = train_step(run.trainable, batches, _learning_rate(run), run.topology)
    if not result.updated:
        _refuse(run, result, batches)
    run.step += 1
    run.folder.step = run.step
    cells = run.config.train.global_batch_size
    run.cells_seen += cells
    totals = result.totals
    run.meter.add(
        # A skipped step counts its work but not its loss.
        loss_sum=totals.loss_sum if result.updated else 0.0,
        num_predicted=totals.num_predicted if result.updated else 0,
        cells=cells,
        tokens=totals.num_tokens,
        sum_squared_lengths=totals.sum_squared_lengths,
        data_wait_s=waited,
        step_s=time.perf_counter() - began,
    )
    return result


def _learning_rate(run: Run, step: int | None = None) -> float:
    plan, config = run.plan, run.config
    step = run.step if step is None else step
    return learning_rate(step, config.train.steps, plan.warmup_steps, plan.hold_steps, config.optim)


def _refuse(run: Run, result: StepResult, batches: list[Batch]) -> None:
    first_keys = [int(key) for batch in batches for key in batch.keys_B][:8]
    what = (
        f"step {run.step + 1}: loss {result.totals.loss}, gradient norm {result.grad_norm}; "
        f"no weight was changed. Position {run.cells_seen}, first cell keys {first_keys}"
    )
    if run.config.train.non_finite is NonFinite.stop:
        raise NonFiniteError(f"{what}. train.non_finite=skip would leave out such steps.")
    run.say(f"skipped {what}")


def _log(run: Run, result: StepResult) -> None:
    lr = _learning_rate(run, run.step - 1)
    record = run.meter.record(step=run.step, grad_norm=result.grad_norm, lr=lr)
    if run.sinks is not None:
        run.sinks.write(record)


def _validate(run: Run) -> None:
    if run.validation is None:
        return
    totals = _evaluate(run, run.validation)
    assert not math.isnan(totals.loss), "validation predicted nothing"
    record = {
        "step": run.step,
        "val_loss": totals.loss,
        "val_loss_cell_mean": totals.cell_mean,
        "val_cells": totals.num_cells,
        "val_predicted": totals.num_predicted,
    }
    if run.control is not None and run.step == run.config.train.steps:
        record["val_loss_shuffled_genes"] = _evaluate(run, run.control).loss
    if run.sinks is not None:
        run.sinks.write(record)


def _evaluate(run: Run, feed: Feed) -> Totals:
    limit = run.config.train.validate_batches
    return evaluate(run.trainable, feed, limit, run.topology, run.device)


def save(run: Run) -> None:
    """Writes and commits a checkpoint of this moment; all ranks call it together."""
    root = run.folder.checkpoints
    staging = root / f".staging_step_{run.step:010d}"
    if run.is_first_rank:
        staging = checkpoints.make_staging(root, run.step)
    collectives.barrier()
    state.save(run.trainable, staging, run.topology.rank)
    meters = run.meter.state_dict()
    collectives.barrier()
    if run.is_first_rank:
        _record(run, meters).save(staging)
        final = checkpoints.commit(staging, root, run.step)
        keep = run.config.checkpoint
        checkpoints.retain(root, keep.keep_last, keep.keep_every)
        run.say(f"saved {final}")
    collectives.barrier()


def _record(run: Run, meters: dict) -> Record:
    return Record(
        step=run.step,
        cells_seen=run.cells_seen,
        meters=meters,
        identity=run.identity(),
        layout=run.layout(),
        versions=describe(),
    )
