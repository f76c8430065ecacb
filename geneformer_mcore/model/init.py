"""Initial weights that do not depend on the layout.

Every parameter is drawn whole, from a generator of its own that is seeded by (seed, name in the
whole model), and each rank keeps its slice: the same seed gives the same model whatever the
tensor, pipeline or virtual pipeline sizes are.
"""

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
    """Overwrites the parameters of a stage in place: all, or those whose name in the whole model
    `only` says yes to. Call before the optimizer copies them."""
    num_layers = stage.config.num_layers
    with torch.no_grad():
        for entry in sharded_parameters(stage):
            if only is not None and not only(entry.key):
                continue
            entry.data.copy_(slice_of(entry, _draw(entry, seed, num_layers)))


def sharded_parameters(stage: MegatronModule) -> list[ShardedTensor]:
    """The parameters of a stage, each with its name, shape and offset in the whole model. `data` is
    the parameter's own memory."""
    metadata = {"non_homogeneous_layers": True}  # the layer's number is part of the name
    entries = stage.sharded_state_dict(metadata=metadata).values()
    parameters = {parameter.data_ptr() for parameter in stage.parameters()}
    found = [entry for entry in entries if isinstance(entry, ShardedTensor)]
    assert {entry.data.data_ptr() for entry in found} == parameters
    return found


def _draw(entry: ShardedTensor, seed: int, num_layers: int) -> torch.Tensor:
    """The whole parameter, fp32 on the CPU. Biases 0, norms 1, matrices normal; a correction of
    low rank is 0 together: its `down` is normal, its `up` 0."""
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
    """The part of the whole parameter that `entry` holds: a view of entry.local_shape."""
    assert entry.prepend_axis_num == 0
    for axis, (start, length) in enumerate(
        zip(entry.global_offset, entry.local_shape, strict=True)
    ):
        whole = whole.narrow(axis, start, length)
    return whole
