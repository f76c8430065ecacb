"""Contestants on Megatron-Core: ours, padded and packed, and its BertModel as it comes.

All three go through our train_step: Megatron's schedule, its gradient buffers, its AdamW. What
differs is the model, and the shape of the batches.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.bert import bert_layer_specs
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.transformer_config import TransformerConfig

from benchmarks.harness.peers.steps import NEVER, Job, StepContestant
from geneformer_mcore import backends
from geneformer_mcore.config import Config, plan
from geneformer_mcore.config.sections import ModelConfig, ParallelConfig, Precision
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.model import geneformer, init, megatron_config
from geneformer_mcore.model.attention import select
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.training.step import train_step
from geneformer_mcore.types import PAD, Batch, padded_vocabulary_size


def our_stages(
    config: Config, core: TransformerConfig, here: torch.device, vocabulary_size: int
) -> list[Any]:
    """Our model with its initial weights."""
    model, data = config.model, config.data
    length, packed = data.seq_length, data.packing
    stages = geneformer.build(model, core, here, vocabulary_size, length, packed=packed)
    for stage in stages:
        init.fill(stage, config.train.seed)
    return stages


class OursPadded(StepContestant):
    """Ours: only masked positions are predicted."""

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
        """Its changes of the job's settings."""
        return [f"train.micro_batch_size={micro_batch}", "data.packing=false"]

    def stages(self, core: TransformerConfig, vocabulary_size: int) -> list[Any]:
        """The model with its initial weights: here, ours."""
        return our_stages(self.config, core, self.here, vocabulary_size)

    @property
    def about(self) -> str:  # type: ignore[override]
        config = self.config
        precision, packed = config.train.precision, config.data.packing
        chosen = select.choose(config.model, self.here, precision, packed).value
        stream = ", 32-bit residuals" if precision is Precision.bf16 else ""
        rows = f"padded per step to multiples of {config.data.pad_multiple}"
        rows = "packed" if packed else rows
        return f"{chosen} attention, {precision.value} weights{stream}, {rows}"

    def batches(self, number: int) -> list[Batch]:
        return self.feed.step(number * self.config.train.global_batch_size)

    def placed(self, batches: list[Batch]) -> list[Batch]:
        return [batch.to(self.here) for batch in batches]

    def step(self, placed: list[Batch]) -> float:
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

    @property
    def about(self) -> str:  # type: ignore[override]
        is_te = _layers(self.here) is not bert_layer_specs.bert_layer_local_spec
        layers = "Transformer Engine's layers" if is_te else "its local layers, plain attention"
        return f"{layers}, {self.config.train.precision.value} weights"


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
