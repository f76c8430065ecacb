"""A trained model found again: its checkpoint, settings and vocabulary.

run folder | step folder  ->  newest that verifies  ->  record: settings, vocabulary's checksum
--vocabulary | beside the checkpoint | the run's store  ->  the vocabulary of that checksum
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import weights_reader
from geneformer_mcore.checkpoint.record import RECORD, Record, of_the_weights
from geneformer_mcore.config import Config, dump, parse
from geneformer_mcore.config.sections import Attention, ParallelConfig, Precision, Recompute
from geneformer_mcore.errors import CheckpointError, ConfigError, DataError
from geneformer_mcore.io.files import file_digest
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

LAYOUT_KEYS = ("parallel.tensor", "parallel.pipeline", "parallel.sequence")
"""Settings that may be given for a model in use; all others are those it was trained with."""


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that was found and verified.

    folder:      its step folder
    record:      what it says of itself
    config:      its run's settings, without dropout, and with the layout asked for
    vocabulary:  the one it was trained with
    sha256:      hash of its manifest, which holds the hash of every file
    messages:    newer checkpoints that were passed over
    initial_seed: the model is used with the weights that this seed draws, not with the trained
                 ones: a baseline of the same shape
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
    """The checkpoint at `path`: a run's folder, its checkpoints/, or a step folder.

    layout: "parallel.tensor=2" and the like (see LAYOUT_KEYS).
    Raises CheckpointError, DataError or ConfigError if it, its vocabulary or its settings cannot be
    used.
    """
    folder, messages = _step_folder(Path(path))
    record = Record.load(folder)
    config = _config(record, folder, layout)
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
    config = parse(record.identity.config, f"{folder / RECORD}")
    chosen = parse("{}", "", layout).parallel
    # The run's own ways of being fast are for training, and for its machine.
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


def find_vocabulary(
    record: Record, config: Config, folder: Path, given: str | Path | None = None
) -> Vocabulary:
    """The vocabulary that the checkpoint in `folder` was trained with: the file `given`, or the
    first of that checksum next to the checkpoint or where its run had it from.

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
    looked_at = []
    for path in _places(config, folder):
        try:
            found = Vocabulary.load(path)
        except DataError:
            looked_at.append(f"{path}: none that can be read")
            continue
        if found.checksum == wanted:
            return found
        looked_at.append(f"{path}: another one, checksum {found.checksum[:12]}")
    raise DataError(
        f"the vocabulary that the model was trained with, checksum {wanted[:12]}, was not found "
        f"({'; '.join(looked_at)}). Remedy: name it with `vocabulary=FILE`; it is the "
        "vocabulary.json of the store that the run was trained on."
    )


def _places(config: Config, folder: Path) -> Iterator[Path]:
    yield folder / "vocabulary.json"
    yield folder.parent.parent / "vocabulary.json"
    if config.data.vocabulary:
        yield Path(config.data.vocabulary)
    if config.data.store:
        yield Path(config.data.store) / "vocabulary.json"


# The model that fine-tuning begins with, and what its settings leave to choose.
#
# run folder | step folder -> Pretrained -> settings that a fine-tuning run has beneath its own
#                                        -> refused where its own are of another model

_OF_A_MACHINE = ("attention", "compile")
"""Settings of a model that suit where it was trained, and not what it is."""


def find_base_model(
    path: str | Path, vocabulary: str | Path | None, run_dir: str | Path = ""
) -> Pretrained:
    """The checkpoint at `path`: of a run's folder the newest, or that which the fine-tuning run in
    `run_dir` began with. Raises CheckpointError, DataError or ConfigError if it cannot be used, or
    is of a kind that fine-tuning does not begin with."""
    found = find(_begun_with(Path(path), Path(run_dir)) or path, vocabulary)
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


def settings_of_base_model(model: Pretrained) -> list[str]:
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
