"""How long the real feed takes for one rank of many, packed, measured here.

    real lengths -> a flat copy of made-up tokens on disk
      -> for rank 0 of 64 and of 128: global batch after global batch, one thread
      -> seconds per step: places, lengths and packing of the whole global batch, and its own cells

Packing makes two things of the whole batch every rank's: its lengths, and dealing them. In the
first epoch every rank also checks the sum of every block that holds one of its cells; packed, its
cells come from everywhere, so in the end of every block.

Seconds are those of the thread on a processor, so that other work on the machine does not count.
Waiting for a disk would not count either: the files were just written, and lie in memory.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.scaling_model.hardware import SEQ_LENGTH, VOCABULARY
from geneformer_mcore.config.sections import DataConfig
from geneformer_mcore.data.loader import Budget, Feed, Share
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.packing import pack
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.store import local_cache
from geneformer_mcore.types import CLS, NUM_SPECIALS, RaggedCells

CELLS = 32_768
"""One window of the default settings."""
REPEATS = 3
_DATA = DataConfig()


class MadeUpTokens:
    """Cells of given lengths, of random genes (flat.Copyable)."""

    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1."""
        offsets = np.concatenate([[0], np.cumsum(self._lengths[start:stop])])
        rng = np.random.default_rng(start)
        tokens_T = rng.integers(NUM_SPECIALS, VOCABULARY, offsets[-1], dtype=np.uint16)
        tokens_T[offsets[:-1]] = CLS
        return RaggedCells(tokens_T, offsets, np.arange(start, stop, dtype=np.uint64))


def measure(lengths: np.ndarray, ranks: int, budget: int, global_batch: int) -> dict[str, float]:
    """Seconds of rank 0 of `ranks`, with micro batches of `budget` tokens.

    places_s, lengths_s, pack_s:  of the whole global batch, in every rank
    step_s:         all of one rank's step, once every block was checked
    first_epoch_s:  the same in the first epoch, means over it
    cells_per_s:    this rank's cells over what is left of a step
    """
    rng = np.random.default_rng(0)
    cells = MadeUpTokens(rng.choice(lengths, CELLS))
    num_tokens = int(cells.read(0, CELLS).offsets[-1])
    with tempfile.TemporaryDirectory() as cache:
        local_cache.ensure(cells, "0" * 64, num_tokens, cache)
        (folder,) = (path for path in Path(cache).iterdir() if path.is_dir())
        return _one_rank(folder, ranks, budget, global_batch)


def _one_rank(folder: Path, ranks: int, budget: int, global_batch: int) -> dict[str, float]:
    _feed(local_cache.FlatCopy(folder), ranks, budget, global_batch).step(0)  # compiles
    copy = local_cache.FlatCopy(folder)
    feed = _feed(copy, ranks, budget, global_batch)
    epoch = range(0, CELLS - global_batch + 1, global_batch)
    first = [_timed(feed.step, at) for at in epoch]
    later = [_timed(feed.step, CELLS + at) for _ in range(REPEATS) for at in epoch]
    whole = _whole_batch(copy, feed.order, ranks, budget, global_batch)
    step_s = statistics.median(later)
    rest_s = max(step_s - sum(whole.values()), 1e-9)
    return {
        **whole,
        "step_s": step_s,
        "first_epoch_s": statistics.mean(first),
        "cells_per_s": global_batch / ranks / rest_s,
    }


def _whole_batch(
    copy: local_cache.FlatCopy, order: Sampler, ranks: int, budget: int, size: int
) -> dict[str, float]:
    """Medians of what every rank does for the whole global batch."""
    seconds: dict[str, list[float]] = {"places_s": [], "lengths_s": [], "pack_s": []}
    for start in range(0, CELLS - size + 1, size):
        seconds["places_s"].append(_timed(order.places, start, start + size))
        rows = order.places(start, start + size).rows
        seconds["lengths_s"].append(_timed(copy.lengths, rows))
        lengths_N = np.minimum(copy.lengths(rows), SEQ_LENGTH)
        seconds["pack_s"].append(_timed(pack, lengths_N, budget, ranks))
    return {name: statistics.median(each) for name, each in seconds.items()}


def _feed(copy: local_cache.FlatCopy, ranks: int, budget: int, global_batch: int) -> Feed:
    masked, random, kept = _DATA.mask_fractions
    return Feed(
        copy,
        Sampler(0, CELLS, _DATA.span_cells, _DATA.window_spans, 0),
        Masking(_DATA.mask_probability, (masked, random, kept), VOCABULARY, 0),
        Share(global_batch, budget // SEQ_LENGTH, 0, ranks),
        SEQ_LENGTH,
        _DATA.pad_multiple,
        budget=Budget(budget),
    )


def _timed(call: Callable[..., object], *arguments: object) -> float:
    began = time.thread_time()
    call(*arguments)
    return time.thread_time() - began
