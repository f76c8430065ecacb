"""The state that a finished run has left, to be compared byte for byte with another run's.

    final_state(run) == final_state(other)   ->  the same weights, moments, random states
    explain(left, right)                     ->  where they part: the first step, the first tensors

pytest prints the explanation where such an assertion fails (tests/conftest.py).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_tensors

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import safe_metadata
from geneformer_mcore.errors import CheckpointError

RECORDED = ("loss", "grad_norm", "lr", "val_loss")
MOST_TENSORS = 3


@dataclass(frozen=True)
class FinalState:
    """run: its folder;  files: {file of the last checkpoint: its SHA-256}, of all that the next
    step would depend on. Two are equal if the files are."""

    run: Path = field(compare=False)
    files: dict[str, str]


def final_state(run: Path) -> FinalState:
    """Of a run that ended with exit code 0."""
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 0
    root = run / "checkpoints"
    last = checkpoints.step_folder(root, checkpoints.steps(root)[-1])
    files = json.loads((last / checkpoints.MANIFEST).read_text())["files"]
    of_state = {".distcp", ".npz", ".pt"}
    kept = {name: each["sha256"] for name, each in files.items() if Path(name).suffix in of_state}
    assert {Path(name).suffix for name in kept} == of_state, f"{last} holds {sorted(files)}"
    return FinalState(run, kept)


def explain(left: FinalState, right: FinalState) -> list[str]:
    """Where two runs part: the first record of metrics.jsonl that differs, and the first tensors of
    the first common checkpoint that do; and files that are not as they were written."""
    names = left.files.keys() | right.files.keys()
    differ = sorted(name for name in names if left.files.get(name) != right.files.get(name))
    lines = [f"files of the last checkpoint that differ: {', '.join(differ) or 'none'}"]
    lines.append(_first_record(left.run, right.run))
    steps = [set(checkpoints.steps(state.run / "checkpoints")) for state in (left, right)]
    for step in sorted(steps[0] & steps[1]):
        folders = [checkpoints.step_folder(s.run / "checkpoints", step) for s in (left, right)]
        lines += [line for line in map(_damage, folders) if line]
        tensors = _tensors_that_differ(*map(read_whole, folders))
        if tensors:
            return [*lines, f"step {step}: {len(tensors)} tensors differ, first:"] + [
                f"  {line}" for line in tensors[:MOST_TENSORS]
            ]
    return [*lines, "no tensor of a common checkpoint differs"]


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its parts by torch alone."""
    with safe_metadata.read_by_torch(), warnings.catch_warnings():
        # It remarks on what it was asked for: that no other rank reads along.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = FileSystemReader(folder)
        described = reader.read_metadata().state_dict_metadata
        whole = {
            key: torch.full(entry.size, float("nan"), dtype=entry.properties.dtype)
            for key, entry in described.items()
        }
        load_tensors(whole, storage_reader=reader, no_dist=True)
    return whole


def _first_record(left: Path, right: Path) -> str:
    for one, other in zip(_records(left), _records(right), strict=False):
        for name in ("step", *RECORDED):
            if one.get(name) != other.get(name):
                seen = f"{name} {one.get(name)!r} and {other.get(name)!r}"
                return f"metrics.jsonl: first difference at step {one['step']}: {seen}"
    return "metrics.jsonl: no difference"


def _records(run: Path) -> list[dict]:
    """The last record of each kind and step: a run that was killed repeats some."""
    kept = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        if line.endswith("}"):
            record = json.loads(line)
            kept[record["step"], "val_loss" in record] = record
    return [kept[key] for key in sorted(kept)]


def _damage(folder: Path) -> str:
    try:
        checkpoints.verify(folder)
    except CheckpointError as error:
        return f"not as it was written: {error}"
    return ""


def _tensors_that_differ(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]
) -> list[str]:
    found = [f"{key}: only in one" for key in sorted(left.keys() ^ right.keys())]
    for key in sorted(left.keys() & right.keys()):
        one, other = left[key], right[key]
        if one.shape != other.shape or one.dtype != other.dtype:
            found.append(f"{key}: {one.dtype}{list(one.shape)}, {other.dtype}{list(other.shape)}")
        elif not torch.equal(one, other):
            apart = (one.double() - other.double()).abs()
            count = int((apart != 0).sum())
            found.append(f"{key}: {count} of {one.numel()} differ, by {float(apart.max()):.3g}")
    return found
