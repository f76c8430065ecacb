"""The trainer: a run from its settings to its last step, the same for every task.

job.ended: run directory, watchdog, outcome.json
  train:   task, ranks  ->  setup.prepare: model, optimizer, feed, newest valid checkpoint
    train_loop:   while step < steps:  wait for cells, step, meter
                  -> every N steps log, validate, save  ->  finished, or interrupted and saved
      _step:      one global batch  ->  step.train_step: forward, backward, update
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from torch.profiler import record_function

from geneformer_mcore.backends import describe
from geneformer_mcore.checkpoint.record import Record
from geneformer_mcore.config import Config, Plan
from geneformer_mcore.data.loader import steps_on_device
from geneformer_mcore.distributed import collectives, device, groups
from geneformer_mcore.exit_codes import FINISHED, INTERRUPTED, Interrupted
from geneformer_mcore.optim.optimizer import learning_rate
from geneformer_mcore.training import setup
from geneformer_mcore.training.profiler import Profile
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.training.setup import Run
from geneformer_mcore.training.signals import Interruption
from geneformer_mcore.training.step import StepResult, train_step
from geneformer_mcore.types import Batch

if TYPE_CHECKING:
    from geneformer_mcore.distributed.watchdog import Watchdog
    from geneformer_mcore.training.task import Task

_WATCH_LATER_S = 5.0


def train(
    config: Config,
    text: str,
    plan: Plan,
    folder: RunFolder,
    interruption: Interruption,
    watch: Watchdog,
    open_task: Callable[[], Task],
    after: Callable[[], None] | None = None,
) -> tuple[int, str]:
    """Train to the end, or until asked to stop: exit code and reason.

    open_task: opens the cells and returns the task, before the rendezvous
    after: called on all ranks once a run is finished and its model freed. A signal ends it, and
        the next start does it again
    """
    interruption.limit(config.train.max_minutes)
    # A flat copy may take long; no other rank waits for this one yet.
    watch.doing("opening the cells", limit_s=math.inf)
    task = open_task()
    here = device.start()
    watch.doing("waiting for the other ranks")
    backstop_s = 60 + config.parallel.timeout_s + config.checkpoint.deadline_s
    topology = groups.start(here, config.parallel, watch, backstop_s)
    # Readers of checkpoints would take an exception for damage: from here on signals are noted.
    interruption.note_only()
    run = setup.prepare(config, text, plan, folder, task, here, topology, watch)
    folder.step = run.step
    try:
        code, reason = train_loop(run, interruption)
    finally:
        if run.sinks is not None:
            run.sinks.close()
    if after is not None and code == FINISHED:
        groups.stop(stay=True)
        watch.doing("using the finished model", limit_s=math.inf)
        del run, task
        gc.collect()  # hooks and the saver hold them in cycles
        code, reason = _unless_interrupted(interruption, after, reason)
    groups.stop()
    return code, reason


def _unless_interrupted(
    interruption: Interruption, after: Callable[[], None], reason: str
) -> tuple[int, str]:
    try:
        with interruption.raising("the last step is done, and not all that follows it"):
            after()
    except Interrupted as stop:
        return INTERRUPTED, str(stop)
    return FINISHED, reason


def train_loop(run: Run, interruption: Interruption) -> tuple[int, str]:
    """Run to the last step, or until asked to stop. Returns the exit code and the reason.
    Raises TooManySkippedUpdatesError, SaveDeadlineError or CheckpointError if it can do neither."""
    config, steps = run.config, run.config.train.steps
    if run.step >= steps:
        return FINISHED, _finished(run)
    prefetch = config.data.prefetch_steps
    feed = steps_on_device(run.feed, run.cells_seen, prefetch, run.device)
    traces, num_steps = run.folder.path / "profile", config.train.profile_steps
    profile = Profile(traces, num_steps, run.topology.rank, run.device, run.log)
    saved_at = run.step
    with closing(feed), profile:  # type: ignore[type-var]
        while run.step < steps:
            if _agreed_to_stop(run, interruption):
                if run.step > saved_at:
                    _save(run)
                _finish_saving(run)
                return INTERRUPTED, _interrupted(run, interruption)
            profile.before_step()
            result = _step(run, feed)
            if profile.is_complete:
                run.watch.doing("writing a profile", run.step, config.checkpoint.deadline_s)
                profile.write(run.step)
            val_loss = None
            if _due(run.step, config.metrics.log_every_steps, steps):
                _log(run, result)
            if _due(run.step, config.train.validate_every_steps, steps):
                val_loss = _validate(run)
            if _due(run.step, config.checkpoint.save_every_steps, steps, always_last=True):
                _save(run, val_loss)
                saved_at = run.step
        _finish_saving(run)
    return FINISHED, f"all {steps} steps done"


def _finished(run: Run) -> str:
    """Log that there is nothing left to do. TooManySkippedUpdatesError if nothing was learned."""
    run.guard.check_learned(run.step)
    reason = f"the run is finished: it has made {run.step} of {run.config.train.steps} steps"
    run.log(reason)
    return reason


def _agreed_to_stop(run: Run, interruption: Interruption) -> bool:
    """Whether any rank was asked to stop; a checkpoint in progress proceeds, too."""
    run.watch.doing("agreeing whether to go on", run.step)
    asked = interruption.reason is not None
    stop, busy = collectives.any_rank_each([asked, run.saver.is_busy], run.device)
    if run.saver.is_going_on and not busy:
        run.saver.proceed()
    return stop


def _interrupted(run: Run, interruption: Interruption) -> str:
    asked = interruption.reason or "another rank was asked to stop"
    where = f"saved at step {run.step} of {run.config.train.steps}"
    if run.step == 0:
        where = "no step was made, so there is nothing to save"
    reason = f"{asked}; {where}"
    run.log(f"interrupted by {reason}; the same command continues")
    return reason


def _due(step: int, every: int, steps: int, always_last: bool = False) -> bool:
    last = step == steps and (always_last or every > 0)
    return last or (every > 0 and step % every == 0)


def _step(run: Run, feed: Iterator[list[Batch]]) -> StepResult:
    began = time.perf_counter()
    run.watch.doing("waiting for the next cells", run.step)
    with record_function("wait for cells"):
        batches = next(feed)
    waited = time.perf_counter() - began
    run.watch.doing("forward, backward and update", run.step)
    lr = _learning_rate(run)
    result = train_step(run.trainable, batches, lr, run.topology, run.guard.reason)
    if result.updated:
        run.guard.made(result.totals.loss, result.grad_norm)
    else:
        _leave_out(run, result)
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
    if run.step == run.config.train.steps:
        run.guard.check_learned(run.step)  # before a checkpoint calls the run finished
    return result


def _learning_rate(run: Run, step: int | None = None) -> float:
    plan, config = run.plan, run.config
    step = run.step if step is None else step
    return learning_rate(step, config.train.steps, plan.warmup_steps, plan.hold_steps, config.optim)


def _leave_out(run: Run, result: StepResult) -> None:
    """Report a skipped update. Raises TooManySkippedUpdatesError if that was one too many."""
    run.watch.doing("reporting a skipped update", run.step)
    first, size = run.cells_seen, run.config.train.global_batch_size
    what = (
        f"step {run.step + 1}: {result.left_out}; loss {result.totals.loss}, gradient norm "
        f"{result.grad_norm}; no weight was changed. Cells {first} to {first + size - 1} of the "
        "stream"
    )
    if run.is_first_rank:
        rows, epochs = run.feed.order.rows(first, first + size)
        run.folder.write_skipped(
            {
                "step": run.step + 1,
                "reason": result.left_out,
                "loss": str(result.totals.loss),
                "grad_norm": str(result.grad_norm),
                "position": first,
                "epoch": int(epochs[0]),
                "cells": run.task.cells.names(rows),
            }
        )
        what += f", named in {run.folder.path / 'skipped.jsonl'}"
    # If this ends the run, no rank ends before it is reported.
    collectives.barrier()
    # Nothing predicted: that is no number at all, which `non_finite` is about.
    loss = result.totals.loss if result.totals.num_predicted else 0.0
    run.guard.left_out(what, loss, result.grad_norm)
    run.log(f"left out {what}")


def _log(run: Run, result: StepResult) -> None:
    lr = _learning_rate(run, run.step - 1)
    record = run.meter.record(step=run.step, grad_norm=result.grad_norm, lr=lr)
    if run.sinks is not None:
        run.sinks.write(record | {"skipped_updates": run.guard.skipped})


def _validate(run: Run) -> float | None:
    """The validation loss, in the unit of the training loss; None if the run does not validate, or
    where it overflows."""
    if run.held_out is None:
        return None
    begun = partial(run.watch.doing, "validating", run.step)
    is_last = run.step == run.config.train.steps
    found = run.held_out.evaluate(run.trainable, is_last, begun)
    if run.sinks is not None:
        run.sinks.write({"step": run.step, **found})
    val_loss = found["val_loss"]
    return val_loss if math.isfinite(val_loss) else None  # of which none is the best


def _save(run: Run, val_loss: float | None = None) -> None:
    """Begin a checkpoint, and write it unless that is done asynchronously."""
    _watch_saving(run)
    record = Record(
        step=run.step,
        cells_seen=run.cells_seen,
        meters=run.meter.state_dict(),
        identity=run.identity(),
        layout=run.layout(),
        versions=describe(),
        guard=run.guard.state_dict(),
        val_loss=val_loss,
    )
    run.saver.begin(run.trainable, record)


def _finish_saving(run: Run) -> None:
    _watch_saving(run)
    run.saver.finish()


def _watch_saving(run: Run) -> None:
    # The saver enforces the limit itself; the watchdog is for a rank that cannot.
    limit_s = run.config.checkpoint.deadline_s + _WATCH_LATER_S
    run.watch.doing("saving a checkpoint", run.step, limit_s)
