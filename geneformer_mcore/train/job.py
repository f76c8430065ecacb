"""A training command from its settings to its exit code, the same for every task.

settings -> run folder, lookout -> task, ranks, model, newest checkpoint -> loop -> [after]
         -> exit code, outcome.json

Light to import: what takes seconds comes in once the settings are known to be right.
"""

from __future__ import annotations

import gc
import math
import os
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore.commands import (
    DEFECT,
    FINISHED,
    INTERRUPTED,
    WRONG_INPUT,
    complain,
    end_after_last_words,
    tell,
)
from geneformer_mcore.config import Config, Plan
from geneformer_mcore.errors import ConfigError, GeneformerError
from geneformer_mcore.train.interruption import Interrupted, Interruption
from geneformer_mcore.train.run_folder import RunFolder

if TYPE_CHECKING:
    from geneformer_mcore.parallel.watch import LostRankError, Watch
    from geneformer_mcore.train.task import Task


def environment(name: str, default: int) -> int:
    """What torchrun says; the default for a plain `python`."""
    return int(os.environ.get(name, default))


def ended(
    config: Config,
    interruption: Interruption,
    work: Callable[[RunFolder, Watch], tuple[int, str]],
) -> int:
    """Does `work` in the run's folder, which gives exit code and reason; rank 0 writes both into
    outcome.json, whatever happens."""
    # Only now what takes a second to import: a wrong setting is answered at once.
    from geneformer_mcore.parallel.watch import LostRankError, Watch

    folder = RunFolder(config.run.dir)
    watch = Watch(config.parallel.timeout_s, partial(_end_lost, folder))
    try:
        if environment("RANK", 0) == 0:
            folder.open()
        with watch:
            code, reason = work(folder, watch)
    except GeneformerError as error:
        code, reason = complain(error), str(error)
    except LostRankError as error:
        code, reason = error.code, str(error)
        _tell_of_loss(folder, error)
    except BaseException as error:
        code, reason = DEFECT, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    try:
        folder.close(code, reason)
    except ConfigError as error:  # a disk that is read-only now
        tell(f"outcome.json still says 'running': {error}")
    interruption.over()
    return code


def train(
    config: Config,
    text: str,
    plan: Plan,
    folder: RunFolder,
    interruption: Interruption,
    watch: Watch,
    open_task: Callable[[], Task],
    after: Callable[[], None] | None = None,
) -> tuple[int, str]:
    """Trains to the end, or until asked to stop: exit code and reason.

    open_task: opens the cells and says what is learned of them, before the ranks meet
    after: called on all ranks once a run is finished; the ranks are together, and the model that
        was trained takes no memory any more. A signal ends it, and the next start does it again
    """
    # Only now what takes seconds to import: a user's error is answered at once.
    from geneformer_mcore.parallel import device, groups
    from geneformer_mcore.train import loop, setup

    interruption.limit(config.train.max_minutes)
    # Making a flat copy takes as long as it takes; no other rank waits for this one yet.
    watch.doing("opening the cells", limit_s=math.inf)
    task = open_task()
    here = device.start()
    watch.doing("meeting the other ranks")
    backstop_s = 60 + config.parallel.timeout_s + config.checkpoint.deadline_s
    topology = groups.start(here, config.parallel, watch, backstop_s)
    run = setup.prepare(config, text, plan, folder, task, here, topology, watch)
    folder.step = run.step
    try:
        code, reason = loop.train(run, interruption)
    finally:
        if run.sinks is not None:
            run.sinks.close()
    if after is not None and code == FINISHED:
        groups.stop(stay=True)
        watch.doing("using the finished model", limit_s=math.inf)
        del run, task
        gc.collect()  # hooks and the saver hold on to them in circles
        code, reason = _unless_interrupted(interruption, after, reason)
    groups.stop()
    return code, reason


def _unless_interrupted(
    interruption: Interruption, after: Callable[[], None], reason: str
) -> tuple[int, str]:
    try:
        interruption.raise_from_now()
        after()
    except Interrupted as stop:
        return INTERRUPTED, f"{stop} after the last step, before all that follows it was done"
    finally:
        interruption.note_only()
    return FINISHED, reason


def refuse_settings(error: GeneformerError, run_dir: str) -> int:
    """Tells what is wrong. A run that is there already must not keep the outcome of its last
    start."""
    complain(error)
    if environment("RANK", 0) == 0 and Path(run_dir).is_dir():
        try:
            folder = RunFolder(run_dir)
            folder.open()
            folder.close(WRONG_INPUT, str(error))
        except GeneformerError:
            pass  # in use, or not to be written: the first message is the one that matters
    return WRONG_INPUT


def show(text: str, plan: Plan, run_dir: str) -> int:
    """--dry-run: the settings and what follows from them."""
    if environment("RANK", 0) == 0:
        print(text, end="")
        # Interpolations in the text above are as they were written; a launcher needs the folder.
        print(f"# run folder: {Path(run_dir).absolute()}")
        for name, value in vars(plan).items():
            print(f"# {name}: {value}")
    return FINISHED


def _end_lost(folder: RunFolder, loss: LostRankError) -> None:
    end_after_last_words(loss.code, partial(_tell_of_loss, folder, loss))


def _tell_of_loss(folder: RunFolder, loss: LostRankError) -> None:
    if loss.tell:
        tell(f"error: {loss}")
        folder.take_over(loss.code, str(loss), loss.step)
