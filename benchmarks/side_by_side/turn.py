"""One turn of one contestant, in a process of its own: rate, first batch, memory, order.

open on 128 cells, one epoch (imports, compilation)
  ->  clock: open, whole epochs until eight seconds are over  ->  peak memory
  ->  if asked: one more epoch, every cell checked
"""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.peers.contestant import BATCH_SIZE, Contestant
from benchmarks.side_by_side.prepared import Prepared
from benchmarks.side_by_side.shuffle_quality import quality, two_epochs
from geneformer_mcore.errors import DataError

MIB = 2**20
_SAMPLING_S = 0.2
MIN_S = 8.0
"""Short epochs are repeated until so much time has passed: else opening is all that is measured."""


def take_turn(
    kind: type[Contestant], data: Prepared, few: Prepared, with_check: bool
) -> dict[str, Any]:
    """What was measured; see `Turn` for the names.

    cells_per_s:          cells of whole epochs, over opening and reading them
    first_batch_s:        opening included, imports and compilation not
    cpu_us_per_cell:      CPU time of all threads and ended workers, which a busy machine blurs less
    cold_start_s:         imports, compilation and an epoch of 128 cells
    peak_mib, before_mib: resident memory of the process and its workers; before opening
    """
    num_tokens_N = data.truth.num_tokens_N  # read from disk before the clock starts
    began = time.perf_counter()
    for _ in kind(few).epoch(0):
        pass
    cold_start_s = time.perf_counter() - began
    gc.collect()
    before_mib = _resident_mib()
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
    found = {
        "cells_per_s": sum(map(len, rows)) / seconds,
        "cpu_us_per_cell": cpu_s / sum(map(len, rows)) * 1e6,
        "tokens_per_s": float(sum(num_tokens_N[these].sum() for these in rows) / seconds),
        "epochs": len(rows),
        "first_batch_s": first_batch_s,
        "cold_start_s": cold_start_s,
        "peak_mib": peak_mib,
        "before_mib": before_mib,
    }
    return found | (_checked(contestant, data, rows) if with_check else {})


def _checked(contestant: Contestant, data: Prepared, rows: list[np.ndarray]) -> dict[str, Any]:
    """One more epoch, every cell of which must be what it is said to be; the shuffle of the first,
    and how the next after it differs."""
    truth = data.truth
    is_tokens = contestant.table == "tokens"
    expected = truth.token_sums_N if is_tokens else truth.count_sums_N
    seen, wrong = [], 0
    for batch in contestant.epoch(len(rows)):
        here = contestant.rows(contestant.cells(batch))
        wrong += int(np.sum(contestant.sums(batch) != expected[here]))
        seen.append(here)
    if wrong:
        raise DataError(f"{contestant.label}: {wrong:,} cells hold something else than they must.")
    first, second = [*rows, np.concatenate(seen)][:2]
    return {
        "shuffle": quality(first, truth.dataset_N, BATCH_SIZE)
        | two_epochs(first, second, len(data), BATCH_SIZE)
    }


def _cpu_s() -> float:
    user, system, children_user, children_system, _ = os.times()
    return user + system + children_user + children_system


def _resident_mib() -> float:
    return psutil.Process().memory_info().rss / MIB


class _Peak:
    """The largest resident memory since it was made: this process by the kernel's own mark, and
    its children, who come and go, by looking five times a second."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the mark
        self._children = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """MiB."""
        status = Path("/proc/self/status").read_text().splitlines()
        (mark,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
        self._ended.set()
        self._thread.join()
        return int(mark) / 1024 + self._children

    def _watch(self) -> None:
        here = psutil.Process()
        while not self._ended.wait(_SAMPLING_S):
            sizes = []
            for child in here.children():
                try:
                    sizes.append(child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self._children = max(self._children, sum(sizes) / MIB)
