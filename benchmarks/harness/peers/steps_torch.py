"""Hugging Face's BERT on one lean training loop.

micro batches -> [zero gradients -> (forward, backward) per micro batch -> clip -> fused AdamW]

BertForMaskedLM, which the original Geneformer is trained with, is post-LN, with a norm and token
types in its embedding, where the card's model is pre-LN with a final norm: no weights make the two
the same function. They share what a step costs: layers, widths, heads, vocabulary, and so the
FLOPs, and all but a few of the parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.harness.peers.steps import NEVER, Job, StepContestant
from geneformer_mcore import backends
from geneformer_mcore.config.sections import Precision
from geneformer_mcore.model.megatron_config import LAYERNORM_EPSILON
from geneformer_mcore.types import PAD, Batch, padded_vocabulary_size

IGNORED = -100
"""The label of a position that torch's cross entropy leaves out."""


class Labelled(NamedTuple):
    """One micro batch on the device, in the form that a masked language model of torch takes.

    tokens_BS, labels_BS:  int64; the label is IGNORED where nothing is predicted
    is_real_BS:            int64, 1 where there is a token, 0 where there is padding
    """

    tokens_BS: torch.Tensor
    is_real_BS: torch.Tensor
    labels_BS: torch.Tensor
    num_predicted: int


class HFPadded(StepContestant):
    """Every cell padded to the full length, as NVIDIA's own stack does."""

    label = "HF BERT, padded to full length"
    package = "transformers"

    @classmethod
    def why_not(cls) -> str:
        return "" if backends.is_available("transformers") else "transformers is not installed"

    def __init__(self, job: Job, micro_batch: int, here: torch.device) -> None:
        self.config, self.here, self.micro_batch = job.config(), here, micro_batch
        self.is_bf16 = self.config.train.precision is Precision.bf16
        self.cells = job.step_cells(self.config)
        # With dropout torch's CPU attention leaves its fused kernel, and the plain code is faster.
        slow = here.type == "cpu" and self.config.model.attention_dropout > 0
        self.attention = "eager" if slow else "sdpa"
        form = "fp32 weights, bf16 autocast" if self.is_bf16 else "fp32 weights"
        self.about = f"{self.attention} attention, {form}, fused AdamW"
        torch.manual_seed(self.config.train.seed)
        self.model = self._built(job.vocabulary_size)
        self.optimizer = self._adamw()

    def _built(self, vocabulary_size: int) -> torch.nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        model = self.config.model
        settings = BertConfig(
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
            attn_implementation=self.attention,
        )
        module = BertForMaskedLM(settings).to(self.here)
        with torch.no_grad():
            module.cls.predictions.bias[vocabulary_size:] = NEVER
        return module.train()

    def _adamw(self) -> torch.optim.AdamW:
        """Matrices decay, biases and norms do not, as ours."""
        optim, weights = self.config.optim, list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [one for one in weights if one.dim() > 1]},
            {"params": [one for one in weights if one.dim() <= 1], "weight_decay": 0.0},
        ]
        betas, decay = (optim.beta1, optim.beta2), optim.weight_decay
        return torch.optim.AdamW(groups, optim.lr, betas, optim.eps, decay, fused=True)

    def pad_multiple(self) -> int:
        """The multiple to which micro batches are padded; 0 is the full length, always."""
        return 0

    def batches(self, number: int) -> list[Batch]:
        return self.cells.micro_batches(number, self.micro_batch, self.pad_multiple())

    def placed(self, batches: list[Batch]) -> list[Labelled]:
        # A mean over nothing is no number, and adds nothing.
        return [_labelled(batch, self.here) for batch in batches if len(batch.labels_M)]

    def step(self, placed: list[Labelled]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        num_predicted = sum(batch.num_predicted for batch in placed)
        total = torch.zeros((), device=self.here)
        for batch in placed:
            # Weights stay fp32; products are cast.
            with torch.autocast(self.here.type, torch.bfloat16, enabled=self.is_bf16):
                tokens, real, labels, number = batch
                found = self.model(input_ids=tokens, attention_mask=real, labels=labels)
            # Together the mean over the global batch, as ours: not a mean of means.
            loss = found.loss * (number / num_predicted)
            loss.backward()
            total += loss.detach().float()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        return float(total)


def _labelled(batch: Batch, here: torch.device) -> Labelled:
    tokens_BS = batch.tokens_BS.long()
    labels_BS = torch.full_like(tokens_BS, IGNORED)
    labels_BS.view(-1)[batch.selected_M] = batch.labels_M
    real_BS = (tokens_BS != PAD).long()
    tokens, real, labels = (tensor.to(here) for tensor in (tokens_BS, real_BS, labels_BS))
    return Labelled(tokens, real, labels, len(batch.labels_M))


class HFDynamic(HFPadded):
    """Each micro batch padded to its longest cell, as transformers' collators do."""

    label = "HF BERT, dynamic padding"

    def pad_multiple(self) -> int:
        # Tensor cores want multiples of eight; a CPU computes on what is there.
        return 8 if self.here.type == "cuda" else 1
