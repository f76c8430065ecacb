"""Transformer Engine's layers in a plain torch model, in the style of NVIDIA's training recipes.

tokens -> word + position -> te.TransformerLayer ... -> norm -> dense, activation, norm
       -> product with the word embedding at every position -> cross entropy

bf16 weights, padded to the full length; pre-LN, as the card's model is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.peers.step_contestant import NEVER, Job
from benchmarks.peers.steps_torch import IGNORED, Labelled, TorchStep
from geneformer_mcore import backends
from geneformer_mcore.config.sections import Activation, ModelConfig, Precision
from geneformer_mcore.model.megatron_config import ACTIVATIONS, INIT_STD, LAYERNORM_EPSILON
from geneformer_mcore.types import padded_vocabulary_size

_ACTIVATIONS = {Activation.relu: "relu", Activation.gelu: "gelu"}
"""TE's names."""


class TELayers(TorchStep):
    """A stack of te.TransformerLayer with a tied head over all positions."""

    label = "TE layers, padded to full length"
    package = "transformer-engine"
    about = "TE's attention, bf16 weights and residuals, fused AdamW"

    @classmethod
    def why_not(cls, job: Job, on_gpu: bool) -> str:
        if not on_gpu:
            return "Transformer Engine needs an NVIDIA GPU"
        if job.config().train.precision is not Precision.bf16:
            return "Transformer Engine's fused attention is for bf16"
        here = backends.is_available("transformer_engine")
        return "" if here else "transformer-engine is not installed"

    def built(self, vocabulary_size: int) -> torch.nn.Module:
        model = TEBert(self.config.model, vocabulary_size, self.config.data.seq_length, self.here)
        return model.to(self.here, torch.bfloat16).train()

    def mean_loss(self, batch: Labelled) -> torch.Tensor:
        logits_BSV = self.model(batch.tokens_BS, batch.is_real_BS)
        return F.cross_entropy(
            logits_BSV.flatten(0, 1).float(), batch.labels_BS.flatten(), ignore_index=IGNORED
        )


class TEBert(torch.nn.Module):
    """The model."""

    def __init__(
        self, model: ModelConfig, vocabulary_size: int, seq_length: int, here: torch.device
    ) -> None:
        super().__init__()
        width, num_rows = model.hidden_size, padded_vocabulary_size(vocabulary_size)
        self.words = torch.nn.Embedding(num_rows, width)
        self.places = torch.nn.Embedding(seq_length, width)
        self.dropout = torch.nn.Dropout(model.hidden_dropout)
        self.layers = torch.nn.ModuleList(
            _layer(model, number, here) for number in range(1, model.num_layers + 1)
        )
        self.norm = torch.nn.LayerNorm(width, LAYERNORM_EPSILON)
        self.dense = torch.nn.Linear(width, width)
        self.activation = ACTIVATIONS[model.head_activation or model.activation]
        self.head_norm = torch.nn.LayerNorm(width, LAYERNORM_EPSILON)
        self.bias = torch.nn.Parameter(torch.zeros(num_rows))
        with torch.no_grad():
            self.bias[vocabulary_size:] = NEVER
        for matrix in (self.words.weight, self.places.weight, self.dense.weight):
            torch.nn.init.normal_(matrix, std=INIT_STD)

    def forward(self, tokens_BS: torch.Tensor, is_real_BS: torch.Tensor) -> torch.Tensor:
        """[B, S, V] logits at every position."""
        num_positions = tokens_BS.shape[1]
        hidden_BSH = self.dropout(self.words(tokens_BS) + self.places.weight[:num_positions])
        padding_B11S = (is_real_BS == 0)[:, None, None, :]
        for layer in self.layers:
            hidden_BSH = layer(hidden_BSH, attention_mask=padding_B11S)
        rows_BSH = self.head_norm(self.activation(self.dense(self.norm(hidden_BSH))))
        return F.linear(rows_BSH, self.words.weight, self.bias)


def _layer(model: ModelConfig, number: int, here: torch.device) -> torch.nn.Module:
    import transformer_engine.pytorch as te

    return te.TransformerLayer(
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_attention_heads,
        layernorm_epsilon=LAYERNORM_EPSILON,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layer_number=number,
        self_attn_mask_type="padding",
        activation=_ACTIVATIONS[model.activation],
        attn_input_format="bshd",
        fuse_qkv_params=True,
        params_dtype=torch.bfloat16,
        device=here,
    )
