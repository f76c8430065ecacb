"""Contestants of train_step.py: a model with its optimizer, a full step, one turn of it.

cells of step n, the same for all -> its micro batches -> placed on the device
    -> [ zero gradients -> forward, backward ... -> clip -> AdamW ]   timed, step by step

Ours and Megatron-Core's BertModel go through our train_step: Megatron's schedule, gradient buffers
and AdamW. Hugging Face's BertForMaskedLM, of the original Geneformer, has a lean loop with torch's
fused AdamW. It is post-LN with token types, the card's model pre-LN with a final norm: not the same
function, but layers, widths, heads, vocabulary, and so the FLOPs, are equal.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import torch
from megatron.core.models.bert import bert_layer_specs
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.transformer_config import TransformerConfig

from benchmarks.harness.common import CONFIGS, VOCABULARY, forget_peak_mib, peak_mib
from benchmarks.harness.step_cells import StepCells
from geneformer_mcore import backends
from geneformer_mcore.config import Config, load, plan
from geneformer_mcore.config.sections import ModelConfig, ParallelConfig, Precision
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.errors import DataError
from geneformer_mcore.model import geneformer, init, megatron_config
from geneformer_mcore.model.flops import ModelShape, Workload
from geneformer_mcore.model.megatron_config import LAYERNORM_EPSILON
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.store.local_cache import FlatCopy
from geneformer_mcore.training.step import train_step
from geneformer_mcore.types import PAD, Batch, padded_vocabulary_size

NEVER = -1e4
"""Output bias of the rows that pad the vocabulary: their probability is 0, and so is their part in
a peer's loss. Ours leaves them out by itself."""


@dataclass(frozen=True)
class Job:
    """The task of every contestant, in plain values: it goes to their processes as JSON.

    cells:            folder of a flat copy of tokens
    model:            the settings start from configs/geneformer_MODEL.yaml
    changes:          and these `section.key=value` follow, the global batch's size among them
    vocabulary_size:  tokens, specials included
    steps, warmup:    steps of a turn that are measured, and those before them
    """

    cells: str
    model: str
    changes: tuple[str, ...]
    vocabulary_size: int = VOCABULARY
    steps: int = 1
    warmup: int = 1

    def config(self, *changes: str) -> Config:
        return load(CONFIGS[self.model], [*self.changes, *changes])[0]

    def step_cells(self, config: Config) -> StepCells:
        return StepCells(FlatCopy(Path(self.cells)), config, self.vocabulary_size)

    def shape(self) -> ModelShape:
        """The model's size, for FLOPs: that of the card, whatever a contestant adds to it."""
        return ModelShape.of(self.config().model, self.vocabulary_size)


def our_stages(
    config: Config, core: TransformerConfig, here: torch.device, vocabulary_size: int
) -> list[Any]:
    model, data = config.model, config.data
    length, packed = data.seq_length, data.packing
    stages = geneformer.build(model, core, here, vocabulary_size, length, packed=packed)
    for stage in stages:
        init.fill(stage, config.train.seed)
    return stages


class OursPadded:
    """A row of the table. An instance is a model with its optimizer, ready to be trained.

    label:    its name in tables
    package:  the distribution whose version is shown; "" for ourselves
    config:   the settings, with its own on top
    enter:    prepares this process, once, before one is made
    batches:  the micro batches of step `number` (from 0), on the host
    placed:   the same on the device, in the form that `step` takes
    step:     a full training step. The mean loss per predicted gene, in nats, before it
    """

    package = ""
    label = "ours, padded"

    @classmethod
    def enter(cls) -> torch.device:
        """The device, with the layer that lets Megatron-Core use a CPU, and its groups."""
        here = device.start()
        groups.start(here, ParallelConfig())
        return here

    def __init__(self, job: Job, micro_batch: int, here: torch.device) -> None:
        config = self.config = job.config(*self.changes(job, micro_batch))
        plan(config, world_size=1)
        self.here, self.topology = here, groups.topology()
        groups.seed_dropout(config.train.seed, self.topology)
        precision = config.train.precision
        core = megatron_config.transformer_config(config.model, config.parallel, precision, here)
        stages = self.stages(core, job.vocabulary_size)
        self.trainable = optim.wrap(stages, config.optim, config.parallel)
        self.feed = job.step_cells(config).feed(config)

    @classmethod
    def changes(cls, job: Job, micro_batch: int) -> list[str]:
        return [f"train.micro_batch_size={micro_batch}", "data.packing=false"]

    def stages(self, core: TransformerConfig, vocabulary_size: int) -> list[Any]:
        return our_stages(self.config, core, self.here, vocabulary_size)

    def batches(self, number: int) -> list[Batch]:
        return self.feed.step(number * self.config.train.global_batch_size)

    def placed(self, batches: list[Batch]) -> list[Any]:
        return [batch.to(self.here) for batch in batches]

    def step(self, placed: list[Any]) -> float:
        result = train_step(self.trainable, placed, self.config.optim.lr, self.topology)
        return result.totals.loss


class OursPacked(OursPadded):
    """Ours, cells end to end: a micro batch has room for `micro_batch` cells of full length."""

    label = "ours, packed"

    @classmethod
    def changes(cls, job: Job, micro_batch: int) -> list[str]:
        room = micro_batch * job.config().data.seq_length
        packed = ["data.packing=true", f"data.tokens_per_micro_batch={room}"]
        return [*super().changes(job, micro_batch), *packed]


class PlainMegatron(OursPadded):
    """Megatron-Core's BertModel with its own layers, loss and head, padded to the full length."""

    label = "Megatron-Core BERT, padded to full length"
    package = "megatron-core"

    @classmethod
    def changes(cls, job: Job, micro_batch: int) -> list[str]:
        mine = [*super().changes(job, micro_batch), "data.pad_multiple=0"]
        # Its layers cast the residual stream down, whatever the setting.
        is_bf16 = job.config().train.precision is Precision.bf16
        return [*mine, *(["model.fp32_residual=false"] if is_bf16 else [])]

    def stages(self, core: TransformerConfig, vocabulary_size: int) -> list[Any]:
        if self.here.type == "cuda":
            core.bias_dropout_fusion = core.cross_entropy_loss_fusion = True
        length = self.config.data.seq_length
        stage = PlainBert(core, self.config.model, _layers(self.here), vocabulary_size, length)
        stage = stage.to(device=self.here, dtype=core.params_dtype)
        init.fill(stage, self.config.train.seed)
        with torch.no_grad():
            stage.output_layer.bias[vocabulary_size:] = NEVER
        return [stage]


class PlainBert(BertModel):
    """BertModel under the interface of our train_step, with the activation of the card."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, layers: Any, size: int, length: int
    ) -> None:
        super().__init__(
            config=config,
            num_tokentypes=0,
            transformer_layer_spec=layers,
            vocab_size=padded_vocabulary_size(size),
            max_sequence_length=length,
            share_embeddings_and_output_weights=True,
            add_binary_head=False,
        )
        # Its head has a fixed activation, under this name.
        self.lm_head.gelu = megatron_config.ACTIVATIONS[model.head_activation or model.activation]

    def forward(self, batch: Batch) -> torch.Tensor:
        """fp32 [M]: the loss is taken everywhere, and kept where a gene was masked."""
        labels_BS = torch.zeros_like(batch.tokens_BS, dtype=torch.int64)
        labels_BS.view(-1)[batch.selected_M] = batch.labels_M
        is_real_BS = (batch.tokens_BS != PAD).long()
        loss_BS, _ = super().forward(batch.tokens_BS.long(), is_real_BS, lm_labels=labels_BS)
        return loss_BS.flatten().index_select(0, batch.selected_M).float()


def _layers(here: torch.device) -> Any:
    if here.type == "cuda" and backends.is_available("transformer_engine"):
        return bert_layer_specs.get_bert_layer_with_transformer_engine_spec()
    return bert_layer_specs.bert_layer_local_spec


IGNORED = -100
"""The label of a position that torch's cross entropy leaves out."""
Labelled: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]
"""int64 [B, S] tokens, 1 where there is one, labels, on the device; number of labels."""


class HFPadded:
    """Nothing of Megatron-Core's, or of ours, slows it down. Members as of OursPadded."""

    label = "HF BERT, padded to full length"
    package = "transformers"

    @classmethod
    def enter(cls) -> torch.device:
        """The device, and as many threads as there are cores."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def __init__(self, job: Job, micro_batch: int, here: torch.device) -> None:
        self.config, self.here, self.micro_batch = job.config(), here, micro_batch
        self.is_bf16 = self.config.train.precision is Precision.bf16
        self.cells = job.step_cells(self.config)
        # With dropout torch's CPU attention leaves its fused kernel, and the plain code is faster.
        slow = here.type == "cpu" and self.config.model.attention_dropout > 0
        self.attention = "eager" if slow else "sdpa"
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

    def placed(self, batches: list[Batch]) -> list[Any]:
        # A mean over nothing is no number, and adds nothing.
        return [_labelled(batch, self.here) for batch in batches if len(batch.labels_M)]

    def step(self, placed: list[Any]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        num_predicted = sum(number for *_, number in placed)
        total = torch.zeros((), device=self.here)
        for tokens, real, labels, number in placed:
            # Weights stay fp32; products are cast.
            with torch.autocast(self.here.type, torch.bfloat16, enabled=self.is_bf16):
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
    return tokens, real, labels, len(batch.labels_M)


class HFDynamic(HFPadded):
    label = "HF BERT, dynamic padding"

    def pad_multiple(self) -> int:
        # Tensor cores want multiples of eight; a CPU computes on what is there.
        return 8 if self.here.type == "cuda" else 1


StepContestant: TypeAlias = OursPadded | HFPadded
CONTESTANTS: dict[str, type[StepContestant]] = {
    "ours_packed": OursPacked,
    "ours_padded": OursPadded,
    "hf_dynamic": HFDynamic,
    "hf_padded": HFPadded,
    "megatron": PlainMegatron,
}
"""In the order of the table, ours first."""


def take_turn(kind: type[StepContestant], job: Job, micro_batch: int) -> dict[str, Any]:
    """The measurements, over the measured steps. Ends with the process, whose device it takes.

    seconds:         of every measured step; batches are ready, and on the device, before the clock
    losses:          nats per predicted gene, of every step from the first, unmeasured ones included
    cells:           of the measured steps together, as are
    needed:          the work of the cells: real tokens, predicted positions only
    positions:       computed on for it, padding included
    peak_mib:        memory of weights, gradients, moments and activations: on a GPU allocated by
                     torch, on a CPU the growth of the process
    """
    # Where memory runs out, this process is to be killed, and no other of the machine.
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
    here = kind.enter()
    before_mib = forget_peak_mib(here)
    contestant = kind(job, micro_batch, here)
    batches = [contestant.batches(number) for number in range(job.warmup + job.steps)]
    placed = [contestant.placed(each) for each in batches]
    losses, seconds = [], []
    for each in placed:
        began = _now(here)
        losses.append(contestant.step(each))
        seconds.append(_now(here) - began)
    if not all(map(math.isfinite, losses)):
        raise DataError(f"{kind.label}: a loss is not finite ({losses}).")
    return {
        "seconds": seconds[job.warmup :],
        "losses": losses,
        "cells": job.steps * contestant.config.train.global_batch_size,
        "peak_mib": peak_mib(here) - before_mib,
        "needed": vars(_needed(contestant, job, batches)),
        "positions": sum(batch.tokens_BS.numel() for batch in chain(*batches[job.warmup :])),
    }


def _now(here: torch.device) -> float:
    if here.type == "cuda":
        torch.cuda.synchronize(here)
    return time.perf_counter()


def _needed(contestant: StepContestant, job: Job, batches: list[list[Batch]]) -> Workload:
    cells, total = job.step_cells(contestant.config), Workload(0, 0, 0)
    for number in range(job.warmup, job.warmup + job.steps):
        num_predicted = sum(len(batch.labels_M) for batch in batches[number])
        more = cells.needed(number, num_predicted)
        total = Workload(*(a + b for a, b in zip(astuple(total), astuple(more), strict=True)))
    return total
