"""Selection of the implementation of softmax(QK)V.

te         Transformer Engine's fused kernels (NVIDIA GPUs)
flash      the FlashAttention-2 inside torch (NVIDIA GPUs, 16 bits)
sdpa       torch's scaled_dot_product_attention
blockwise  ours for CPUs: a block of scores at a time, with a fast dropout
plain      Megatron-Core's own, every score in memory
"""

from __future__ import annotations

import os

import torch

from geneformer_mcore import backends
from geneformer_mcore.config.sections import Attention, ModelConfig, Precision
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model.attention.backends import FlashAttention, PlainAttention, SdpaAttention
from geneformer_mcore.model.attention.base import PackedCells
from geneformer_mcore.model.attention.blockwise import BlockwiseAttention
from geneformer_mcore.types import Batch

_CORES: dict[Attention, type[torch.nn.Module]] = {
    Attention.flash: FlashAttention,
    Attention.sdpa: SdpaAttention,
    Attention.blockwise: BlockwiseAttention,
    Attention.plain: PlainAttention,
}

_WITH_FP8 = (Attention.auto, Attention.te)


_AMPERE = (8, 0)
_WITH_PACKED_TE = (9, 10)
"""First numbers of the compute capabilities for which cuDNN's attention takes packed cells."""
_WIDEST_FLASH_HEAD = 256


def choose(
    model: ModelConfig, device: torch.device, precision: Precision, packed: bool = False
) -> Attention:
    """The meaning of `model.attention` on this machine, never `auto`. Raises MissingBackendError if
    Transformer Engine is required and not installed, ConfigError for a kernel that this device or
    precision does not have."""
    asked = model.attention
    if precision is Precision.fp8 and (device.type != "cuda" or asked not in _WITH_FP8):
        raise ConfigError(
            "train.precision=fp8 needs an NVIDIA GPU and model.attention=te, whose layers multiply "
            f"in 8 bits, and this is {device.type} with model.attention={asked.value}."
        )
    if asked is Attention.te or precision is Precision.fp8:
        backends.require("transformer_engine")
    fused = asked in (Attention.te, Attention.flash)
    if fused and (device.type != "cuda" or precision is Precision.fp32):
        raise ConfigError(
            f"model.attention={asked.value} needs an NVIDIA GPU and 16 bits, and this is "
            f"{device.type} with train.precision={precision.value}. Leave it auto."
        )
    if asked is Attention.flash and not _flash_runs(model, device):
        raise ConfigError(
            "model.attention=flash needs a GPU since Ampere (8.0) and heads of at most "
            f"{_WIDEST_FLASH_HEAD} in multiples of 8, and this is compute capability "
            f"{_capability(device)} with heads of {_head_width(model)}. Leave it auto."
        )
    if asked is Attention.te and packed and torch.are_deterministic_algorithms_enabled():
        raise ConfigError(
            "model.attention=te has no deterministic backward pass for packed cells that fits a "
            "GPU (cuDNN's wants 512 GiB for 32,768 tokens), and train.deterministic is true. "
            "Remedy: model.attention=flash, or leave it auto."
        )
    if asked is Attention.blockwise and device.type != "cpu":
        raise ConfigError(
            f"model.attention=blockwise is for CPUs, and this is {device.type}. Leave it auto."
        )
    if asked is not Attention.auto:
        return asked
    if device.type != "cuda":
        return _on_cpu(model)
    return _on_gpu(model, device, precision, packed)


def _on_gpu(
    model: ModelConfig, device: torch.device, precision: Precision, packed: bool
) -> Attention:
    capability = _capability(device)
    if precision is Precision.fp8:
        return Attention.te
    if precision is Precision.fp32 or capability < _AMPERE:
        return Attention.sdpa
    takes_cells = not packed or capability[0] in _WITH_PACKED_TE
    takes_cells = takes_cells and not torch.are_deterministic_algorithms_enabled()
    if backends.is_available("transformer_engine") and takes_cells:
        return Attention.te
    return Attention.flash if _flash_runs(model, device) else Attention.sdpa


def _flash_runs(model: ModelConfig, device: torch.device) -> bool:
    width = _head_width(model)
    fits = width % 8 == 0 and width <= _WIDEST_FLASH_HEAD
    return fits and _capability(device) >= _AMPERE


def _head_width(model: ModelConfig) -> int:
    return model.hidden_size // model.num_attention_heads


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on_cpu(model: ModelConfig) -> Attention:
    # With dropout torch's CPU attention is slower than the plain one.
    return Attention.blockwise if model.attention_dropout > 0 else Attention.sdpa


def core_attention(attention: Attention) -> type[torch.nn.Module]:
    """The core-attention class. Transformer Engine raises instead of silently falling back to its
    unfused attention, unless NVTE_UNFUSED_ATTN=1 is in the environment."""
    if attention is Attention.te:
        os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        return TEDotProductAttention
    return _CORES[attention]


def packed_cells(batch: Batch) -> PackedCells | None:
    """Bounds of cells as Megatron's parameters; None if padded."""
    return None if batch.bounds is None else packed_pieces(batch.bounds, batch.longest)


def packed_pieces(bounds: torch.Tensor, longest: int) -> PackedCells:
    """The same from int32 bounds and the longest distance between two of them."""
    return PackedCells(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
