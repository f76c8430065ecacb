#!/usr/bin/env python
"""Pretrains Geneformer, or goes on where the run folder's newest checkpoint stands.

torchrun [--nproc_per_node=N] launch/pretrain.py [--config FILE] [--dry-run] [section.key=value]
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore import config as settings
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.commands import DEFECT, FINISHED, WRONG_INPUT, complain, tell
from geneformer_mcore.errors import ConfigError, DataError, GeneformerError
from geneformer_mcore.train.interruption import Interruption
from geneformer_mcore.train.run_folder import RunFolder

if TYPE_CHECKING:
    from geneformer_mcore.parallel.watch import LostRankError, Watch

_LAST_WORDS_S = 4.0
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
EXAMPLE = """example:
  torchrun --nproc_per_node=2 launch/pretrain.py --config configs/geneformer_10m.yaml \\
      data.store=stores/lung run.dir=runs/lung train.steps=1000

exit codes (also in RUN/outcome.json, since torchrun turns all but 0 into 1):
  0 finished   2 wrong settings or data   75 interrupted and saved, start again   1 defect
"""


def main() -> int:
    """Ends with the exit code of the run, which rank 0 also writes into outcome.json."""
    interruption = Interruption()
    arguments = _arguments()
    file, overrides = arguments.config or DEMO, arguments.settings
    try:
        config, text = settings.load(file, overrides)
        plan = settings.plan(config, _environment("WORLD_SIZE", 1))
    except GeneformerError as error:
        return _refuse_settings(error, settings.run_dir(file, overrides))
    if arguments.dry_run:
        return _show(text, plan, config.run.dir)
    ignore_known_warnings()
    # Only now what takes a second to import: a wrong setting is answered at once.
    from geneformer_mcore.parallel.watch import LostRankError, Watch

    folder = RunFolder(config.run.dir)
    watch = Watch(config.parallel.timeout_s, partial(_end_lost, folder))
    try:
        if _environment("RANK", 0) == 0:
            folder.open()
        with watch:
            code, reason = _train(config, text, plan, folder, interruption, watch)
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


def _end_lost(folder: RunFolder, loss: LostRankError) -> None:
    """Ends this process, whose main thread waits for a rank that will not come, or for a disk: that
    may keep this thread waiting, too."""
    at_last = threading.Timer(_LAST_WORDS_S, os._exit, [loss.code])
    at_last.daemon = True
    at_last.start()
    try:
        _tell_of_loss(folder, loss)
    finally:
        os._exit(loss.code)


def _tell_of_loss(folder: RunFolder, loss: LostRankError) -> None:
    if loss.tell:
        tell(f"error: {loss}")
        folder.take_over(loss.code, str(loss), loss.step)


def _train(
    config: settings.Config,
    text: str,
    plan: settings.Plan,
    folder: RunFolder,
    interruption: Interruption,
    watch: Watch,
) -> tuple[int, str]:
    _demo_store_hint(config)
    # Only now what takes seconds to import: a user's error is answered at once.
    from geneformer_mcore.parallel import device, groups
    from geneformer_mcore.train import data, loop, setup

    interruption.limit(config.train.max_minutes)
    # Making a flat copy takes as long as it takes; no other rank waits for this one yet.
    watch.doing("opening the cells", limit_s=math.inf)
    cells = data.open_cells(config)
    here = device.start()
    watch.doing("meeting the other ranks")
    backstop_s = 60 + config.parallel.timeout_s + config.checkpoint.deadline_s
    topology = groups.start(here, config.parallel, watch, backstop_s)
    run = setup.prepare(config, text, plan, folder, cells, here, topology, watch)
    folder.step = run.step
    try:
        code, reason = loop.train(run, interruption)
    finally:
        if run.sinks is not None:
            run.sinks.close()
    groups.stop()
    return code, reason


def _demo_store_hint(config: settings.Config) -> None:
    demo_store = settings.Config().data.store
    if config.data.store == demo_store and not Path(demo_store).exists():
        raise DataError(
            f"there is no token store at {demo_store}. `make demo` builds the demo's; your own is "
            "named by data.store=PATH and built by data_prep/build_store.py."
        )


def _show(text: str, plan: settings.Plan, run_dir: str) -> int:
    if _environment("RANK", 0) == 0:
        print(text, end="")
        # Interpolations in the text above are as they were written; a launcher needs the folder.
        print(f"# run folder: {Path(run_dir).absolute()}")
        for name, value in vars(plan).items():
            print(f"# {name}: {value}")
    return FINISHED


def _refuse_settings(error: GeneformerError, run_dir: str) -> int:
    """A run that is there already must not keep the outcome of its last start."""
    complain(error)
    if _environment("RANK", 0) == 0 and Path(run_dir).is_dir():
        try:
            folder = RunFolder(run_dir)
            folder.open()
            folder.close(WRONG_INPUT, str(error))
        except GeneformerError:
            pass  # in use, or not to be written: the first message is the one that matters
    return WRONG_INPUT


def _environment(name: str, default: int) -> int:
    """What torchrun says; the default for a plain `python`."""
    return int(os.environ.get(name, default))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pretrain Geneformer; continues the run in run.dir if there is one.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file; default: configs/demo.yaml")
    parser.add_argument("--dry-run", action="store_true", help="show the settings and stop")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
