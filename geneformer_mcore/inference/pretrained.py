"""Trained model: its checkpoint, settings and vocabulary.

run directory | step folder  ->  latest valid checkpoint  ->  record: settings, checksum
given file | next to the checkpoint | the run's store  ->  the vocabulary of that checksum
base model of fine-tuning  ->  settings that the run inherits, or is refused for
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.checkpoint.record import RECORD, Record, of_the_weights, settings_in
from geneformer_mcore.config import Config, dump, parse
from geneformer_mcore.config.sections import (
    Attention,
    ParallelConfig,
    Precision,
    Recompute,
    Source,
)
from geneformer_mcore.errors import CheckpointError, ConfigError, DataError
from geneformer_mcore.io.files import file_digest
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

LAYOUT_KEYS = ("parallel.tensor", "parallel.pipeline", "parallel.sequence")
"""Settings that may be given for a trained model; all others are those of its training."""
_OF_A_MACHINE = ("attention", "compile")
"""Settings of a model that suit the machine of its training; fine-tuning does not inherit them."""


@dataclass(frozen=True)
class Pretrained:
    """A verified checkpoint.

    folder:        its step folder
    config:        its run's settings, without dropout, in the requested layout
    vocabulary:    of its training
    sha256:        hash of its manifest, which holds the hash of every file
    messages:      on later checkpoints that are damaged
    initial_seed:  replaces the trained weights by random ones: a baseline of the same shape
    """

    folder: Path
    record: Record
    config: Config
    vocabulary: Vocabulary
    sha256: str
    messages: tuple[str, ...] = ()
    initial_seed: int | None = None


def find(
    path: str | Path, vocabulary: str | Path | None = None, layout: Sequence[str] = ()
) -> Pretrained:
    """Find the checkpoint at `path`: a run directory, its checkpoints/, or a step folder.

    layout: "parallel.tensor=2" and the like (see LAYOUT_KEYS)
    Raises CheckpointError, DataError or ConfigError if it, its vocabulary or its settings cannot be
    used.
    """
    folder, messages = _step_folder(Path(path))
    record = Record.load(folder)
    config = _config(record, folder, layout)
    weights_reader.read_weights(folder)  # refuses numbers that are not finite, before any work
    return Pretrained(
        folder=folder,
        record=record,
        config=config,
        vocabulary=find_vocabulary(record, config, folder, vocabulary),
        sha256=file_digest(folder / checkpoints.MANIFEST),
        messages=tuple(messages),
    )


def _step_folder(path: Path) -> tuple[Path, list[str]]:
    try:
        if (path / RECORD).is_file():
            checkpoints.verify(path.resolve())
            return path.resolve(), []
        for root in (path / "checkpoints", path):
            if checkpoints.steps(root):
                return weights_reader.newest_sound(root)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Remedy: check the path, and your right to "
            "read it."
        ) from None
    raise CheckpointError(
        f"{path} must be the folder of a run with checkpoints, or one of its step folders "
        "(RUN/checkpoints/step_NNNNNNNNNN), and is "
        + ("a folder without any." if path.is_dir() else "no folder.")
        + " Remedy: give the run.dir of a run that has saved."
    )


def _config(record: Record, folder: Path, layout: Sequence[str]) -> Config:
    strange = [text for text in layout if text.partition("=")[0] not in LAYOUT_KEYS]
    if strange:
        raise ConfigError(
            f"only the layout can be set here ({', '.join(LAYOUT_KEYS)}), the rest is as the model "
            f"was trained, and got {', '.join(strange)}."
        )
    config = located(parse(record.identity.config, f"{folder / RECORD}"), folder)
    chosen = parse("{}", "", layout).parallel
    # The run's settings for speed suit its machine only.
    config.parallel = replace(
        ParallelConfig(),
        tensor=chosen.tensor,
        pipeline=chosen.pipeline,
        sequence=chosen.sequence,
        recompute=Recompute.none,
    )
    config.finetune.checkpoint = ""
    config.model.attention = Attention.auto
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.model.compile = False
    return config


def located(config: Config, folder: Path) -> Config:
    """`config` of the checkpoint `folder` with the paths of its cells as they lead there today."""
    data, run = config.data, folder.absolute().parent.parent
    was, now = Path(config.run.dir), run
    while was.is_absolute() and was.name and was.name == now.name:
        was, now = was.parent, now.parent
    data.vocabulary, data.split = (
        _there(path, run, was, now) for path in (data.vocabulary, data.split)
    )
    parts = data.store.split(",") if data.source is Source.counts else [data.store]
    data.store = ",".join(_there(part.strip(), run, was, now) for part in parts)
    return config


def _there(path: str, run: Path, was: Path, now: Path) -> str:
    """Where `path` of a record lies: as it stands, or with the folder `was`, which is `now` since
    the run has moved. Earlier versions kept relative ones, of a folder above the run."""
    if not path or "://" in path or (os.path.isabs(path) and os.path.exists(path)):
        return path
    places = [now / Path(path).relative_to(was)] if Path(path).is_relative_to(was) else []
    if not os.path.isabs(path):
        places = [parent / path for parent in run.parents]
    return next((str(place) for place in places if place.exists()), path)


def find_vocabulary(
    record: Record, config: Config, folder: Path, given: str | Path | None = None
) -> Vocabulary:
    """Find the vocabulary of a checkpoint: the file `given`, or the first with the recorded
    checksum next to the checkpoint or where its run read it.

    Raises DataError if it is another one, or none is found.
    """
    wanted = record.identity.vocabulary
    if given is not None:
        found = Vocabulary.load(given)
        if found.checksum != wanted:
            raise DataError(
                f"{given} must be the vocabulary that the model was trained with, checksum "
                f"{wanted[:12]}, and has {found.checksum[:12]}: its token ids mean other genes. "
                "Remedy: give the vocabulary.json of the store that the run was trained on."
            )
        return found
    paths = [folder / "vocabulary.json", folder.parent.parent / "vocabulary.json"]
    if config.data.vocabulary:
        paths.append(Path(config.data.vocabulary))
    if config.data.store:
        paths.append(Path(config.data.store) / "vocabulary.json")
    tried = []
    for path in paths:
        try:
            found = Vocabulary.load(path)
        except DataError:
            tried.append(f"{path}: none that can be read")
            continue
        if found.checksum == wanted:
            return found
        tried.append(f"{path}: another one, checksum {found.checksum[:12]}")
    raise DataError(
        f"the vocabulary that the model was trained with, checksum {wanted[:12]}, was not found "
        f"({'; '.join(tried)}). Remedy: name it with `vocabulary=FILE`; it is the "
        "vocabulary.json of the store that the run was trained on."
    )


def find_base_model(
    path: str | Path, vocabulary: str | Path | None, run_dir: str | Path = ""
) -> Pretrained:
    """Find the base model at `path`: the checkpoint that the fine-tuning run in `run_dir` started
    from, else the latest. Raises CheckpointError, DataError or ConfigError if it cannot be used, or
    was fine-tuned by LoRA itself."""
    found = find(_recorded_base(Path(path), Path(run_dir)) or path, vocabulary)
    if found.config.finetune.lora_rank:
        raise CheckpointError(
            f"{path} was fine-tuned with finetune.lora_rank={found.config.finetune.lora_rank}, and "
            "corrections are not corrected again. Remedy: begin with the model that it began with, "
            "or with one that was fine-tuned as a whole."
        )
    return found


def _recorded_base(path: Path, run_dir: Path) -> Path | None:
    """The step folder of the run `path` that the checkpoints in `run_dir` name: that run may have
    been continued since."""
    root = run_dir / "checkpoints"
    try:
        record = Record.load(checkpoints.step_folder(root, checkpoints.steps(root)[-1]))
    except (IndexError, OSError, CheckpointError):
        return None  # no checkpoint yet, or a damaged one, which is verified later
    name = str(record.identity.task.get("pretrained", "")).partition(",")[0]
    base = path / "checkpoints" / name
    return base if name and base.is_dir() else None


def settings_of_base_model(model: Pretrained) -> list[str]:
    """Settings of pretraining as section.key=value; fp32 on a CPU."""
    recorded = settings_in(model.record.identity.config).get("model", {})
    kept = {key: value for key, value in recorded.items() if key not in _OF_A_MACHINE}
    precision = model.config.train.precision
    if not torch.cuda.is_available():
        precision = Precision.fp32
    if precision is Precision.fp32:
        kept["fp32_residual"] = True
    return [
        *(f"model.{key}={json.dumps(value, default=str)}" for key, value in kept.items()),
        f"data.seq_length={model.config.data.seq_length}",
        f"train.precision={precision.value}",
    ]


def check_same(config: Config, model: Pretrained) -> None:
    """Raise ConfigError where `config` describes a model of another shape."""
    theirs = of_the_weights(model.record.identity.config)
    ours = of_the_weights(dump(config))
    problems = [f"{key}: {was} -> {ours[key]}" for key, was in theirs.items() if was != ours[key]]
    if problems:
        raise ConfigError(
            f"{model.folder} is of another model than these settings ask for (checkpoint -> now):"
            "\n  " + "\n  ".join(problems) + "\nRemedy: leave them out; they come with it."
        )


def name_of(model: Pretrained) -> str:
    """The model's unique name in messages and checkpoints."""
    return f"{model.folder.name}, sha256 {model.sha256[:16]}"
