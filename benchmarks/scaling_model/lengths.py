"""How many tokens real cells have: 1 + expressed genes, at most the sequence's length.

h5ad files          ->  counts above zero per cell, [CLS] added, cut
a flat copy         ->  as stored, cut
the demo's store    ->  the same
nothing of these    ->  a made-up distribution, and said
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling_model.hardware import SEQ_LENGTH
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.local_cache import FlatCopy
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.tokenizer.corpus import InputOptions

DEMO_STORE = Path(__file__).resolve().parents[2] / "build" / "demo" / "store"
MADE_UP_CELLS = 8192


@dataclass(frozen=True)
class Corpus:
    """lengths: int64, tokens of each cell; source: what they are of."""

    lengths: np.ndarray
    source: str

    def as_json(self) -> dict[str, Any]:
        """Number, mean and spread."""
        quantiles = np.quantile(self.lengths, (0.1, 0.5, 0.9)).tolist()
        return {
            "source": self.source,
            "cells": len(self.lengths),
            "tokens_mean": float(self.lengths.mean()),
            "tokens_10_50_90": quantiles,
        }


def corpus(files: Sequence[Path], tokens: Path | None) -> Corpus:
    """The lengths of the named cells, or of the best there is. Raises DataError if there is none
    that can be read."""
    if files:
        lengths = np.concatenate([_of_counts(path) for path in files])
        return Corpus(lengths, ", ".join(path.name for path in files))
    if tokens:
        return _cut(_all_lengths(FlatCopy(tokens)), f"flat copy {tokens.name}")
    if DEMO_STORE.is_dir():
        with TokenStore.open(DEMO_STORE) as store:
            return _cut(_all_lengths(store), "the demo's store")
    return Corpus(made_up(), "made up: 30 % N(850, 250), 70 % N(2000, 350), cut")


def made_up() -> np.ndarray:
    """int64: short cells of one kind, long ones of another, a part of them cut, as four public data
    sets have them together."""
    rng = np.random.default_rng(0)
    short = rng.random(MADE_UP_CELLS) < 0.3
    lengths = rng.normal(np.where(short, 850, 2000), np.where(short, 250, 350))
    return np.clip(lengths.astype(np.int64), 20, SEQ_LENGTH)


def _of_counts(path: Path) -> np.ndarray:
    with InputOptions(allow_normalised=True).open(path) as counts:
        lengths = [
            # An entry may be an explicit zero: no expressed gene.
            1
            + np.add.reduceat(np.append(block.data > 0, 0), block.indptr[:-1])
            * (np.diff(block.indptr) > 0)
            for block in counts.blocks()
        ]
    if not lengths:
        raise DataError(f"{path.name} holds no cell: name files that do.")
    return np.minimum(np.concatenate(lengths), SEQ_LENGTH).astype(np.int64)


def _all_lengths(cells: FlatCopy | TokenStore) -> np.ndarray:
    return cells.lengths(np.arange(len(cells)))


def _cut(lengths: np.ndarray, source: str) -> Corpus:
    if not len(lengths):
        raise DataError(f"{source} holds no cell: name one that does.")
    return Corpus(np.minimum(lengths, SEQ_LENGTH), source)
