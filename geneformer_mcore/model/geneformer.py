"""Geneformer: Megatron-Core's BertModel with our layers, head and masked-only loss.

Batch -> embedding -> encoder layers of this stage -> [next stage ...] -> head -> loss per gene

Head and loss: masked_gene_loss.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import megatron.core.models.bert.bert_model as megatron_bert
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from geneformer_mcore.config.sections import Attention, Config, ModelConfig, Norm
from geneformer_mcore.data.collate import positions_in_cells
from geneformer_mcore.model import megatron_config
from geneformer_mcore.model.attention import select
from geneformer_mcore.model.layers import final_norm, layer_spec, norm_embedding
from geneformer_mcore.model.masked_gene_loss import (
    PredictionHead,
    is_fused,
    masked_gene_loss,
    padding_bias,
    selected_rows,
)
from geneformer_mcore.types import Batch, padded_vocabulary_size


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
        # The fused loss takes logits of any dtype; Megatron's wants fp32.
        logits = self._logits if is_fused(self.config) else self.logits
        return masked_gene_loss(logits(hidden_SBH, batch.selected_M), batch.labels_M, self.config)

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
