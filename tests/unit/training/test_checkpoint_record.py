"""What a checkpoint records: settings that may or may not change between two starts of a run, and
metadata, a pickle that can name tensors and files of its own folder and do nothing else."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem
from torch.distributed.checkpoint import metadata as descriptions

from geneformer_mcore.checkpoint import safe_metadata
from geneformer_mcore.checkpoint.record import (
    RECORD,
    Identity,
    Record,
    best_step,
    check_continues,
    interpolated_values,
)
from geneformer_mcore.config import load
from geneformer_mcore.errors import CheckpointError


def identity(*overrides: str) -> Identity:
    config, text = load(None, overrides)
    return Identity(text, interpolated_values(config, text), "v", "c")


def recorded(before: Identity) -> Record:
    parts = ({"tensor": 1}, {"torch": "2"}, {"skipped": 0})
    return Record(5, 80, {"cells_seen": 80}, before, *parts)


RECORDED = recorded(identity())


@pytest.mark.parametrize(
    "override",
    ["parallel.tensor=2", "train.micro_batch_size=8", "train.steps=7", "train.max_minutes=3",
     "metrics.log_every_steps=1", "checkpoint.save_every_steps=9", "train.non_finite=skip",
     "train.profile_steps=3", "train.max_skips=3", "data.prefetch_steps=0", "data.store=elsewhere",
     "run.dir=elsewhere"],
)  # fmt: skip
def test_may_differ(override: str) -> None:
    check_continues(RECORDED, identity(override))


@pytest.mark.parametrize(
    ("after", "shown"),
    [
        (identity("train.seed=7"), "train.seed: 1234 -> 7"),
        (identity("train.global_batch_size=64"), "train.global_batch_size: 2048 -> 64"),
        (identity("optim.lr=0.5"), "optim.lr: 0.001 -> 0.5"),
        (identity("model.num_layers=2"), "model.num_layers: 6 -> 2"),
        (identity("data.seq_length=16"), "data.seq_length: 2048 -> 16"),
        (identity("train.precision=fp32"), "train.precision: bf16 -> fp32"),
        (replace(identity(), content="other"), "content hash of data.store: c -> other"),
        (replace(identity(), vocabulary="other"), "vocabulary checksum: v -> other"),
    ],
)
def test_must_not_differ_and_both_values_are_shown(after: Identity, shown: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(shown)):
        check_continues(RECORDED, after)


def test_a_setting_that_an_older_version_lacked_had_its_default() -> None:
    older = RECORDED.identity.config.replace("  packing: false\n", "")
    assert older != RECORDED.identity.config
    before = recorded(replace(RECORDED.identity, config=older))
    check_continues(before, identity())
    with pytest.raises(CheckpointError, match=r"data\.packing: False -> True"):
        check_continues(before, identity("data.packing=true"))


def test_compiling_may_be_left_to_the_machine() -> None:
    given, left = (identity(f"model.compile={word}") for word in ("false", "null"))
    check_continues(recorded(given), left)
    check_continues(recorded(left), given)
    with pytest.raises(CheckpointError, match=r"model\.compile: False -> True"):
        check_continues(recorded(given), identity("model.compile=true"))


def test_round_trip_and_unknown_format(tmp_path: Path) -> None:
    RECORDED.save(tmp_path)
    assert Record.load(tmp_path) == RECORDED
    fields = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps(fields | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        Record.load(tmp_path)


@pytest.mark.parametrize("config", ["a: [", "- 1", "", "a: 1", "&a {x: *a}", "a: {x: &b [*b]}"])
def test_settings_that_are_none_are_refused(config: str, tmp_path: Path) -> None:
    recorded(replace(RECORDED.identity, config=config)).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"record\.json: identity\.config: .*Remedy: take"):
        Record.load(tmp_path)


def test_a_value_behind_an_interpolation_must_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_seed(seed: str) -> Identity:
        monkeypatch.setenv("RUN_SEED", seed)
        return identity("train.seed=${oc.decode:${oc.env:RUN_SEED}}")

    before = recorded(with_seed("1"))
    check_continues(before, with_seed("1"))
    with pytest.raises(CheckpointError, match=r"train\.seed: .* has another value now"):
        check_continues(before, with_seed("2"))


def test_the_best_step_has_the_lowest_loss(tmp_path: Path) -> None:
    """Of those that validated and can be read."""
    for step, loss in ((1, 3.0), (2, 1.5), (3, 2.0), (4, None)):
        (tmp_path / str(step)).mkdir()
        replace(RECORDED, val_loss=loss).save(tmp_path / str(step))
    assert best_step([1, 2, 3, 4, 5], lambda step: tmp_path / str(step)) == 2
    assert best_step([4, 5], lambda step: tmp_path / str(step)) is None


def described(path: str = "a.distcp", **entries: Any) -> descriptions.Metadata:
    index = descriptions.MetadataIndex("w", torch.Size([0]))
    properties = descriptions.TensorProperties(dtype=torch.bfloat16)
    tensor = descriptions.TensorStorageMetadata(properties, torch.Size([3]), [])
    return descriptions.Metadata(
        state_dict_metadata={"w": tensor, **entries},
        storage_data={index: filesystem._StorageInfo(path, 0, 7)},
    )


def larger_than_its_file() -> descriptions.Metadata:
    metadata = described()
    metadata.state_dict_metadata["w"].size = torch.Size([1 << 30])  # type: ignore[union-attr]
    return metadata


def beyond_its_file() -> descriptions.Metadata:
    metadata = described()
    (index,) = metadata.storage_data
    metadata.storage_data[index] = filesystem._StorageInfo("a.distcp", 1 << 40, 7)
    return metadata


def write(folder: Path, content: Any) -> Path:
    folder.mkdir()
    (folder / "a.distcp").write_bytes(b"tensors")
    pickled = content if isinstance(content, bytes) else pickle.dumps(content)
    (folder / safe_metadata.METADATA).write_bytes(pickled)
    return folder


def test_a_plain_description_is_read_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "step", described())
    assert safe_metadata.load(folder).state_dict_metadata == described().state_dict_metadata
    theirs = FileSystemReader.read_metadata
    with safe_metadata.read_by_torch():
        read = FileSystemReader(folder).read_metadata()
    assert read.storage_data == described().storage_data
    assert FileSystemReader.read_metadata is theirs


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("nested", [False, True])
def test_code_in_it_is_refused_and_not_run(tmp_path: Path, nested: bool) -> None:
    mine = Malicious(tmp_path / "hacked")
    folder = write(tmp_path / "step", described(extra=mine) if nested else mine)
    with safe_metadata.read_by_torch(), pytest.raises(CheckpointError, match="asks for posix"):
        FileSystemReader(folder).read_metadata()
    assert not (tmp_path / "hacked").exists()


NO_PICKLES = (b"", b"\x80", b"nonsense", pickle.dumps(described())[:-20])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (described("../secret"), "'../secret' is no file of it"),
        (described("/etc/passwd"), "is no file of it"),
        (described("missing.distcp"), "is no file of it"),
        (described(x=descriptions.BytesStorageMetadata()), "asks for .*BytesStorageMetadata"),
        (larger_than_its_file(), r"w is larger than its files: \[1073741824"),
        (beyond_its_file(), r"a\.distcp ends before a part of w"),
        ({"w": 1}, "describes no checkpoint"),
        *((content, "is not what this program writes") for content in NO_PICKLES),
    ],
)
def test_any_other_content_is_refused(tmp_path: Path, content: Any, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        safe_metadata.load(write(tmp_path / "step", content))
