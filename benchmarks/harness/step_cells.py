"""Cells of train_step.py: the same global batches for every contestant.

h5ad files -> token store -> flat copy          (made before: build_store.py, cache_store.py)
flat copy -> sampler -> the cells of step n -> masked by our own rule -> micro batches, padded
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.config import Config
from geneformer_mcore.data.collate import make_batch, padded_length
from geneformer_mcore.data.loader import Feed, Share, budget
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.errors import DataError
from geneformer_mcore.model.flops import Workload
from geneformer_mcore.store.local_cache import FlatCopy
from geneformer_mcore.types import Batch, CellViews

_MANIFEST = "flat.json"


class StepCells:
    """Cells of any source that is read by rows, in the order of training. Step n takes those from
    n x global batch on."""

    def __init__(self, source: Any, config: Config, vocabulary_size: int) -> None:
        data, train = config.data, config.train
        masked, random, kept = data.mask_fractions
        self._source = source
        self._order = Sampler(0, len(source), data.span_cells, data.window_spans, train.seed)
        fractions = (masked, random, kept)
        self._masking = Masking(data.mask_probability, fractions, vocabulary_size, train.seed)
        self._seq_length, self._size = data.seq_length, train.global_batch_size

    def feed(self, config: Config) -> Feed:
        train = config.train
        share = Share(train.global_batch_size, train.micro_batch_size, data_rank=0, data_size=1)
        lengths = (config.data.seq_length, config.data.pad_multiple)
        given = (self._source, self._order, self._masking, share)
        return Feed(*given, *lengths, budget=budget(config))

    def step(self, number: int) -> tuple[CellViews, np.ndarray]:
        """The cells of a step, and the epoch (int64 [size]) that each is seen in."""
        taken = self._order.places(number * self._size, (number + 1) * self._size)
        cells = self._source.views(taken.rows)
        lengths_N = np.minimum(cells.lengths_N, self._seq_length)
        return CellViews(cells.tokens_T, cells.starts_N, lengths_N, cells.keys_N), taken.epochs

    def micro_batches(self, number: int, micro_batch: int, pad_multiple: int) -> list[Batch]:
        """A step's micro batches, each padded to its own longest cell, rounded up.

        pad_multiple: 0 pads to seq_length always
        """
        cells, epochs = self.step(number)
        starts = range(0, len(cells), micro_batch)
        parts = (np.s_[start : start + micro_batch] for start in starts)
        return [self._batch(cells, part, epochs[part], pad_multiple) for part in parts]

    def needed(self, number: int, num_predicted: int) -> Workload:
        """The work of a step's cells: real tokens, predicted positions only."""
        lengths_N = self.step(number)[0].lengths_N
        return Workload(int(lengths_N.sum()), int(np.square(lengths_N).sum()), num_predicted)

    def _batch(self, cells: CellViews, part: slice, epochs: np.ndarray, pad_multiple: int) -> Batch:
        lengths_N = cells.lengths_N[part]
        these = CellViews(cells.tokens_T, cells.starts_N[part], lengths_N, cells.keys_N[part])
        width = padded_length(int(lengths_N.max()), pad_multiple, self._seq_length)
        return make_batch(these, epochs, np.zeros(len(epochs), dtype=bool), self._masking, width)


def flat_copy(path: Path) -> Path:
    """The flat copy that `path` is, or the only one within. Raises DataError if there is none."""
    files = (path / _MANIFEST, *path.glob(f"*/{_MANIFEST}"))
    found = [file.parent for file in files if file.is_file()]
    if len(found) != 1:
        raise DataError(
            f"{path} holds no flat copy of tokens, or more than one. Remedy: python "
            f"data_prep/build_store.py --out STORE FILE.h5ad ..., python launch/cache_store.py "
            f"data.store=STORE data.cache_dir={path}"
        )
    return found[0].resolve()


def check(folder: Path, vocabulary_size: int, global_batch: int) -> None:
    """Raises DataError if these cells do not suit the model, or are too few for a step."""
    copy = FlatCopy(folder)
    if len(copy) < global_batch:
        raise DataError(
            f"{folder} holds {len(copy):,} cells, and a global batch takes {global_batch:,}: give "
            "more cells, or lower --global-batch."
        )
    largest = int(copy.read(0, len(copy)).tokens_T.max(initial=0))
    if largest >= vocabulary_size:
        raise DataError(
            f"{folder} holds token {largest:,}, and the model knows those below "
            f"{vocabulary_size:,}: make the copy with the vocabulary of the model."
        )
