"""One turn of one contestant, in a process of its own: rate, first batch, memory, shuffle.

open on 128 cells, one epoch (imports, compilation)
  ->  clock: open, whole epochs until eight seconds are over  ->  peak memory
  ->  with --check: one more epoch, every cell checked; the order compared with a uniform shuffle
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.common import MIB, process_mib
from benchmarks.harness.loader_cells import Prepared
from benchmarks.harness.peers.contestant import BATCH_SIZE, TOKENS, Contestant
from geneformer_mcore.errors import DataError

BLOCK_CELLS = 64
"""Consecutive cells in source order, as one block of it."""
MIN_S = 8.0
"""Short epochs are repeated until so much time has passed: else opening is all that is measured."""
_SAMPLING_S = 0.2


def take_turn(
    kind: type[Contestant], data: Prepared, few: Prepared, with_check: bool
) -> dict[str, Any]:
    """The measurements of one turn.

    cells_per_s:      cells of whole epochs, over opening and reading them
    first_batch_s:    opening included, imports and compilation not
    cpu_us_per_cell:  CPU time of all threads and ended workers: steadier on a busy machine
    peak_mib:         resident memory of the process and its workers
    """
    for _ in kind(few).epoch(0):
        pass  # imports, compilation
    gc.collect()
    memory = _Peak()
    began, cpu_before = time.perf_counter(), _cpu_s()
    contestant = kind(data)
    epochs: list[list[np.ndarray]] = []
    first_batch_s = 0.0
    while not epochs or time.perf_counter() - began < MIN_S:
        epochs.append([])
        for batch in contestant.epoch(len(epochs) - 1):
            first_batch_s = first_batch_s or time.perf_counter() - began
            epochs[-1].append(contestant.cells(batch))
    seconds, cpu_s = time.perf_counter() - began, _cpu_s() - cpu_before
    peak_mib = memory.stop()
    rows = [contestant.rows(np.concatenate(seen)) for seen in epochs]
    num_cells = sum(map(len, rows))
    found = {
        "cells_per_s": num_cells / seconds,
        "cpu_us_per_cell": cpu_s / num_cells * 1e6,
        "epochs": len(rows),
        "first_batch_s": first_batch_s,
        "peak_mib": peak_mib,
    }
    return found | (checked(contestant, data, rows) if with_check else {})


def checked(contestant: Contestant, data: Prepared, rows: list[np.ndarray]) -> dict[str, Any]:
    """One more epoch with every cell checked by its sum; the shuffle of the first, and how the next
    after it differs. Raises DataError for a cell that is not as it must be."""
    expected = data.token_sums_N if contestant.table == TOKENS else data.count_sums_N
    seen, wrong = [], 0
    for batch in contestant.epoch(len(rows)):
        here = contestant.rows(contestant.cells(batch))
        wrong += int(np.sum(contestant.sums(batch) != expected[here]))
        seen.append(here)
    if wrong:
        raise DataError(f"{contestant.label}: {wrong:,} cells hold something else than they must.")
    first, second = [*rows, np.concatenate(seen)][:2]
    return {"shuffle": shuffle(first, second, len(data))}


def _cpu_s() -> float:
    return sum(os.times()[:4])


class _Peak:
    """The largest resident memory since it was made: this process by the kernel's own mark, and
    its children, who come and go, by looking five times a second."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the mark
        self._children, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """MiB."""
        mark = process_mib("VmHWM")
        self._ended.set()
        self._thread.join()
        return mark + self._children

    def _watch(self) -> None:
        here = psutil.Process()
        while not self._ended.wait(_SAMPLING_S):
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes = sum(child.memory_info().rss for child in here.children())
                self._children = max(self._children, sizes / MIB)


def shuffle(first: np.ndarray, second: np.ndarray, num_cells: int) -> dict[str, bool | float]:
    """How the cells of two epochs are mixed, given as source rows in the order of the stream.

    blocks: mean number of different blocks of BLOCK_CELLS source rows in a batch of the first, over
            its value for a uniform shuffle of the same rows
    """
    every, uniform = np.arange(num_cells), np.random.default_rng(0).permutation(first)
    return {
        "blocks": _num_blocks(first) / _num_blocks(uniform),
        "each_once": all(np.array_equal(np.sort(each), every) for each in (first, second)),
        "epochs_differ": not np.array_equal(first, second),
    }


def _num_blocks(rows: np.ndarray) -> float:
    batches = rows[: len(rows) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
    return float(np.mean([len(np.unique(batch // BLOCK_CELLS)) for batch in batches]))
