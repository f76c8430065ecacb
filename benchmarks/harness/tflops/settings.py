"""The rows of tflops.py: every combination of the requested values, and the cells to train on.

models x precisions x packings x lengths x attentions x dropouts x micro batches x compiled
       -> Setting ... -> the card's settings with that changed
cells: made up, all of full length or of lengths like real ones', or those of a flat copy
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness.common import CONFIGS, VOCABULARY
from geneformer_mcore.config import Config, load, plan
from geneformer_mcore.types import CLS, NUM_SPECIALS, CellViews, RaggedCells

if TYPE_CHECKING:
    from geneformer_mcore.store.local_cache import FlatCopy

PACKINGS = ("padded", "packed")
FULL = 0
"""Instead of a mean: every cell has as many tokens as fit."""
MEAN_TOKENS = 1300
"""Of packed cells, by default: packing cells of full length would show nothing."""

_FILLED = 0.95
"""A packed step gets as many cells as fill its micro batches to this share on average, since cells
of a step may be longer than usual."""
_NUM_CELLS = 1024
_LOG_SPREAD = 0.5
"""Standard deviation of log(genes) of a cell: 0.31 in blood (pbmc3k), 0.29 in bone marrow, 0.56 in
lung; of several tissues together it is more than of one."""


@dataclass(frozen=True)
class Setting:
    """One row.

    mean_length:   tokens of a cell on average, or FULL; of no account with cells of a flat copy
    micro_batch:   cells of a padded micro batch; a packed one has room for as many of full length
    compiled:      model.compile; None: its default
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
        """Its changes of the card's settings.

        mean_tokens: of a cell, by which a packed step has cells for so many micro batches
        """
        cells = self.micro_batch * num_micro_batches
        if self.packing == "packed":
            cells = max(1, int(_FILLED * cells * seq_length / mean_tokens))
        optional = {"model.compile": self.compiled, "model.attention_dropout": self.dropout}
        return [
            f"train.precision={self.precision}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.global_batch_size={cells}",
            f"data.seq_length={seq_length}",
            f"data.packing={str(self.packing == 'packed').lower()}",
            f"model.attention={self.attention}",
            *(
                f"{key}={str(value).lower()}"
                for key, value in optional.items()
                if value is not None
            ),
        ]

    def as_json(self) -> dict[str, Any]:
        """Its fields; the attention as requested."""
        return {
            "model": self.model,
            "precision": self.precision,
            "packing": self.packing,
            "attention": self.attention,
            "attention_dropout": self.dropout,
            "micro_batch": self.micro_batch,
            "compiled": self.compiled,
        }


@dataclass(frozen=True)
class Conditions:
    """Conditions of every row.

    flat:      cells of a flat copy; None: made-up ones, by each setting
    seconds:   no row is begun later than this after the first; None: all are
    out:       file that is kept up to date; None: none
    """

    seq_length: int
    num_micro_batches: int
    steps: int
    warmup: int
    flat: Cells | None = None
    seconds: float | None = None
    out: Path | None = None

    def config(self, setting: Setting) -> Config:
        """All settings of a row. Raises ConfigError for what no run can have."""
        mean = self.flat.mean_tokens if self.flat else setting.mean_length or self.seq_length
        changes = setting.changes(self.seq_length, mean, self.num_micro_batches)
        config = load(CONFIGS[setting.model], changes)[0]
        plan(config, world_size=1)
        return config

    def cells(self, setting: Setting) -> Cells:
        """The cells of a row."""
        return self.flat or made_up(setting.mean_length, self.seq_length, VOCABULARY)


def grid(arguments: argparse.Namespace, on_gpu: bool) -> list[Setting]:
    """Every combination of tflops.py's options, in the order of the fields, with this machine's
    defaults: full cells if padded, MEAN_TOKENS if packed; the card's micro batches on a GPU, and
    what takes seconds on a CPU, where two cells are the least that can be packed."""
    models = arguments.model or (["106m", "10m"] if on_gpu else ["10m"])
    precisions = arguments.precision or (["bf16"] if on_gpu else ["fp32"])
    # torch has no fused attention with dropout on a CPU: show what the card's dropout costs there.
    dropouts = arguments.attention_dropout or ([None] if on_gpu else [None, 0.0])
    compiled = [{"auto": None, "no": False, "yes": True}[word] for word in arguments.compile]
    found = []
    for model, precision, packing in itertools.product(models, precisions, arguments.packing):
        usual = [FULL] if packing == "padded" or arguments.cells else [MEAN_TOKENS]
        sizes = [{"10m": 32, "106m": 16}[model] if on_gpu else 1 + (packing == "packed")]
        others = itertools.product(
            *(arguments.lengths or usual, arguments.attention, dropouts),
            *(arguments.micro_batch or sizes, compiled),
        )
        found += [Setting(model, precision, packing, *other) for other in others]
    return found


# Cells


@dataclass(frozen=True)
class Cells:
    """Cells to train on, and their name in tables. mean_tokens: cut off at seq_length."""

    source: MadeUpCells | FlatCopy
    label: str
    mean_tokens: float


class MadeUpCells:
    """Cells of the given numbers of tokens: [CLS], then different genes in a random order.
    Implements contracts.RandomAccess."""

    def __init__(self, lengths_N: np.ndarray, vocabulary_size: int) -> None:
        genes = np.arange(NUM_SPECIALS, vocabulary_size, dtype=np.uint16)
        np.random.default_rng(0).shuffle(genes)
        self.num_cells = len(lengths_N)
        starts_N = np.cumsum(lengths_N) - lengths_N
        self._starts_N, self._lengths_N = starts_N, lengths_N.astype(np.int64)
        self._keys_N = np.arange(self.num_cells, dtype=np.uint64)
        self._tokens_T = np.full(int(lengths_N.sum()), CLS, np.uint16)
        for row, (start, length) in enumerate(zip(starts_N, lengths_N, strict=True)):
            places = (row * 37 + np.arange(length - 1)) % len(genes)
            self._tokens_T[start + 1 : start + length] = genes[places]

    def __len__(self) -> int:
        return self.num_cells

    def views(self, rows: np.ndarray) -> CellViews:
        """The cells of `rows`."""
        return CellViews(
            self._tokens_T, self._starts_N[rows], self._lengths_N[rows], self._keys_N[rows]
        )

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1."""
        return self.views(np.arange(start, stop)).ragged()


def made_up(mean: int, seq_length: int, vocabulary_size: int) -> Cells:
    """Cells of `mean` tokens on average, at most seq_length each; FULL: all of seq_length."""
    if mean == FULL:
        lengths_N, label = np.full(_NUM_CELLS, seq_length), "made up, full length"
    else:
        lengths_N, label = like_real(mean, seq_length), f"made up, mean {mean:,}"
    return Cells(_made(tuple(lengths_N), vocabulary_size), label, float(lengths_N.mean()))


@lru_cache(maxsize=4)
def _made(lengths: tuple[int, ...], vocabulary_size: int) -> MadeUpCells:
    return MadeUpCells(np.array(lengths), vocabulary_size)


def like_real(mean: int, seq_length: int, num_cells: int = _NUM_CELLS) -> np.ndarray:
    """int64 [num_cells]: tokens of cells, log-normal, cut off at seq_length as a store cuts them,
    with that mean to about a token. mean: 2..seq_length."""
    normal = NormalDist(sigma=_LOG_SPREAD)
    quantiles = [normal.inv_cdf((place + 0.5) / num_cells) for place in range(num_cells)]
    spread = np.exp(np.random.default_rng(1).permutation(quantiles))
    low, high = 1.0, seq_length * math.exp(8 * _LOG_SPREAD)
    for _ in range(60):
        middle = math.sqrt(low * high)
        if _cut(spread * middle, seq_length).mean() < mean:
            low = middle
        else:
            high = middle
    return _cut(spread * high, seq_length)


def _cut(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    return np.clip(np.rint(lengths), 2, seq_length).astype(np.int64)


def of_flat_copy(folder: Path, seq_length: int) -> Cells:
    """Those of a flat copy. Raises DataError if there is no sound one."""
    from geneformer_mcore.store.local_cache import FlatCopy

    source = FlatCopy(folder)
    lengths_N = source.views(np.arange(len(source))).lengths_N
    mean = float(np.minimum(lengths_N, seq_length).mean())
    return Cells(source, f"flat copy {folder.name}, mean {mean:,.0f}", mean)
