"""Geneformer: Megatron-Core's BertModel with our layers, head and masked-only loss.

Batch -> embedding -> encoder layers of this stage -> [next stage ...] -> head -> loss per gene

head: hidden [S, B, H] -> rows of the selected positions [M, H] -> dense -> activation -> norm
      -> product with the word embedding + bias -> logits [M, V of this rank]

Six positions in seven are never predicted: skipping them saves 12 % (106M) to 35 % (10M) of a
step's arithmetic and nearly all of its memory for logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import megatron.core.models.bert.bert_model as megatron_bert
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_linear_layer
from torch import Tensor

from geneformer_mcore.config.sections import Attention, Config, ModelConfig, Norm
from geneformer_mcore.data.collate import positions_in_cells
from geneformer_mcore.model import fused, megatron_config
from geneformer_mcore.model.attention import select
from geneformer_mcore.model.layers import LayerNorm, final_norm, layer_spec, norm_embedding
from geneformer_mcore.types import Batch, padded_vocabulary_size


class PredictionHead(MegatronModule):
    """dense(H, H) -> activation -> LayerNorm, the same on every tensor rank.

    It sees gathered rows, so its gradients are whole on every rank, and its parameters have no
    `sequence_parallel` mark, which would make them TP times too large.
    """

    def __init__(
        self, hidden_size: int, config: TransformerConfig, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(config=config)
        self.dense = get_linear_layer(hidden_size, hidden_size, config.init_method)
        self.dense.to(config.params_dtype)
        self.activation = activation
        self.layer_norm = LayerNorm(
            config, hidden_size, config.layernorm_epsilon, sequence_parallel=False
        )

    def forward(self, rows_MH: Tensor) -> Tensor:
        """rows_MH: [M, H]. Same shape out."""
        return self.layer_norm(self.activation(self.dense(rows_MH)))


def selected_rows(hidden_SBH: Tensor, selected_M: Tensor, config: TransformerConfig) -> Tensor:
    """[M, H]: the hidden states at the flat positions `b * S + s` of `selected_M` (int64)."""
    if config.sequence_parallel:
        # What follows is equal on every tensor rank, so the gradient of a gathered row is whole:
        # it is split in the backward pass, not added up.
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=False
        )
    num_positions, num_cells, width = hidden_SBH.shape
    place = (selected_M % num_positions) * num_cells + selected_M // num_positions
    return hidden_SBH.reshape(-1, width).index_select(0, place)


def padding_bias(first_id: int, num_here: int, num_real: int) -> Tensor:
    """fp32 [num_here]: 0 for real tokens, -inf for the rows that pad the vocabulary. Added to the
    output bias (it is no parameter, as that must be finite), it gives padding probability 0."""
    ids = torch.arange(first_id, first_id + num_here)
    return torch.where(ids < num_real, 0.0, float("-inf"))


class Geneformer(megatron_bert.BertModel):
    """One pipeline stage (or model chunk) of the model.

    vocabulary_size: real tokens, specials included; the embedding has `padded_size` rows.
    seq_length:      learned absolute positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        core: Attention,
        vocabulary_size: int,
        seq_length: int,
        padded_size: int | None = None,
        first: bool = True,
        last: bool = True,
        chunk: int | None = None,
    ) -> None:
        activation = megatron_config.ACTIVATIONS[model.head_activation or model.activation]
        with _own_head(activation):
            super().__init__(
                config=config,
                num_tokentypes=0,
                transformer_layer_spec=_block(config, core, model.norm, chunk),
                vocab_size=padded_size or padded_vocabulary_size(vocabulary_size),
                max_sequence_length=seq_length,
                pre_process=first,
                post_process=last,
                share_embeddings_and_output_weights=True,
                add_binary_head=False,
                vp_stage=chunk,
            )
        if first and model.norm is Norm.post:
            norm_embedding(self.embedding, config)
        if last:
            num_here = self.output_layer.output_size_per_partition
            first_id = parallel_state.get_tensor_model_parallel_rank() * num_here
            padding_V = padding_bias(first_id, num_here, vocabulary_size)
            self.register_buffer("padding_V", padding_V, persistent=False)

    def _sanity_check_attention_and_get_attn_mask_dimension(self) -> str:
        return "b11s"

    def _set_attention_backend(self) -> None:
        """Leave TE's kernels to select.core_attention: Megatron would allow the unfused one."""

    def forward(self, batch: Batch) -> Tensor:
        """fp32 [M], loss in nats, on the last stage; on others the residual stream [S, B, H]."""
        hidden_SBH = self.encode(batch)
        if not self.post_process:
            return hidden_SBH
        return self.loss(hidden_SBH, batch)

    def loss(self, hidden_SBH: Tensor, batch: Batch) -> Tensor:
        """fp32 [M], nats for every selected gene."""
        if self.config.bias_dropout_fusion and self.config.tensor_model_parallel_size == 1:
            logits_MV = self._logits(hidden_SBH, batch.selected_M)
            return fused.chosen(fused.cross_entropy, True)(logits_MV, batch.labels_M)
        logits_MV = self.logits(hidden_SBH, batch.selected_M)
        return tensor_parallel.vocab_parallel_cross_entropy(logits_MV, batch.labels_M)

    def encode(self, batch: Batch) -> Tensor:
        """Residual stream [S, B, H] after this stage; after the last one normalised, in the dtype
        of the weights. Under sequence parallel S is this rank's share."""
        cells = select.packed_cells(batch)
        embedded = None
        if self.pre_process:
            embedded = self.embedding(
                input_ids=batch.tokens_BS.long(), position_ids=positions_in_cells(batch)
            )
        return self.encoder(
            hidden_states=embedded,
            attention_mask=padding_mask(batch) if cells is None else None,
            packed_seq_params=cells,
        )

    def logits(self, hidden_SBH: Tensor, selected_M: Tensor) -> Tensor:
        """fp32 [M, V]: this tensor rank's columns of the gene logits, padding at -inf."""
        return self._logits(hidden_SBH, selected_M).float()

    def _logits(self, hidden_SBH: Tensor, selected_M: Tensor) -> Tensor:
        rows_MH = self.lm_head(selected_rows(hidden_SBH, selected_M, self.config))
        return tensor_parallel.linear_with_grad_accumulation_and_async_allreduce(
            input=rows_MH,
            weight=self.shared_embedding_or_output_weight(),
            bias=self.output_layer.bias + self.padding_V,
            gradient_accumulation_fusion=False,
            # The rows are gathered: every tensor rank has all of them.
            allreduce_dgrad=self.config.tensor_model_parallel_size > 1,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )


def padding_mask(batch: Batch) -> Tensor:
    places_S = torch.arange(batch.tokens_BS.shape[1], device=batch.tokens_BS.device)
    return (places_S >= batch.lengths_N[:, None])[:, None, None, :]


def build(
    model: ModelConfig,
    config: TransformerConfig,
    device: torch.device,
    vocabulary_size: int,
    seq_length: int,
    padded_size: int | None = None,
    packed: bool = False,
    kind: type[Geneformer] | None = None,
) -> list[Geneformer]:
    """This rank's part of the model, one entry per model chunk, on `device`.

    padded_size: rows of the embedding, default `types.padded_vocabulary_size`
    packed: attention is chosen for packed cells;  kind: class of the stages
    """
    core = select.choose(model, device, megatron_config.precision_of(config), packed)
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = config.virtual_pipeline_model_parallel_size or 1
    stages = []
    for chunk in range(chunks):
        stage = (kind or Geneformer)(
            config,
            model,
            core,
            vocabulary_size,
            seq_length,
            padded_size,
            first=rank == 0 and chunk == 0,
            last=rank == pipeline - 1 and chunk == chunks - 1,
            chunk=chunk if chunks > 1 else None,
        )
        # Megatron builds positions and the dense layer of the head in torch's default dtype.
        stages.append(stage.to(device=device, dtype=config.params_dtype))
    return stages


def build_for(
    config: Config, device: torch.device, vocabulary_size: int, kind: type[Geneformer] | None = None
) -> list[Geneformer]:
    """This rank's part of the model of a run."""
    data, precision = config.data, config.train.precision
    core = megatron_config.transformer_config(config.model, config.parallel, precision, device)
    return build(
        config.model, core, device, vocabulary_size, data.seq_length, None, data.packing, kind
    )


def _block(
    config: TransformerConfig, core: Attention, norm: Norm, chunk: int | None
) -> TransformerBlockSubmodules:
    num_layers = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(core, norm)] * num_layers, layer_norm=final_norm(norm)
    )


@contextlib.contextmanager
def _own_head(activation: Any) -> Iterator[None]:
    # BertModel builds its head by name, with gelu and a norm that refuses sequence parallelism.
    theirs = megatron_bert.BertLMHead
    megatron_bert.BertLMHead = partial(PredictionHead, activation=activation)
    try:
        yield
    finally:
        megatron_bert.BertLMHead = theirs
