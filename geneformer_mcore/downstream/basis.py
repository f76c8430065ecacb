"""The model that fine-tuning begins with, and what its settings leave to choose.

run folder | step folder -> Pretrained -> settings that a fine-tuning run has beneath its own
                                       -> refused where its own are of another model
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint.record import Record, of_the_weights
from geneformer_mcore.config import Config, dump
from geneformer_mcore.config.sections import Precision
from geneformer_mcore.downstream import pretrained
from geneformer_mcore.downstream.pretrained import Pretrained
from geneformer_mcore.errors import CheckpointError, ConfigError

_OF_A_MACHINE = ("attention", "compile")
"""Settings of a model that suit where it was trained, and not what it is."""


def find(path: str | Path, vocabulary: str | Path | None, run_dir: str | Path = "") -> Pretrained:
    """The checkpoint at `path`: of a run's folder the newest, or that which the fine-tuning run in
    `run_dir` began with. Raises CheckpointError, DataError or ConfigError if it cannot be used, or
    is of a kind that fine-tuning does not begin with."""
    found = pretrained.find(_begun_with(Path(path), Path(run_dir)) or path, vocabulary)
    if found.config.finetune.lora_rank:
        raise CheckpointError(
            f"{path} was fine-tuned with finetune.lora_rank={found.config.finetune.lora_rank}, and "
            "corrections are not corrected again. Remedy: begin with the model that it began with, "
            "or with one that was fine-tuned as a whole."
        )
    return found


def _begun_with(path: Path, run_dir: Path) -> Path | None:
    """The step folder of the run `path` that `run_dir` went out from: that run may have gone on."""
    root = run_dir / "checkpoints"
    try:
        record = Record.load(checkpoints.step_folder(root, checkpoints.steps(root)[-1]))
    except (IndexError, OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None  # nothing there yet, or damaged: its turn comes when it is verified
    name = str(record.identity.task.get("pretrained", "")).partition(",")[0]
    begun = path / "checkpoints" / name
    return begun if name and begun.is_dir() else None


def settings_of(model: Pretrained) -> list[str]:
    """section.key=value, as the model was pretrained; on a CPU in fp32."""
    recorded = yaml.safe_load(model.record.identity.config)
    kept = {key: value for key, value in recorded["model"].items() if key not in _OF_A_MACHINE}
    precision = model.config.train.precision
    if not torch.cuda.is_available():
        precision = Precision.fp32
    if precision is Precision.fp32:
        kept["fp32_residual"] = True
    return [
        *(f"model.{key}={json.dumps(value)}" for key, value in kept.items()),
        f"data.seq_length={model.config.data.seq_length}",
        f"train.precision={precision.value}",
    ]


def check_same(config: Config, model: Pretrained) -> None:
    """Raises ConfigError where `config` is of a model of another shape."""
    theirs = of_the_weights(model.record.identity.config)
    ours = of_the_weights(dump(config))
    problems = [f"{key}: {was} -> {ours[key]}" for key, was in theirs.items() if was != ours[key]]
    if problems:
        raise ConfigError(
            f"{model.folder} is of another model than these settings ask for (checkpoint -> now):"
            "\n  " + "\n  ".join(problems) + "\nRemedy: leave them out; they come with it."
        )


def name_of(model: Pretrained) -> str:
    """As people and checkpoints call it: two models have different names, wherever they lie."""
    return f"{model.folder.name}, sha256 {model.sha256[:16]}"
