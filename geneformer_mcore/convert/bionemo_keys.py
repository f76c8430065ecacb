"""BioNeMo's Geneformer weights under our names: Megatron's model, saved by other versions.

    BioNeMo 2   module.encoder.layers.0.self_attention.linear_qkv.layer_norm_weight
                (a norm may be part of the linear that follows; layers may be stacked in one tensor)
    BioNeMo 1   model.language_model.encoder.layers.0.self_attention.query_key_value.weight

Query, key and value are fused head by head, as in ours. Vocabulary and token ids are ours, with
padding rows. Weights do not reveal activation and number of heads.
"""

from __future__ import annotations

import re

import torch

from geneformer_mcore.config.sections import Activation, ModelConfig, Norm
from geneformer_mcore.convert import hf_keys
from geneformer_mcore.convert.hf_keys import OUTPUT_BIAS, POSITIONS, WORDS, Weights
from geneformer_mcore.errors import CheckpointError

HEAD_WIDTH = 64
"""Of both published sizes: 256 / 4 heads, 768 / 12 heads."""

_RENAMED = (
    (r"^(module\.|model\.)+", ""),
    (r"^language_model\.", ""),
    (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    (r"\.post_attention_layernorm\.", ".pre_mlp_layernorm."),
    (r"^lm_head\.layernorm\.", "lm_head.layer_norm."),
    (r"^lm_head\.bias$", OUTPUT_BIAS),
)
"""(pattern of their names, ours), applied in order."""
_LEFT_OUT = re.compile(r"_extra_state|^(binary_head|pooler)\.|\.rotary_|inv_freq$")
"""Megatron's state of 8-bit formats; heads that Geneformer does not have."""
_STACKED = re.compile(r"^encoder\.layers\.(?=\D)")
_OUTPUT_WORDS = "output_layer.weight"


def renamed(theirs: Weights) -> dict[str, torch.Tensor]:
    """Their tensors under our names, fp32, one per layer."""
    ours: dict[str, torch.Tensor] = {}
    for name, tensor in theirs.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        if _LEFT_OUT.search(name):
            continue
        if _STACKED.match(name) and tensor.dim():
            for layer, part in enumerate(tensor):
                ours[_STACKED.sub(f"encoder.layers.{layer}.", name)] = part.float()
        else:
            ours[name] = tensor.float()
    return ours


def from_bionemo(
    theirs: Weights, num_tokens: int, activation: Activation, heads: int = 0
) -> tuple[Weights, ModelConfig]:
    """(weights of `num_tokens` rows, their model).

    heads: 0 takes one per HEAD_WIDTH
    Raises CheckpointError that names missing, unexpected and misshapen tensors.
    """
    ours = renamed(theirs)
    if WORDS in ours:
        hf_keys.drop_tied(ours, {_OUTPUT_WORDS: WORDS})
    model = _model_of(ours, activation, heads)
    hf_keys.check_layers(model.num_layers, ours)
    num_rows, num_positions = len(ours[WORDS]), len(ours[POSITIONS])
    entries = hf_keys.table(model, num_rows, num_positions)
    hf_keys.check_shapes(ours, {entry.ours: entry.our_shape for entry in entries})
    if num_rows < num_tokens:
        raise CheckpointError(
            f"{WORDS} has {num_rows:,} rows, and the vocabulary {num_tokens:,} tokens. Remedy: "
            "give the vocabulary that the model was trained with."
        )
    for name in (WORDS, OUTPUT_BIAS):
        ours[name] = ours[name][:num_tokens]
    return ours, model


def _model_of(ours: Weights, activation: Activation, heads: int) -> ModelConfig:
    first = "encoder.layers.0.mlp.linear_fc1.weight"
    missing = [name for name in (WORDS, POSITIONS, first) if name not in ours]
    if missing:
        shown = ", ".join(list(ours)[:3]) or "none"
        raise CheckpointError(
            f"{', '.join(missing)} must be among the weights, under their names or ours, and the "
            f"{len(ours)} tensors that were found are others: {shown}, ... Remedy: give the plain "
            "state dict of a BioNeMo Geneformer, {name: tensor}, saved by torch.save."
        )
    flat = [name for name in (WORDS, POSITIONS, first) if ours[name].dim() != 2]
    if flat:
        raise CheckpointError(
            f"{flat[0]} must be a matrix, and is {list(ours[flat[0]].shape)}. Remedy: give the "
            "plain state dict of a BioNeMo Geneformer."
        )
    hidden = ours[WORDS].shape[1]
    heads = heads or max(1, hidden // HEAD_WIDTH)
    if hidden % heads:
        raise CheckpointError(
            f"the hidden size ({hidden}) must be a multiple of the attention heads ({heads}). "
            "Remedy: say how many the model has, by `heads=`."
        )
    layers = re.findall(r"^encoder\.layers\.(\d+)\.", "\n".join(ours), re.MULTILINE)
    return ModelConfig(
        num_layers=max(map(int, layers)) + 1,
        hidden_size=hidden,
        ffn_hidden_size=len(ours[first]),
        num_attention_heads=heads,
        activation=activation,
        norm=Norm.pre,
    )
