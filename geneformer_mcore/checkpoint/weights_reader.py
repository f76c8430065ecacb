"""Weights alone, without optimizer, from any layout and precision.

step folder -> the optimizer's fp32 weights (else the model's own) -> stages of this layout
                                                                   -> or whole tensors, by name
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import safe_metadata
from geneformer_mcore.checkpoint.record import RECORD
from geneformer_mcore.checkpoint.state import description_of, fill
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.model.geneformer import Geneformer

WORD_EMBEDDING = "embedding.word_embeddings.weight"
_OPTIMIZER = "optimizer."
_EXACT = "optimizer.state.param."
"""fp32 weights, of which the model's 16-bit weights are roundings."""
_MOST_NAMED = 6


def step_of(path: Path) -> Path:
    """The step folder `path`, or the newest one of the run `path`. CheckpointError if damaged."""
    folder = path
    if not (path / RECORD).is_file():
        root = path / "checkpoints"
        steps = checkpoints.steps(root)
        if not steps:
            raise CheckpointError(
                f"{path} must be the folder of a run that has a checkpoint, or a step folder of "
                "one, and is neither. Remedy: name RUN_DIR, or RUN_DIR/checkpoints/step_NNNNNNNNNN."
            )
        folder = checkpoints.step_folder(root, steps[-1])
    checkpoints.verify(folder)
    return folder


def check_finite(weights: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raise CheckpointError with the names of tensors that hold NaN or infinite numbers in fp32."""
    wrong = [name for name, each in weights.items() if not each.float().isfinite().all()]
    if wrong:
        shown = ", ".join(wrong[:_MOST_NAMED]) + (", ..." if len(wrong) > _MOST_NAMED else "")
        raise CheckpointError(
            f"{source}: every weight must be a finite number, and {len(wrong)} of {len(weights)} "
            f"tensors hold NaN or infinite ones: {shown}. Remedy: fetch the model again, or take "
            "an earlier checkpoint of its training."
        )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """{our name: whole tensor, fp32} on the CPU. CheckpointError for anything but tensors, and for
    numbers that are not finite."""
    return _whole(folder, [name for name in _names(folder) if not name.startswith(_OPTIMIZER)])


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, whole, in fp32; in one process, without any group."""
    return _whole(folder, [name])[name]


def _whole(folder: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    with safe_metadata.read_by_torch(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = safe_metadata.FileSystemReader(folder)
        described: dict[str, Any] = reader.read_metadata().state_dict_metadata
        keys = {name: _most_exact(name, described) for name in names}
        missing = sorted(set(keys.values()) - set(described))
        if missing:
            raise CheckpointError(
                f"{folder} must hold the tensor {missing[0]}, and holds {len(described):,} others. "
                "Remedy: name a checkpoint of a run of this program."
            )
        whole = {
            key: torch.empty(described[key].size, dtype=described[key].properties.dtype)
            for key in keys.values()
        }
        load_tensors(whole, storage_reader=reader, no_dist=True)
    weights = {name: whole[key].float() for name, key in keys.items()}
    check_finite(weights, folder)
    return weights


def load(stages: Sequence[Geneformer], folder: Path) -> None:
    """Fill the stages of this rank from `folder`, of any layout; all ranks together.

    Weights are the optimizer's fp32 ones, rounded to the stages' dtype; others are not read. Raises
    CheckpointError if `folder` holds anything but tensors.
    """
    there = _names(folder)
    wanted = {str(number): description_of(stage) for number, stage in enumerate(stages)}
    for entries in wanted.values():
        for entry in entries.values():
            entry.key = _most_exact(entry.key, there)
    with safe_metadata.read_by_torch():
        found = dist_checkpointing.load(wanted, str(folder))
    for number, stage in enumerate(stages):
        fill(stage, found[str(number)])


def newest_sound(root: Path) -> tuple[Path, list[str]]:
    """The latest valid checkpoint of a run, and a line for each newer damaged one. Nothing is
    renamed: the run may be another's. Raises CheckpointError if there is none."""
    damaged = []
    for step in reversed(checkpoints.steps(root)):
        found = checkpoints.step_folder(root, step)
        try:
            checkpoints.verify(found)
        except CheckpointError as error:
            damaged.append(str(error))
        else:
            return found, damaged
    why = " ".join(damaged) if damaged else "It has none yet."
    raise CheckpointError(
        f"{root} must hold a checkpoint as it was written, and holds {len(damaged)} damaged one(s) "
        f"and no good one. {why} Remedy: name another run, or train this one on."
    )


def _names(folder: Path) -> list[str]:
    with safe_metadata.read_by_torch():
        return list(safe_metadata.FileSystemReader(folder).read_metadata().state_dict_metadata)


def _most_exact(name: str, there: Container[str]) -> str:
    """The optimizer's fp32 weights, which frozen parameters do not have."""
    return f"{_EXACT}{name}" if f"{_EXACT}{name}" in there else name
