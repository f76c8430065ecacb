"""A checkpoint's weights as whole tensors: no ranks, no model, whatever layout wrote it.

step folder -> which tensors it holds -> fp32 weights where it has them -> {name: tensor}
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import plain_metadata
from geneformer_mcore.checkpoint.record import RECORD
from geneformer_mcore.errors import CheckpointError

_OPTIMIZER = "optimizer."
_EXACT = "optimizer.state.param."
"""The optimizer's fp32 weights, which those of a run in 16 bits are rounded from."""


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
    with plain_metadata.read_by_torch(), warnings.catch_warnings():
        # It remarks on what it is told: that no other rank reads along.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = plain_metadata.FileSystemReader(folder)
        described = reader.read_metadata().state_dict_metadata
        names = [key for key in described if not key.startswith(_OPTIMIZER)]
        keys = {name: _EXACT + name if _EXACT + name in described else name for name in names}
        whole = {key: _empty(described[key]) for key in keys.values()}
        load_tensors(whole, storage_reader=reader, no_dist=True)
    return {name: whole[key].float() for name, key in keys.items()}


def _empty(described: Any) -> torch.Tensor:
    # plain_metadata has seen to it that it is a tensor's description.
    return torch.empty(described.size, dtype=described.properties.dtype)
