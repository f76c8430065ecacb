"""Geneformer with a classifier of cells on top.

    hidden [S, B, H] -> mean over the genes of each cell, or its [CLS] [N, H] -> dropout -> linear
                     -> logits [N, C] -> cross entropy of the selected cells [M]

Its batches select the [CLS] of every target cell, with the cell's class as label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geneformer_mcore.config.sections import FinetuneConfig
from geneformer_mcore.data.collate import cells_of
from geneformer_mcore.model import forward_only, lora
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.types import Batch

_HEAD = "class_head."


class ClassHead(torch.nn.Module):
    """dropout -> linear(H, C), equal on all tensor ranks, with whole gradients on each."""

    def __init__(self, hidden_size: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weight = torch.nn.Parameter(torch.zeros(num_classes, hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(num_classes))

    def forward(self, cells_NH: Tensor) -> Tensor:
        """cells_NH: fp32. fp32 [N, C], with the product in the dtype of the weights."""
        kept_NH = F.dropout(cells_NH, self.dropout, self.training)
        return F.linear(kept_NH.to(self.weight.dtype), self.weight, self.bias).float()


class CellClassifier(Geneformer):
    """The stage of a classifier of cells, after `add_head`; the head for genes stays untrained."""

    def add_head(self, num_classes: int, tune: FinetuneConfig) -> None:
        """Call after pretrained weights are loaded, or before those of a fine-tuned model."""
        head = ClassHead(self.config.hidden_size, num_classes, tune.dropout)
        word = self.embedding.word_embeddings.weight
        self.class_head = head.to(device=word.device, dtype=self.config.params_dtype)
        self.pooling = tune.pooling

    def loss(self, hidden_SBH: Tensor, batch: Batch) -> Tensor:
        """fp32 [M], nats for every selected cell."""
        return F.cross_entropy(
            self.asked_logits(hidden_SBH, batch), batch.labels_M, reduction="none"
        )

    def asked_logits(self, hidden_SBH: Tensor, batch: Batch) -> Tensor:
        """fp32 [M, C] of the selected cells."""
        return self.class_logits(hidden_SBH, batch)[cells_of(batch, batch.selected_M)]

    def class_logits(self, hidden_SBH: Tensor, batch: Batch) -> Tensor:
        """fp32 [N, C] of every cell of the batch; each must have a gene."""
        whole_SBH = forward_only.whole(hidden_SBH, self)
        return self.class_head(forward_only.pool(whole_SBH, batch, self.pooling))


def probabilities(hidden_SBH: Tensor, batch: Batch, stage: Geneformer) -> Tensor:
    """fp32 [N, C] (an forward_only.Finish)."""
    assert isinstance(stage, CellClassifier)
    return stage.class_logits(hidden_SBH, batch).softmax(dim=1)


def is_new(name: str) -> bool:
    """Whether a parameter, by its name in the whole model, is not a pretrained one."""
    return name.startswith(_HEAD) or name.endswith(lora.NAMES)


def freeze(stage: Geneformer, tune: FinetuneConfig) -> None:
    """Freeze parameters by the settings, and the head for genes always."""
    layers, count = list(stage.encoder.layers), tune.frozen_layers
    frozen: list[torch.nn.Module] = [stage.lm_head, stage.output_layer]
    if count:
        frozen += [stage.embedding, *layers[:count]]
    if count == len(layers) and stage.encoder.final_layernorm is not None:
        frozen.append(stage.encoder.final_layernorm)
    for module in frozen:
        module.requires_grad_(requires_grad=False)
    if tune.lora_rank:
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_(is_new(name))
