"""What a checkpoint says of itself, and whether a run may continue from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from geneformer_mcore.errors import CheckpointError

FORMAT_VERSION = 1
RECORD = "record.json"

_MAY_DIFFER = frozenset(
    {
        "train.micro_batch_size",
        "train.steps",
        "train.max_minutes",
        "train.validate_every_steps",
        "train.validate_batches",
        "data.store",
        "data.prefetch_steps",
        "data.pad_multiple",
    }
)
_SECTIONS_MAY_DIFFER = frozenset({"run", "parallel", "metrics", "checkpoint"})


@dataclass(frozen=True)
class Record:
    """The part of a checkpoint that is no tensor.

    step:          updates made
    cells_seen:    position in the stream of training cells; the whole state of the data
    meters:        running sums of what is logged, as plain numbers
    config:        all settings of the run that wrote it, YAML text
    vocabulary:    checksum of the vocabulary
    content:       content hash of the token store
    layout:        ranks per kind of parallelism; random states can be restored into the same one
    versions:      of the packages that wrote it
    """

    step: int
    cells_seen: int
    meters: dict[str, Any]
    config: str
    vocabulary: str
    content: str
    layout: dict[str, int]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Writes the record into a checkpoint folder."""
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(folder: Path) -> Record:
        """Reads it back. Raises CheckpointError for a format this version does not know."""
        fields = json.loads((folder / RECORD).read_text())
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has checkpoint format {version}, and this version reads "
                f"{FORMAT_VERSION}. Continue it with the version that wrote it."
            )
        return Record(**fields)


def check_continues(record: Record, config: str, vocabulary: str, content: str) -> None:
    """Raises CheckpointError that shows both values of everything that must not have changed.

    May differ: the layout (parallel.*), micro batch, steps, time limit, padding, prefetch, what is
    logged, validated and kept and how often, and where the same store lies.
    """
    problems = []
    if record.vocabulary != vocabulary:
        problems.append(f"vocabulary checksum: {record.vocabulary} -> {vocabulary}")
    if record.content != content:
        problems.append(f"content hash of data.store: {record.content} -> {content}")
    before, now = _flat(record.config), _flat(config)
    for key in sorted(before.keys() | now.keys()):
        if key.split(".")[0] in _SECTIONS_MAY_DIFFER or key in _MAY_DIFFER:
            continue
        if before.get(key) != now.get(key):
            problems.append(f"{key}: {before.get(key)} -> {now.get(key)}")
    if problems:
        raise CheckpointError(
            f"the run folder holds a checkpoint of step {record.step} that these settings would "
            "not continue (checkpoint -> now):\n  "
            + "\n  ".join(problems)
            + "\nRestore the values, or start a new run with another run.dir."
        )


def _flat(text: str) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in yaml.safe_load(text).items()
        for key, value in values.items()
    }
