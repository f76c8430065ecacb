"""Low-rank corrections of frozen matrices (LoRA, Hu et al. 2021).

    x [.., in] --> W, frozen -------------------------> + --> [.., out]
              `--> down [rank, in] --> up [out, rank] --^    times alpha / rank

`up` begins at 0, so the model begins unchanged. Under tensor parallel each matrix is split as the
one it corrects, and only the `rank` numbers between the two are sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from geneformer_mcore.config.sections import FinetuneConfig
from geneformer_mcore.model.geneformer import Geneformer

NAMES = (".down", ".up")


class LowRank(MegatronModule):
    """Added to the output of one linear layer, [.., out of this tensor rank].

    down: [rank, in], split along `in` in a row-parallel layer
    up:   [out, rank], split along `out` in a column-parallel layer
    """

    def __init__(
        self, config: TransformerConfig, weight: Tensor, tune: FinetuneConfig, cut_out: bool
    ) -> None:
        """weight: of the layer, this rank's part; cut_out: whether the ranks share its outputs."""
        super().__init__(config=config)
        rank = tune.lora_rank
        self.scale = tune.lora_alpha / rank
        self.cut_out = cut_out
        self.down = torch.nn.Parameter(weight.new_zeros(rank, weight.shape[1]))
        self.up = torch.nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        shared, whole = (self.up, self.down) if cut_out else (self.down, self.up)
        set_tensor_model_parallel_attributes(shared, True, 0 if cut_out else 1, 1)
        # The whole one sees this rank's share of the positions only: its gradients are added up.
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: what the layer reads, [S, B, in of this rank]."""
        if self.config.sequence_parallel:
            gather, reduce = (
                gather_from_sequence_parallel_region,
                reduce_scatter_to_sequence_parallel_region,
            )
        else:
            gather, reduce = (
                copy_to_tensor_model_parallel_region,
                reduce_from_tensor_model_parallel_region,
            )
        few = x @ self.down.T
        return ((gather if self.cut_out else reduce)(few) @ self.up.T) * self.scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"up": 0} if self.cut_out else {"down": 1},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


def attach(stage: Geneformer, tune: FinetuneConfig) -> None:
    """Add corrections, of 0, to every layer, if set. Call before the stage is wrapped."""
    if not tune.lora_rank:
        return
    for layer in stage.encoder.layers:
        _correct(layer.self_attention, "qkv", tune, cut_out=True)
        _correct(layer.self_attention, "proj", tune, cut_out=False)
        if tune.lora_feed_forward:
            _correct(layer.mlp, "fc1", tune, cut_out=True)
            _correct(layer.mlp, "fc2", tune, cut_out=False)


def folded(weights: Mapping[str, Tensor], tune: FinetuneConfig) -> dict[str, Tensor]:
    """{name: whole tensor} with the corrections added to what they correct."""
    kept = {name: each for name, each in weights.items() if not name.endswith(NAMES)}
    for name in weights:
        if not name.endswith(".up"):
            continue
        block = name.removesuffix(".up")
        target = f"{block.replace('.lora_', '.linear_')}.weight"
        correction = weights[name] @ weights[f"{block}.down"]
        kept[target] = kept[target] + correction * (tune.lora_alpha / tune.lora_rank)
    return kept


def _correct(block: Any, name: str, tune: FinetuneConfig, cut_out: bool) -> None:
    linear = getattr(block, f"linear_{name}")
    correction = LowRank(block.config, linear.weight, tune, cut_out)
    # Next to the layer, which describes the split of its own parameters.
    setattr(block, f"lora_{name}", correction)
    linear.register_forward_hook(partial(_corrected, correction))


def _corrected(
    correction: LowRank, _linear: Any, inputs: tuple, output: tuple
) -> tuple[Tensor, Any]:
    found, bias = output
    return found + correction(inputs[0]), bias
