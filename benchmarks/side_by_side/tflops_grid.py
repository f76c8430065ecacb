"""The rows of tflops.py's table: every combination of what was asked for, and what it means here.

models x precisions x packings x lengths x attentions x dropouts x compiled x micro batches
       -> Setting ...
Setting -> the card's settings with that changed -> a reason why it cannot be, or none
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.side_by_side.sizes import CONFIGS
from benchmarks.side_by_side.tflops_cells import FULL
from geneformer_mcore.config import Config, load, plan
from geneformer_mcore.errors import GeneformerError

if TYPE_CHECKING:
    import torch

PACKINGS = ("padded", "packed")
MEAN_TOKENS = 1300
"""Of packed cells, unless it is said: packing cells of full length would show nothing."""

_FILLED = 0.95
"""A packed step gets as many cells as fill its micro batches to this share on average, since cells
of a step may be longer than usual."""


@dataclass(frozen=True)
class Asked:
    """What makes the rows. Empty `lengths`: full ones if padded, MEAN_TOKENS if packed; None among
    the dropouts: the card's; empty `micro_batches`: the usual ones of the model."""

    models: Sequence[str]
    precisions: Sequence[str]
    packings: Sequence[str]
    lengths: Sequence[int]
    attentions: Sequence[str]
    dropouts: Sequence[float | None]
    micro_batches: Sequence[int]
    compiled: Sequence[bool | None] = (None,)


@dataclass(frozen=True)
class Setting:
    """One row.

    mean_length:   tokens of a cell on average, or FULL; of no account with cells of a flat copy
    micro_batch:   cells of a padded micro batch; a packed one has room for as many of full length
    compiled:      model.compile; None: as it is by default
    """

    model: str
    precision: str
    packing: str
    mean_length: int
    attention: str
    dropout: float | None
    micro_batch: int
    compiled: bool | None = None

    def changes(self, seq_length: int, mean_tokens: float, num_micro_batches: int) -> list[str]:
        """What it changes of the card's settings.

        mean_tokens: of a cell, by which a packed step has cells for so many micro batches
        """
        cells = self.micro_batch * num_micro_batches
        if self.packing == "packed":
            cells = max(1, int(_FILLED * cells * seq_length / mean_tokens))
        dropout = [] if self.dropout is None else [f"model.attention_dropout={self.dropout}"]
        return [
            f"train.precision={self.precision}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.global_batch_size={cells}",
            f"data.seq_length={seq_length}",
            f"data.packing={str(self.packing == 'packed').lower()}",
            f"model.attention={self.attention}",
            *([] if self.compiled is None else [f"model.compile={str(self.compiled).lower()}"]),
            *dropout,
        ]


def usual(on_gpu: bool) -> dict[str, Any]:
    """What is measured unless it is said."""
    if on_gpu:
        return {"models": ["106m", "10m"], "precisions": ["bf16"], "dropouts": [None]}
    # torch has no fused attention with dropout on a CPU: show what the card's dropout costs there.
    return {"models": ["10m"], "precisions": ["fp32"], "dropouts": [None, 0.0]}


def usual_micro_batches(model: str, packing: str, on_gpu: bool) -> list[int]:
    """The card's on a GPU, and what takes seconds on a CPU; but there is nothing to pack in one."""
    if on_gpu:
        return {"10m": [32], "106m": [16]}[model]
    return [1] if packing == "padded" else [2]


def grid(asked: Asked, on_gpu: bool) -> list[Setting]:
    """Every combination, in the order of the fields."""
    found = []
    for model, precision, packing in itertools.product(
        asked.models, asked.precisions, asked.packings
    ):
        lengths = asked.lengths or [FULL if packing == "padded" else MEAN_TOKENS]
        sizes = asked.micro_batches or usual_micro_batches(model, packing, on_gpu)
        others = itertools.product(lengths, asked.attentions, asked.dropouts, sizes, asked.compiled)
        found += [Setting(model, precision, packing, *other) for other in others]
    return found


def config_of(
    setting: Setting, seq_length: int, mean_tokens: float, num_micro_batches: int
) -> Config:
    """All settings of a row. Raises ConfigError for what no run can have."""
    changes = setting.changes(seq_length, mean_tokens, num_micro_batches)
    config = load(CONFIGS[setting.model], changes)[0]
    plan(config, world_size=1)
    return config


def why_not(config: Config, here: torch.device) -> str:
    """Why it cannot be measured on this machine; "" if it can."""
    from geneformer_mcore.model.attention import select

    try:
        select.choose(config.model, here, config.train.precision, config.data.packing)
    except GeneformerError as error:
        return str(error)
    return ""
