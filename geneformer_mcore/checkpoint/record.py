"""The record of a checkpoint, and whether a run may continue from it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from dataclasses import fields as fields_of
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from geneformer_mcore.config import Config, plain_yaml
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.io.schema import Count, Positive, as_type, read_json

FORMAT_VERSION = 3
_REMEDY = "take another checkpoint, or the version of this program that wrote it"
RECORD = "record.json"
ORIGIN = "origin.json"
"""In a run directory: the foreign model that its weights were converted from."""

_MAY_DIFFER = frozenset(
    (
        *("finetune.checkpoint", "train.micro_batch_size", "data.tokens_per_micro_batch"),
        *("train.steps", "train.max_minutes", "train.validate_every_steps"),
        *("train.validate_batches", "train.profile_steps", "data.store", "data.vocabulary"),
        *("data.split", "data.cache_dir", "data.loader", "data.prefetch_steps"),
        "data.pad_multiple",
        # A run that these ended must be able to change them.
        *("train.non_finite", "train.max_skips", "train.spike_sigma", "train.spike_window"),
    )
)
_SECTIONS_MAY_DIFFER = frozenset({"run", "parallel", "metrics", "checkpoint"})
_OF_THE_WEIGHTS = frozenset(
    (
        *("data.seq_length", "model.num_layers", "model.hidden_size", "model.ffn_hidden_size"),
        *("model.num_attention_heads", "model.activation", "model.head_activation", "model.norm"),
    )
)
"""Fixed by converted weights."""


@dataclass(frozen=True)
class Identity:
    """Equal for two starts of the same run.

    config:        all settings, YAML text, interpolations unresolved
    hidden:        setting -> digest of its value, where config has an interpolation
    vocabulary:    checksum of the vocabulary
    content:       content hash of the token store; "" for converted weights without a step
    task:          Task.facts; empty for pretraining
    """

    config: str
    hidden: dict[str, str]
    vocabulary: str
    content: str
    task: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """The part of a checkpoint besides tensors.

    step:          updates made
    cells_seen:    position in the stream of training cells, the whole state of the data
    meters:        the Meter's state
    layout:        ranks per kind of parallelism; random states fit the same one only
    versions:      of the packages that wrote it
    guard:         the SpikeGuard's state
    val_loss:      nats per predicted gene, if this step validated
    """

    step: Count
    cells_seen: Count
    meters: dict[str, Any]
    identity: Identity
    layout: dict[str, Positive]
    versions: dict[str, str]
    guard: dict[str, Any]
    val_loss: float | None = None
    format_version: int = FORMAT_VERSION

    @property
    def is_converted(self) -> bool:
        """Whether these are converted weights: moments are 0, and no cell was seen."""
        return self.identity.content == ""

    def save(self, folder: Path) -> None:
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Record:
        """Raises CheckpointError for an unknown format, or what is not as a Record says."""
        path = folder / RECORD
        content = read_json(path, _REMEDY, CheckpointError)
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has checkpoint format {version!r:.40}, and this version reads "
                f"{FORMAT_VERSION}. Continue it with the version that wrote it."
            )
        record = as_type(content, Record, path, _REMEDY, CheckpointError)
        try:
            settings_in(record.identity.config)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: identity.config: {error}") from None
        return record


def best_step(steps: Iterable[int], folder_of: Callable[[int], Path]) -> int | None:
    """The step with the lowest validation loss, or None."""
    losses = {}
    for step in steps:
        try:
            loss = Record.load(folder_of(step)).val_loss
        except CheckpointError:
            continue  # damaged: reported when it is verified
        if loss is not None and not math.isnan(loss):
            losses[step] = loss
    return min(losses, key=lambda step: losses[step], default=None)


def interpolated_values(config: Config, text: str) -> dict[str, str]:
    """Digests of the values behind interpolations such as ${oc.env:SEED}, to see changes."""
    written = _flat(text)
    values = {
        f"{section.name}.{key}": value
        for section in fields_of(config)
        for key, value in vars(getattr(config, section.name)).items()
    }
    return {
        key: hashlib.sha256(repr(values[key]).encode()).hexdigest()[:16]
        for key, shown in written.items()
        if "${" in str(shown)
    }


def check_continues(record: Record, now: Identity) -> None:
    """Raise CheckpointError with both values of everything that must not change: all but
    _MAY_DIFFER; for converted weights only _OF_THE_WEIGHTS."""
    before = record.identity
    problems = []
    if before.vocabulary != now.vocabulary:
        problems.append(f"vocabulary checksum: {before.vocabulary} -> {now.vocabulary}")
    if before.content != now.content and not record.is_converted:
        problems.append(f"content hash of data.store: {before.content} -> {now.content}")
    for fact in sorted(before.task.keys() | now.task.keys()):
        was_fact, is_fact = before.task.get(fact), now.task.get(fact)
        if was_fact != is_fact:
            problems.append(f"{fact}: {was_fact} -> {is_fact}")
    # Settings that an older version did not know had the defaults' meaning.
    was, shown = _defaults() | _flat(before.config), _defaults() | _flat(now.config)
    for key in sorted(was.keys() | shown.keys()):
        if not _must_stay(key, record):
            continue
        if not _agree(key, was.get(key), shown.get(key)):
            problems.append(f"{key}: {was.get(key)} -> {shown.get(key)}")
        elif before.hidden.get(key) != now.hidden.get(key):
            problems.append(f"{key}: {shown[key]} has another value now")
    if problems:
        raise CheckpointError(
            f"the run folder holds a checkpoint of step {record.step} that these settings would "
            "not continue (checkpoint -> now):\n  "
            + "\n  ".join(problems)
            + "\nRestore the values, or start a new run with another run.dir."
        )


def _agree(key: str, was: Any, now: Any) -> bool:
    # null: the machine decides; an earlier version knew only false.
    return was == now or (key == "model.compile" and None in (was, now))


def of_the_weights(text: str) -> dict[str, Any]:
    shown = _defaults() | _flat(text)
    return {key: shown[key] for key in sorted(_OF_THE_WEIGHTS)}


def _must_stay(key: str, record: Record) -> bool:
    if record.is_converted:
        return key in _OF_THE_WEIGHTS
    return key.split(".")[0] not in _SECTIONS_MAY_DIFFER and key not in _MAY_DIFFER


def _defaults() -> dict[str, Any]:
    return {
        f"{section}.{key}": value.value if isinstance(value, Enum) else value
        for section, values in asdict(Config()).items()
        for key, value in values.items()
    }


def _flat(text: str) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in settings_in(text).items()
        for key, value in values.items()
    }


def settings_in(text: str) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} of a recorded config. CheckpointError if it is not such."""
    try:
        sections = plain_yaml.values(text)
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"the settings are no YAML: {why}. Remedy: {_REMEDY}.") from None
    parts = sections.values() if isinstance(sections, dict) else [sections]
    if not all(isinstance(part, dict) and all(map(_is_value, part.values())) for part in parts):
        raise CheckpointError(f"the settings are no sections of settings. Remedy: {_REMEDY}.")
    return sections


def _is_value(found: Any) -> bool:
    """Whether it can be a setting. YAML also has mappings and lists that contain themselves."""
    each = found if isinstance(found, list) else [found]
    return not any(isinstance(value, dict | list) for value in each)
