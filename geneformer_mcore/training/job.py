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
    WRONG_INPUT,
    end_after_last_words,
    print_stderr,
    report_error,
)
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.training.signals import Interruption

if TYPE_CHECKING:
    from geneformer_mcore.distributed.watchdog import LostRankError, Watchdog


def environment(name: str, default: int) -> int:
    """A number set by torchrun, or the default."""
    return int(os.environ.get(name, default))


def ended(
    config: Config,
    interruption: Interruption,
    work: Callable[[RunFolder, Watchdog], tuple[int, str]],
) -> int:
    """Do `work`; rank 0 always writes its exit code and reason into outcome.json."""
    # Imported late, so that a wrong setting is reported at once.
    from geneformer_mcore.distributed.watchdog import LostRankError, Watchdog

    folder = RunFolder(config.run.dir)
    watch = Watchdog(config.parallel.timeout_s, partial(_end_lost, folder))
    try:
        if environment("RANK", 0) == 0:
            folder.open()
        with watch:
            code, reason = work(folder, watch)
    except GeneformerError as error:
        code, reason = report_error(error), str(error)
    except LostRankError as error:
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


def _tell_of_loss(folder: RunFolder, loss: LostRankError) -> None:
    if loss.tell:
        print_stderr(f"error: {loss}")
        folder.take_over(loss.code, str(loss), loss.step)
