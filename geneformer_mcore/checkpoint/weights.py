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
from geneformer_mcore.checkpoint import plain_metadata
from geneformer_mcore.checkpoint.state import description_of
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.model.geneformer import Geneformer

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
    with plain_metadata.read_by_torch():
        found = dist_checkpointing.load(wanted, str(folder))
    for number, stage in enumerate(stages):
        missing, unexpected = stage.load_state_dict(found[str(number)], strict=False)
        assert not unexpected
        assert all(name.endswith("_extra_state") for name in missing), missing


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint, whole, in fp32; in one process, without any group."""
    key = _most_exact(name, _names(folder))
    with plain_metadata.read_by_torch(), warnings.catch_warnings():
        # It remarks on what it is told: that no other rank reads along.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = plain_metadata.FileSystemReader(folder)
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
    with plain_metadata.read_by_torch():
        return set(plain_metadata.FileSystemReader(folder).read_metadata().state_dict_metadata)


def _most_exact(name: str, there: set[str]) -> str:
    """The optimizer has no weights of what was frozen in training."""
    return f"{_EXACT}{name}" if f"{_EXACT}{name}" in there else name
