#!/usr/bin/env python
"""Pretrain Geneformer, or resume from the latest checkpoint in run.dir.

torchrun [--nproc_per_node=N] launch/pretrain.py [--config FILE] [--dry-run] [section.key=value]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore import config as settings
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import ConfigError, DataError, GeneformerError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.inference import options
from geneformer_mcore.training import job
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.training.signals import Interruption

if TYPE_CHECKING:
    from geneformer_mcore.distributed.watchdog import Watchdog
    from geneformer_mcore.training.task import Task

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
EXAMPLE = """example:
  torchrun --nproc_per_node=2 launch/pretrain.py --config configs/geneformer_10m.yaml \\
      data.store=stores/lung run.dir=runs/lung train.steps=1000

exit codes (also in RUN/outcome.json, since torchrun turns all but 0 into 1):
  0 finished   2 wrong settings or data   75 interrupted and saved, start again   1 internal error
"""


def main() -> int:
    """Return the exit code of the run, which rank 0 also writes into outcome.json."""
    interruption = Interruption()
    arguments = _arguments()
    file, overrides = arguments.config or DEMO, arguments.settings
    try:
        config, text = settings.load(file, overrides)
        _not_to_be_finetuned(config)
        plan = settings.plan(config, job.num_ranks(arguments.dry_run))
    except GeneformerError as error:
        return job.refuse_settings(error, settings.run_dir(file, overrides))
    if arguments.dry_run:
        return job.show(text, plan, config.run.dir)
    ignore_known_warnings()

    def work(folder: RunFolder, watch: Watchdog) -> tuple[int, str]:
        return _train(config, text, plan, folder, interruption, watch)

    return job.ended(config, interruption, work)


def _train(
    config: settings.Config,
    text: str,
    plan: settings.Plan,
    folder: RunFolder,
    interruption: Interruption,
    watch: Watchdog,
) -> tuple[int, str]:
    _check_demo_store(config)
    from geneformer_mcore.training import trainer

    open_task = partial(_pretraining, config)
    return trainer.train(config, text, plan, folder, interruption, watch, open_task)


def _pretraining(config: settings.Config) -> Task:
    from geneformer_mcore.training import datasets
    from geneformer_mcore.training.pretraining import Pretraining

    return Pretraining(config, datasets.open_cells(config))


def _check_demo_store(config: settings.Config) -> None:
    demo_store = settings.Config().data.store
    if config.data.store == demo_store and not Path(demo_store).exists():
        raise DataError(
            f"there is no token store at {demo_store}. `make demo` builds the demo's; your own is "
            "named by data.store=PATH and built by data_prep/build_store.py."
        )


def _not_to_be_finetuned(config: settings.Config) -> None:
    tune = config.finetune
    if tune != type(tune)():
        raise ConfigError(
            "finetune.* is for launch/finetune.py, and this is launch/pretrain.py, which would "
            "leave it unread. Remedy: use that command, or leave these settings out."
        )


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, EXAMPLE)
    parser.add_argument("--config", type=Path, help="YAML file; default: configs/demo.yaml")
    parser.add_argument("--dry-run", action="store_true", help="show the settings and stop")
    options.add(parser, "settings")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
