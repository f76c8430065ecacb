#!/usr/bin/env python
"""Fine-tune a pretrained model to classify cells, such as by cell type, and predict with it.

torchrun [--nproc_per_node=N] launch/finetune.py --checkpoint RUN --store STORE --label COLUMN
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore import config as settings
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import ConfigError, GeneformerError
from geneformer_mcore.exit_codes import report_on_first_rank, run
from geneformer_mcore.inference import options
from geneformer_mcore.training import job
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.training.signals import Interruption

if TYPE_CHECKING:
    from geneformer_mcore.distributed.watchdog import Watchdog
    from geneformer_mcore.inference.predict import PredictRequest
    from geneformer_mcore.training.task import Task

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "finetune.yaml"
EXAMPLE = """examples:
  torchrun --nproc_per_node=2 launch/finetune.py --checkpoint runs/lung --store stores/atlas \\
      --label cell_type run.dir=runs/types train.steps=500 optim.lr=1e-4
  ... finetune.frozen_layers=4                   the embedding and the first 4 layers stay
  ... finetune.lora_rank=8 optim.lr=1e-3         the encoder stays, corrections are trained
  python launch/finetune.py --checkpoint runs/types --predict new.h5ad --output predicted.h5ad

A store (data_prep/build_store.py --vocabulary, with the model's vocabulary.json) keeps the columns
of obs. The run trains on its train split, evaluates validation on the way, and test at the end,
into RUN/test. All of launch/pretrain.py's settings hold; those of the model come with its
checkpoint. The same command resumes exactly from the last checkpoint.

exit codes (also in RUN/outcome.json, since torchrun turns all but 0 into 1):
  0 finished   2 wrong settings or data   75 interrupted and saved, start again   1 internal error
"""


def main() -> int:
    """Return the exit code of the run, which rank 0 also writes into outcome.json."""
    arguments = _arguments()
    if arguments.predict is not None:
        return _predict(arguments)
    interruption = Interruption()
    ignore_known_warnings()
    file = arguments.config or DEFAULT
    overrides = _overrides(arguments)
    try:
        config, text, origin = _settings(arguments, file, overrides)
        plan = settings.plan(config, job.num_ranks(arguments.dry_run))
    except GeneformerError as error:
        return job.refuse_settings(error, settings.run_dir(file, overrides))
    if arguments.dry_run:
        return job.show(text, plan, config.run.dir)

    def open_task() -> Task:
        from geneformer_mcore.training.finetuning import FineTuning, Origin

        return FineTuning.opened(config, Origin(*origin))

    def work(folder: RunFolder, watch: Watchdog) -> tuple[int, str]:
        from geneformer_mcore.training import trainer

        after = partial(_test, config)
        return trainer.train(config, text, plan, folder, interruption, watch, open_task, after)

    return job.ended(config, interruption, work)


def _overrides(arguments: argparse.Namespace) -> list[str]:
    named = {
        "finetune.checkpoint": arguments.checkpoint,
        "finetune.label": arguments.label,
        "data.store": arguments.store,
    }
    given = [
        settings.argument(key, str(value)) for key, value in named.items() if value is not None
    ]
    return [*given, *arguments.settings]


def _settings(
    arguments: argparse.Namespace, file: Path, overrides: list[str]
) -> tuple[settings.Config, str, tuple[Path, str, str]]:
    """(settings on top of those of the pretrained model, their text, that model: folder, name,
    checksum of its vocabulary)."""
    # First the settings alone, before torch is imported.
    config, text = settings.load(file, overrides)
    if not config.finetune.label:
        raise ConfigError(
            "fine-tuning needs --label: the column of the store's obs that holds the classes. "
            "(To predict with a fine-tuned run, give --predict and --output.)"
        )
    from geneformer_mcore.inference import pretrained

    model = pretrained.find_base_model(
        config.finetune.checkpoint, arguments.vocabulary, config.run.dir
    )
    config, text = settings.load(file, overrides, pretrained.settings_of_base_model(model))
    pretrained.check_same(config, model)
    return config, text, (model.folder, pretrained.name_of(model), model.vocabulary.checksum)


def _test(config: settings.Config) -> None:
    from geneformer_mcore.inference import predict

    parallel = config.parallel
    layout = [f"parallel.tensor={parallel.tensor}", f"parallel.sequence={parallel.sequence}"]
    is_first = job.environment("RANK", 0) == 0
    for line in predict.test(Path(config.run.dir), config.data.store, layout, is_first):
        print(line, flush=True)


def _predict(arguments: argparse.Namespace) -> int:
    ignore_known_warnings()

    def work(is_first: bool) -> list[str]:
        if arguments.output is None:
            raise ConfigError("--predict and --output go together: cells, and where they go.")
        from geneformer_mcore.inference import predict

        return predict.run(_request(arguments), is_first)

    return report_on_first_rank(work)


def _request(arguments: argparse.Namespace) -> PredictRequest:
    from geneformer_mcore.inference.predict import PredictRequest

    return options.build(
        PredictRequest,
        arguments,
        source=arguments.predict,
        precision=options.precision_of(arguments),
        options=options.input_options(arguments),
        layout=arguments.settings,
    )


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, EXAMPLE)
    add = parser.add_argument
    options.add(parser, "--checkpoint", "--vocabulary")
    train = parser.add_argument_group("to fine-tune")
    train.add_argument("--store", help="token store with the model's vocabulary")
    train.add_argument("--label", metavar="COLUMN", help="of obs, such as cell_type")
    train.add_argument("--config", type=Path, help="YAML file; default: configs/finetune.yaml")
    train.add_argument("--dry-run", action="store_true", help="show the settings and stop")
    _add_prediction(parser)
    add("settings", nargs="*", metavar="section.key=value", help="to predict: parallel.* only")
    return parser.parse_intermixed_args()


def _add_prediction(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("to predict with a fine-tuned run")
    add = group.add_argument
    add("--predict", metavar="CELLS", help="h5ad or zarr of counts, SOMA Experiment or token store")
    add("--output", type=Path, metavar="FILE", help="h5ad: the cells, with columns in obs")
    names = ("--precision", "--tokens-per-batch", *options.COUNTS, "--overwrite")
    options.add(group, *names)


if __name__ == "__main__":
    run(main)
