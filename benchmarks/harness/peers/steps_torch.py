"""Peers that are plain torch modules, on one lean training loop: Hugging Face's BERT, and
Transformer Engine's layers in the style of NVIDIA's training recipes.

micro batches -> [zero gradients -> (forward, backward) per micro batch -> clip -> fused AdamW]

BertForMaskedLM, which the original Geneformer is trained with, is post-LN, with a norm and token
types in its embedding, where the card's model is pre-LN with a final norm: no weights make the two
the same function. They share what a step costs: layers, widths, heads, vocabulary, and so the
FLOPs, and all but a few of the parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from benchmarks.harness.peers.steps import NEVER, Job, StepContestant
from benchmarks.harness.train_step.cells import StepCells
from geneformer_mcore import backends
from geneformer_mcore.config.sections import Activation, ModelConfig, OptimConfig, Precision
from geneformer_mcore.model.megatron_config import ACTIVATIONS, INIT_STD, LAYERNORM_EPSILON
from geneformer_mcore.types import PAD, Batch, padded_vocabulary_size

IGNORED = -100
"""The label of a position that torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Labelled:
    """One micro batch on the device, in the form that a masked language model of torch takes.

    tokens_BS, labels_BS:  int64; the label is IGNORED where nothing is predicted
    is_real_BS:            int64, 1 where there is a token, 0 where there is padding
    """

    tokens_BS: torch.Tensor
    is_real_BS: torch.Tensor
    labels_BS: torch.Tensor
    num_predicted: int


class TorchStep(StepContestant):
    """A torch module that returns the mean loss of a micro batch.

    by_length:  cells of like length go into one micro batch
    """

    by_length: ClassVar[bool] = False

    def __init__(self, job: Job, micro_batch: int, here: torch.device) -> None:
        self.config, self.here, self.micro_batch = job.config(), here, micro_batch
        self.cells = StepCells.open(job.cells, self.config, job.vocabulary_size)
        torch.manual_seed(self.config.train.seed)
        self.model = self.built(job.vocabulary_size)
        self.optimizer = adamw(self.model, self.config.optim)

    @abstractmethod
    def built(self, vocabulary_size: int) -> torch.nn.Module:
        """The module on `self.here`, in training mode, with its initial weights."""

    @abstractmethod
    def mean_loss(self, batch: Labelled) -> torch.Tensor:
        """Nats per predicted gene of a micro batch."""

    def pad_multiple(self) -> int:
        """The multiple to which micro batches are padded; 0 is the full length, always."""
        return 0

    def batches(self, number: int) -> list[Batch]:
        multiple = self.pad_multiple()
        return self.cells.micro_batches(number, self.micro_batch, multiple, self.by_length)

    def placed(self, batches: list[Batch]) -> list[Labelled]:
        # A mean over nothing is no number, and adds nothing.
        return [_labelled(batch, self.here) for batch in batches if len(batch.labels_M)]

    def step(self, placed: list[Labelled]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        num_predicted = sum(batch.num_predicted for batch in placed)
        total = torch.zeros((), device=self.here)
        for batch in placed:
            # Together the mean over the global batch, as ours: not a mean of means.
            loss = self.mean_loss(batch) * (batch.num_predicted / num_predicted)
            loss.backward()
            total += loss.detach().float()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        return float(total)

    @property
    def is_bf16(self) -> bool:
        """True for training in bf16."""
        return self.config.train.precision is Precision.bf16


def adamw(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW; matrices decay, biases and norms do not, as ours."""
    weights = list(model.parameters())
    groups = [
        {"params": [one for one in weights if one.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [one for one in weights if one.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )


def _labelled(batch: Batch, here: torch.device) -> Labelled:
    labels_BS = torch.full_like(batch.tokens_BS, IGNORED, dtype=torch.int64)
    labels_BS.view(-1)[batch.selected_M] = batch.labels_M
    tokens_BS, is_real_BS = (
        batch.tokens_BS.long().to(here),
        (batch.tokens_BS != PAD).long().to(here),
    )
    return Labelled(tokens_BS, is_real_BS, labels_BS.to(here), len(batch.labels_M))


# Hugging Face


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
        # Weights stay fp32; products are cast.
        with torch.autocast(self.here.type, torch.bfloat16, enabled=self.is_bf16):
            tokens, real = batch.tokens_BS, batch.is_real_BS
            return self.model(input_ids=tokens, attention_mask=real, labels=batch.labels_BS).loss

    @property
    def about(self) -> str:
        form = "fp32 weights, bf16 autocast" if self.is_bf16 else "fp32 weights"
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
            type_vocab_size=2,  # BertConfig's default, which Geneformer keeps
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


# Transformer Engine


class TELayers(TorchStep):
    """A stack of te.TransformerLayer with a tied head over all positions, pre-LN as the card's
    model; bf16 weights, padded to the full length."""

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
        logits_NV = self.model(batch.tokens_BS, batch.is_real_BS).flatten(0, 1).float()
        return F.cross_entropy(logits_NV, batch.labels_BS.flatten(), ignore_index=IGNORED)


class TEBert(torch.nn.Module):
    """Word + position -> layers -> norm -> dense, activation, norm -> product with the words."""

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
        activation={Activation.relu: "relu", Activation.gelu: "gelu"}[model.activation],
        attn_input_format="bshd",
        fuse_qkv_params=True,
        params_dtype=torch.bfloat16,
        device=here,
    )
