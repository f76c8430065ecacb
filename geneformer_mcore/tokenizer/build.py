"""The vocabulary of a corpus: every row of every file, in one process or several.

files  ->  opened, one kind of gene id?  ->  units of rows  ->  the next free worker
each worker: rows  ->  its own Tally     all tallies  ->  added  ->  Vocabulary
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.progress import Progress, no_progress
from geneformer_mcore.io.workers import Advance, Workers
from geneformer_mcore.tokenizer.genes import InputOptions, find_genes
from geneformer_mcore.tokenizer.tally import (
    DEFAULT_MEMORY_GB,
    FileRecord,
    Tally,
    check_one_kind,
    describe_options,
    ensembl_share,
    load_tally,
    most_values,
)
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

ROWS_PER_UNIT = 16_384
_AGAIN = (
    "Remedy: start the same command again; if memory is short, with fewer `workers=` or less "
    "`memory_gb=`."
)

HAND_OVER = "returning the tally"


@dataclass(frozen=True)
class Unit:
    """Rows start..stop-1 of one source."""

    source: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"counting cells {self.start:,} to {self.stop - 1:,} of {self.source}"


def build_vocabulary(
    sources: Sequence[str | Path],
    options: InputOptions,
    memory_gb: float = DEFAULT_MEMORY_GB,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Vocabulary:
    """The genes that the cells of these sources express, with medians over all cells (see gather).

    Raises DataError for sources that cannot be used, or that name genes by ids of different kinds.
    """
    return gather(sources, options, memory_gb, workers, progress).vocabulary()


def gather(
    sources: Sequence[str | Path],
    options: InputOptions,
    memory_gb: float = DEFAULT_MEMORY_GB,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Tally:
    """The tally of all cells of these files or SOMA Experiments, independent of their order.

    memory_gb:  for the values, 10^9 bytes each; where they do not fit, histograms are kept
    workers:    processes; 1: this one alone; the vocabulary does not depend on it
    Raises DataError for sources that cannot be used; LostWorkerError if a worker is killed or
    memory runs out.
    """
    if not sources:
        raise DataError("no input given. Remedy: name one h5ad or zarr file or more.")
    limit = most_values(memory_gb)
    values = multiprocessing.get_context("spawn").Value("q", 0) if workers > 1 else None
    pool = Workers(workers, values, _AGAIN)  # Raises at once, not after the inspection.
    units = _inspect(sorted({str(source) for source in sources}), options)
    total, done = sum(unit.stop - unit.start for unit in units), 0

    def advance(_: object, cells: int) -> None:
        nonlocal done
        done += cells
        progress("counting", done, total)

    whole: Tally | None = None
    with Counting(options, limit) as work, pool:
        for _, outcome in pool.run(work, units, advance, last=HAND_OVER):
            if isinstance(outcome, DataError):
                raise outcome
            if whole is None or outcome is None:
                whole = outcome
            else:
                whole.absorb(outcome)
                whole.add_rows(outcome.files)
    assert whole is not None
    return whole


def merge_parts(paths: Sequence[str | Path], memory_gb: float = DEFAULT_MEMORY_GB) -> Tally:
    """The sum of partial files (see save_tally). DataError unless all have the same options."""
    limit = most_values(memory_gb)
    whole: Tally | None = None
    for path in sorted({str(path) for path in paths}):
        part = load_tally(path, limit)
        whole = whole or Tally(part.options, limit)
        if part.options != whole.options:
            raise DataError(
                f"{path} was made with {part.options}, the partial files before it with "
                f"{whole.options}. Remedy: make all with the same `counts_layer=`, `symbols=` and "
                "`allow_normalised=True`."
            )
        for file in part.files:
            whole.add_file(file)
        whole.absorb(part)
    if whole is None:
        raise DataError("no partial file given. Remedy: `paths=part1.npz part2.npz`.")
    return whole


def _inspect(sources: Sequence[str], options: InputOptions) -> list[Unit]:
    """The units of all sources, each of which is opened before any is read."""
    files, units = [], []
    for source in sources:
        with options.open(source) as counts:
            files.append(FileRecord(source, ensembl_share(find_genes(counts, options).ids)))
            check_one_kind(files)
            # A sequential one is a single unit.
            step = counts.num_cells if counts.is_sequential else ROWS_PER_UNIT
            for start in range(0, counts.num_cells, step):
                units.append(Unit(source, start, min(start + step, counts.num_cells)))
    return units


class Counting:
    """Counts units into one Tally per process (a workers.Work).

    shared: the number of values of all processes; None: there is only one
    """

    shared: Any = None

    def __init__(self, options: InputOptions, limit: int) -> None:
        self._options, self._limit = options, limit
        self._tally = Tally(describe_options(options), limit)
        self._file, self._source = ExitStack(), ""

    def __call__(self, job: Unit | str, advance: Advance) -> Tally | None:
        """Counts a unit; returns the Tally for the job HAND_OVER."""
        if not isinstance(job, Unit):
            self._file.close()
            return self._tally
        if job.source != self._source:
            self._open(job.source)
        for block in self._counts.blocks(start=job.start, stop=job.stop):
            before = self._tally.collector.num_values
            self._tally.add_block(block, self._column_places)
            self._share(self._tally.collector.num_values - before)
            advance(len(block))
        return None

    def _open(self, source: str) -> None:
        self._file.close()
        self._counts = self._file.enter_context(self._options.open(source))
        self._source = source
        ids = find_genes(self._counts, self._options).ids
        self._tally.add_file(FileRecord(source, ensembl_share(ids)))
        self._tally.add_names(ids, self._counts.gene_names())
        self._column_places = self._tally.places(ids)

    def _share(self, new_values: int) -> None:
        if self.shared is None:
            return
        with self.shared.get_lock():
            self.shared.value += new_values
            together = int(self.shared.value)
        if together > self._limit:
            self._tally.collector.give_up_values()

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
