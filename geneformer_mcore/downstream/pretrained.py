"""A trained model found again: its checkpoint, settings and vocabulary.

run folder | step folder  ->  newest that verifies  ->  record: settings, vocabulary's checksum
--vocabulary | beside the checkpoint | the run's store  ->  the vocabulary of that checksum
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import weights
from geneformer_mcore.checkpoint.record import RECORD, Record
from geneformer_mcore.config import Config, parse
from geneformer_mcore.config.sections import Attention, ParallelConfig, Recompute, Source
from geneformer_mcore.errors import CheckpointError, ConfigError, DataError

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
        vocabulary=_vocabulary(record, config, folder, vocabulary),
        sha256=hashlib.sha256((folder / checkpoints.MANIFEST).read_bytes()).hexdigest(),
        messages=tuple(messages),
    )


def _step_folder(path: Path) -> tuple[Path, list[str]]:
    try:
        if (path / RECORD).is_file():
            checkpoints.verify(path.resolve())
            return path.resolve(), []
        for root in (path / "checkpoints", path):
            if checkpoints.steps(root):
                return weights.newest_sound(root)
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


def _vocabulary(
    record: Record, config: Config, folder: Path, given: str | Path | None
) -> Vocabulary:
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
        f"({'; '.join(looked_at)}). Remedy: name it with --vocabulary FILE; it is the "
        "vocabulary.json of the store that the run was trained on."
    )


def _places(config: Config, folder: Path) -> Iterator[Path]:
    yield folder / "vocabulary.json"
    yield folder.parent.parent / "vocabulary.json"
    if config.data.source is Source.counts:
        yield Path(config.data.vocabulary)
    else:
        yield Path(config.data.store) / "vocabulary.json"
