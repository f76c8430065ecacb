"""Hugging Face's BertForMaskedLM, which the original Geneformer is trained with.

It is post-LN, with a norm and token types in its embedding, where the card's model is pre-LN with a
final norm: no weights make the two the same function. What they share is what a step costs: layers,
widths, heads, vocabulary, and so the FLOPs, and all but a few of the parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.step_contestant import NEVER, Job
from benchmarks.peers.steps_torch import Labelled, TorchStep
from geneformer_mcore import backends
from geneformer_mcore.config.sections import Precision
from geneformer_mcore.model.megatron_config import LAYERNORM_EPSILON
from geneformer_mcore.types import PAD, padded_vocabulary_size

TOKEN_TYPES = 2
"""BertConfig's default, which Geneformer leaves as it is."""


class HFPadded(TorchStep):
    """Every cell padded to the full length, as NVIDIA's own stack does."""

    label = "HF BERT, padded to full length"
    package = "transformers"

    @classmethod
    def why_not(cls, job: Job, on_gpu: bool) -> str:
        return "" if backends.is_available("transformers") else "transformers is not installed"

    def built(self, vocabulary_size: int) -> torch.nn.Module:
        from transformers import BertForMaskedLM

        model = BertForMaskedLM(self._settings(vocabulary_size)).to(self.here)
        with torch.no_grad():
            model.cls.predictions.bias[vocabulary_size:] = NEVER
        return model.train()

    def mean_loss(self, batch: Labelled) -> torch.Tensor:
        # Weights stay fp32; what is multiplied is cast.
        is_bf16 = self.config.train.precision is Precision.bf16
        with torch.autocast(self.here.type, torch.bfloat16, enabled=is_bf16):
            found = self.model(
                input_ids=batch.tokens_BS,
                attention_mask=batch.is_real_BS,
                labels=batch.labels_BS,
            )
        return found.loss

    @property
    def about(self) -> str:
        is_bf16 = self.config.train.precision is Precision.bf16
        form = "fp32 weights, bf16 autocast" if is_bf16 else "fp32 weights"
        return f"{self._attention()} attention, {form}, fused AdamW"

    def _settings(self, vocabulary_size: int) -> Any:
        from transformers import BertConfig

        model = self.config.model
        return BertConfig(
            # Rounded up as ours: matrices of odd width are slow on a GPU.
            vocab_size=padded_vocabulary_size(vocabulary_size),
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=model.ffn_hidden_size,
            hidden_act=model.activation.value,
            hidden_dropout_prob=model.hidden_dropout,
            attention_probs_dropout_prob=model.attention_dropout,
            max_position_embeddings=self.config.data.seq_length,
            type_vocab_size=TOKEN_TYPES,
            layer_norm_eps=LAYERNORM_EPSILON,
            pad_token_id=PAD,
            attn_implementation=self._attention(),
        )

    def _attention(self) -> str:
        # With dropout torch's CPU attention leaves its fused kernel, and the plain code is faster.
        slow = self.here.type == "cpu" and self.config.model.attention_dropout > 0
        return "eager" if slow else "sdpa"


class HFDynamic(HFPadded):
    """Each micro batch padded to its longest cell, as transformers' collators do."""

    label = "HF BERT, dynamic padding"

    def pad_multiple(self) -> int:
        # Tensor cores want multiples of eight; a CPU computes on what is there.
        return 8 if self.here.type == "cuda" else 1


class HFGrouped(HFDynamic):
    """Cells sorted by length within the global batch: transformers' group_by_length at its best."""

    label = "HF BERT, dynamic padding, grouped by length"
    by_length = True
