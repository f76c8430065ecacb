"""Weights alone, for what comes after training: no optimizer, any layout, any precision.

step folder -> the optimizer's fp32 weights (else the model's own) -> stages of this layout
                                                                   -> or one tensor, whole
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import safe_metadata
from geneformer_mcore.checkpoint.record import RECORD
from geneformer_mcore.checkpoint.state import description_of
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.model.geneformer import Geneformer

# A checkpoint's weights as whole tensors: no ranks, no model, whatever layout wrote it.
#
# step folder -> which tensors it holds -> fp32 weights where it has them -> {name: tensor}

_OPTIMIZER = "optimizer."


def step_of(path: Path) -> Path:
    """The step folder that `path` is, or the newest one of the run that it is.

    Raises CheckpointError if there is none, or it is not as it was written.
    """
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


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """{our name: whole tensor, fp32} of a step folder, on the CPU.

    Raises CheckpointError if it holds anything that is no tensor (see plain_metadata).
    """
    with safe_metadata.read_by_torch(), warnings.catch_warnings():
        # It remarks on what it is told: that no other rank reads along.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = safe_metadata.FileSystemReader(folder)
        described = reader.read_metadata().state_dict_metadata
        names = [key for key in described if not key.startswith(_OPTIMIZER)]
        keys = {name: _EXACT + name if _EXACT + name in described else name for name in names}
        whole = {key: _empty(described[key]) for key in keys.values()}
        load_tensors(whole, storage_reader=reader, no_dist=True)
    return {name: whole[key].float() for name, key in keys.items()}


def _empty(described: Any) -> torch.Tensor:
    # plain_metadata has seen to it that it is a tensor's description.
    return torch.empty(described.size, dtype=described.properties.dtype)


WORD_EMBEDDING = "embedding.word_embeddings.weight"
_EXACT = "optimizer.state.param."
"""Under 16 bits the model's weights are roundings of these."""


def load(stages: Sequence[Geneformer], folder: Path) -> None:
    """Fills the stages of this rank from `folder`, whatever layout wrote it; all ranks together.

    Weights are those the optimizer works on, in fp32, rounded to the stages' dtype. What the stages
    do not have is left where it is. Raises CheckpointError if `folder` holds anything that is no
    tensor.
    """
    there = _names(folder)
    wanted = {str(number): description_of(stage) for number, stage in enumerate(stages)}
    for entries in wanted.values():
        for entry in entries.values():
            entry.key = _most_exact(entry.key, there)
    with safe_metadata.read_by_torch():
        found = dist_checkpointing.load(wanted, str(folder))
    for number, stage in enumerate(stages):
        missing, unexpected = stage.load_state_dict(found[str(number)], strict=False)
        assert not unexpected
        assert all(name.endswith("_extra_state") for name in missing), missing


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, whole, in fp32; in one process, without any group."""
    key = _most_exact(name, _names(folder))
    with safe_metadata.read_by_torch(), warnings.catch_warnings():
        # It remarks on what it is told: that no other rank reads along.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = safe_metadata.FileSystemReader(folder)
        described: Any = reader.read_metadata().state_dict_metadata[key]
        whole = {key: torch.empty(described.size, dtype=torch.float32)}
        load_tensors(whole, storage_reader=reader, no_dist=True)
    return whole[key]


def newest_sound(root: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint of a run that verifies, and a line for each newer one that does not.
    Nothing is renamed: the run may be another's. Raises CheckpointError if there is none."""
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


def _names(folder: Path) -> set[str]:
    with safe_metadata.read_by_torch():
        return set(safe_metadata.FileSystemReader(folder).read_metadata().state_dict_metadata)


def _most_exact(name: str, there: set[str]) -> str:
    """The optimizer has no weights of what was frozen in training."""
    return f"{_EXACT}{name}" if f"{_EXACT}{name}" in there else name
