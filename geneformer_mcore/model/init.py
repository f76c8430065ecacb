"""Initial weights, the same in every layout: each parameter is drawn whole from a generator seeded
by (seed, name in the whole model), and each rank keeps its slice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule

from geneformer_mcore.model.megatron_config import INIT_STD

_WRITES_TO_RESIDUAL = (".linear_proj.weight", ".linear_fc2.weight")


def fill(stage: MegatronModule, seed: int, only: Callable[[str], bool] | None = None) -> None:
    """Overwrite the parameters, or `only` some by name in the whole model, before `optim.wrap`."""
    num_layers = stage.config.num_layers
    with torch.no_grad():
        for entry in sharded_parameters(stage):
            if only is not None and not only(entry.key):
                continue
            entry.data.copy_(slice_of(entry, _draw(entry, seed, num_layers)))


def sharded_parameters(stage: MegatronModule) -> list[ShardedTensor]:
    """The parameters of a stage (`data`), with name, shape and offset in the whole model."""
    metadata = {"non_homogeneous_layers": True}  # the layer's number is part of the name
    entries = stage.sharded_state_dict(metadata=metadata).values()
    parameters = {parameter.data_ptr() for parameter in stage.parameters()}
    found = [entry for entry in entries if isinstance(entry, ShardedTensor)]
    assert {entry.data.data_ptr() for entry in found} == parameters
    return found


def _draw(entry: ShardedTensor, seed: int, num_layers: int) -> torch.Tensor:
    """The whole parameter, fp32 on the CPU. Biases and LoRA's `up` 0, norms 1, others normal."""
    shape = entry.global_shape
    if entry.key.endswith(("bias", ".up")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed}/{entry.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    std = INIT_STD
    if entry.key.endswith(_WRITES_TO_RESIDUAL):
        std /= math.sqrt(2 * num_layers)
    elif entry.key.endswith(".down"):
        std = 1 / math.sqrt(shape[1])
    return torch.randn(shape, generator=generator) * std


def slice_of(entry: ShardedTensor, whole: torch.Tensor) -> torch.Tensor:
    """The view of the whole parameter that `entry` holds."""
    assert entry.prepend_axis_num == 0
    for axis, (start, length) in enumerate(
        zip(entry.global_offset, entry.local_shape, strict=True)
    ):
        whole = whole.narrow(axis, start, length)
    return whole
