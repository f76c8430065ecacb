"""Cells of train_step.py: the same global batches for every contestant.

h5ad files + vocabulary -> token store -> flat copy          (made once, by `make`)
flat copy -> Order -> the cells of step n -> masked by our own rule -> micro batches, padded
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.common import build_store
from geneformer_mcore.config import Config
from geneformer_mcore.data.collate import make_batch, padded_length
from geneformer_mcore.data.loader import Feed, Share, budget
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.model.flops import Workload
from geneformer_mcore.store.local_cache import FlatCopy
from geneformer_mcore.types import Batch, CellViews

_MANIFEST = "flat.json"


@dataclass(frozen=True)
class StepCells:
    """Cells of a flat copy in the order of training. Step n takes those from n x size on."""

    source: Any
    order: Sampler
    masking: Masking
    seq_length: int
    size: int

    @classmethod
    def open(cls, folder: str | Path, config: Config, vocabulary_size: int) -> StepCells:
        """Raises DataError if there is no sound flat copy in `folder`."""
        return cls.of(FlatCopy(folder), config, vocabulary_size)

    @classmethod
    def of(cls, source: Any, config: Config, vocabulary_size: int) -> StepCells:
        """Cells of any source that is read by rows."""
        data, train = config.data, config.train
        masked, random, kept = data.mask_fractions
        return cls(
            source,
            Sampler(0, len(source), data.span_cells, data.window_spans, train.seed),
            Masking(data.mask_probability, (masked, random, kept), vocabulary_size, train.seed),
            data.seq_length,
            train.global_batch_size,
        )

    def feed(self, config: Config) -> Feed:
        """The feed of training over these cells, on one rank."""
        train = config.train
        share = Share(train.global_batch_size, train.micro_batch_size, data_rank=0, data_size=1)
        lengths = (config.data.seq_length, config.data.pad_multiple)
        return Feed(self.source, self.order, self.masking, share, *lengths, budget=budget(config))

    def step(self, number: int) -> tuple[CellViews, np.ndarray]:
        """The cells of a step, and the epoch (int64 [size]) that each is seen in."""
        places = self.order.places(number * self.size, (number + 1) * self.size)
        cells = self.source.views(places.rows)
        lengths_N = np.minimum(cells.lengths_N, self.seq_length)
        return CellViews(cells.tokens_T, cells.starts_N, lengths_N, cells.keys_N), places.epochs

    def micro_batches(
        self, number: int, micro_batch: int, pad_multiple: int, by_length: bool = False
    ) -> list[Batch]:
        """A step's micro batches, each padded to its own longest cell, rounded up.

        pad_multiple: 0 pads to seq_length always;  by_length: cells of like length go together
        """
        cells, epochs = self.step(number)
        order = np.argsort(cells.lengths_N, kind="stable") if by_length else np.arange(len(cells))
        parts = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
        return [self._batch(_those(cells, part), epochs[part], pad_multiple) for part in parts]

    def needed(self, number: int, num_predicted: int) -> Workload:
        """The work of a step's cells: real tokens, predicted positions only."""
        cells, _ = self.step(number)
        lengths_N = cells.lengths_N
        return Workload(int(lengths_N.sum()), int(np.square(lengths_N).sum()), num_predicted)

    def _batch(self, cells: CellViews, epochs: np.ndarray, pad_multiple: int) -> Batch:
        width = padded_length(int(cells.lengths_N.max()), pad_multiple, self.seq_length)
        return make_batch(cells, epochs, np.zeros(len(cells), dtype=bool), self.masking, width)


def _those(cells: CellViews, which: np.ndarray) -> CellViews:
    return CellViews(
        cells.tokens_T, cells.starts_N[which], cells.lengths_N[which], cells.keys_N[which]
    )


def find(paths: Sequence[Path]) -> Path | None:
    """The flat copy that `paths` is, or the only one within; None if it is something else."""
    if len(paths) != 1:
        return None
    found = [file.parent for file in (paths[0] / _MANIFEST, *paths[0].glob(f"*/{_MANIFEST}"))]
    found = [folder for folder in found if (folder / _MANIFEST).is_file()]
    return found[0] if len(found) == 1 else None


def flat_copy(path: Path) -> Path:
    """The flat copy in `path`. Raises DataError if there is none, or more than one."""
    found = find([path])
    if found is None:
        raise DataError(f"{path} holds no flat copy of tokens, or more than one.")
    return found


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


def make(inputs: Sequence[Path], vocabulary: Path | None, work: Path) -> Path:
    """A flat copy of a store of `inputs`, both made in `work` unless they are there.

    vocabulary: file of genes and medians; None: those of the inputs
    Raises ConfigError if `work` holds other cells, and DataError if they cannot be made.
    """
    wanted = {
        "inputs": [[path.name, _size(path)] for path in inputs],
        "vocabulary": vocabulary.name if vocabulary else "of the cells",
    }
    about = work / "cells.json"
    if about.is_file() and json.loads(about.read_text()) != wanted:
        raise ConfigError(
            f"{work} holds other cells than the requested ones. Name another folder with --work, "
            "or empty this one."
        )
    if not about.is_file():
        work.mkdir(parents=True, exist_ok=True)
        options = ("--overwrite", "--strict")
        ended = subprocess.run(build_store(work / "store", inputs, vocabulary, *options))
        if ended.returncode:
            raise DataError(f"build_store.py ended with {ended.returncode}: see its output above.")
        about.write_text(json.dumps(wanted))
    return _flat_copy(work)


def _size(path: Path) -> int:
    if not path.exists():
        raise DataError(f"{path} is not there: give a flat copy, or files of counts.")
    return path.stat().st_size


def _flat_copy(work: Path) -> Path:
    # Only here: a machine to which a flat copy is carried has no TileDB.
    from geneformer_mcore.store.local_cache import ensure
    from geneformer_mcore.store.reader import TokenStore

    store = TokenStore.open(work / "store")
    manifest = store.manifest
    return ensure(store, manifest.content_hash, manifest.tokens, work / "flat").folder
