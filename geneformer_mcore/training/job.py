"""A training command: settings refused or shown, the run directory, and the exit code.

    settings  ->  ended: run directory, watchdog  ->  trainer.train  ->  exit code, outcome.json

Light to import: heavy packages are imported once the settings are valid.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore.config import Config, Plan
from geneformer_mcore.errors import ConfigError, GeneformerError
from geneformer_mcore.exit_codes import (
    DEFECT,
    FINISHED,
    INTERRUPTED,
    WRONG_INPUT,
    Interrupted,
    end_after_last_words,
    print_stderr,
    report_error,
)
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.training.signals import Interruption

if TYPE_CHECKING:
    from geneformer_mcore.distributed.watchdog import LostRankError, Watchdog

_NOTHING_DONE = "no step was made by this start, so there is nothing to save"


def environment(name: str, default: int) -> int:
    """A number set by torchrun, or the default."""
    return int(os.environ.get(name, default))


def num_ranks(dry_run: bool) -> int:
    """Ranks of this job. WORLD_SIZE without RANK is a question to --dry-run, else a left-over."""
    return environment("WORLD_SIZE", 1) if dry_run or "RANK" in os.environ else 1


def ended(
    config: Config,
    interruption: Interruption,
    work: Callable[[RunFolder, Watchdog], tuple[int, str]],
) -> int:
    """Do `work`; rank 0 always writes its exit code and reason into outcome.json."""
    folder = RunFolder(config.run.dir)
    interruption.end_by(partial(_end_stuck, folder), config.parallel.timeout_s)
    lost: tuple[type[LostRankError], ...] = ()
    try:
        with interruption.raising(_NOTHING_DONE):
            if environment("RANK", 0) == 0:
                folder.open()
            # Imported late, so that a wrong setting is reported at once.
            from geneformer_mcore.distributed import watchdog

            lost, limit_s = (watchdog.LostRankError,), config.parallel.timeout_s
            with watchdog.Watchdog(limit_s, partial(_end_lost, folder)) as watch:
                code, reason = work(folder, watch)
    except Interrupted as stop:
        code, reason = INTERRUPTED, str(stop)
        _tell_of_interruption(code, reason)
    except GeneformerError as error:
        code, reason = report_error(error), str(error)
    except lost as error:
        code, reason = error.code, str(error)
        _tell_of_loss(folder, error)
    except BaseException as error:
        code, reason = DEFECT, f"{type(error).__name__}: {error}"
        traceback.print_exc()
    try:
        folder.close(code, reason)
    except ConfigError as error:  # a disk that is read-only now
        print_stderr(f"outcome.json still says 'running': {error}")
    interruption.over()
    return code


def refuse_settings(error: GeneformerError, run_dir: str) -> int:
    """Report the error, in outcome.json, too, if the run directory exists."""
    report_error(error)
    if environment("RANK", 0) == 0 and Path(run_dir).is_dir():
        try:
            folder = RunFolder(run_dir)
            folder.open()
            folder.close(WRONG_INPUT, str(error))
        except GeneformerError:
            pass  # in use or not writable: the first message matters
    return WRONG_INPUT


def show(text: str, plan: Plan, run_dir: str) -> int:
    """--dry-run: print the settings and what follows from them."""
    if environment("RANK", 0) == 0:
        print(text, end="")
        # Interpolations in the text are unresolved; a launcher needs the folder.
        print(f"# run folder: {Path(run_dir).absolute()}")
        for name, value in vars(plan).items():
            print(f"# {name}: {value}")
    return FINISHED


def _end_lost(folder: RunFolder, loss: LostRankError) -> None:
    end_after_last_words(loss.code, partial(_tell_of_loss, folder, loss))


def _end_stuck(folder: RunFolder, code: int, reason: str) -> None:
    end_after_last_words(code, partial(_close_stuck, folder, code, reason))


def _close_stuck(folder: RunFolder, code: int, reason: str) -> None:
    if not _tell_of_interruption(code, reason) and environment("LOCAL_RANK", 0) == 0:
        print_stderr(f"error: {reason}")
    folder.close(code, reason)


def _tell_of_interruption(code: int, reason: str) -> bool:
    if code == INTERRUPTED and environment("RANK", 0) == 0:
        print(f"interrupted by {reason}; the same command continues", flush=True)
    return code == INTERRUPTED


def _tell_of_loss(folder: RunFolder, loss: LostRankError) -> None:
    if loss.tell:
        if not _tell_of_interruption(loss.code, str(loss)):
            print_stderr(f"error: {loss}")
        folder.take_over(loss.code, str(loss), loss.step)
