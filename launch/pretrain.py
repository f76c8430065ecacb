#!/usr/bin/env python
"""Pretrains Geneformer, or goes on where the run folder's newest checkpoint stands.

torchrun [--nproc_per_node=N] launch/pretrain.py [--config FILE] [--dry-run] [section.key=value]
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from geneformer_mcore import config as settings
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import DataError, GeneformerError
from geneformer_mcore.train.run_folder import DEFECT, WRONG_INPUT, RunFolder

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
EXAMPLE = """example:
  torchrun --nproc_per_node=2 launch/pretrain.py --config configs/geneformer_10m.yaml \\
      data.store=stores/lung run.dir=runs/lung train.steps=1000

exit codes (also in RUN/outcome.json, since torchrun turns all but 0 into 1):
  0 finished   2 wrong settings or data   75 interrupted and saved, start again   1 defect
"""


def main() -> int:
    arguments = _arguments()
    first = os.environ.get("RANK", "0") == "0"
    try:
        config, text = settings.load(arguments.config or DEMO, arguments.settings)
    except GeneformerError as error:
        return _refuse(error, first)
    if arguments.dry_run:
        return _dry_run(config, text)
    ignore_known_warnings()
    folder = RunFolder(config.run.dir)
    try:
        if first:
            folder.open()
        code, reason = _train(config, text, folder)
    except GeneformerError as error:
        code, reason = _refuse(error, first), str(error)
    except BaseException as error:
        traceback.print_exc()
        code, reason = DEFECT, f"{type(error).__name__}: {error}"
    folder.close(code, reason)
    return code


def _train(config: settings.Config, text: str, folder: RunFolder) -> tuple[int, str]:
    plan = settings.plan(config, _world_size())
    _demo_store_hint(config)
    # Only now what takes seconds to import: a user's error is answered at once.
    from geneformer_mcore.parallel import device, groups
    from geneformer_mcore.train import loop, setup

    store = setup.open_store(config)
    here = device.start()
    topology = groups.start(here, config.parallel)
    run = setup.prepare(config, text, plan, folder, store, here, topology)
    folder.step = run.step
    try:
        code, reason = loop.train(run)
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


def _dry_run(config: settings.Config, text: str) -> int:
    try:
        plan = settings.plan(config, _world_size())
    except GeneformerError as error:
        return _refuse(error, os.environ.get("RANK", "0") == "0")
    if os.environ.get("RANK", "0") == "0":
        print(text, end="")
        for name, value in vars(plan).items():
            print(f"# {name}: {value}")
    return 0


def _world_size() -> int:
    """Ranks that torchrun started; 1 for a plain `python`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _refuse(error: GeneformerError, first: bool) -> int:
    if first:
        print(f"error: {error}", file=sys.stderr)
    return WRONG_INPUT


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
