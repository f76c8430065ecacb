"""Reading a corpus for its vocabulary: every file, every row, in one process or several.

    files  ->  opened, genes named alike?  ->  units of rows  ->  dealt to workers as they ask
    each worker: rows  ->  its own Tally     all tallies  ->  added  ->  Vocabulary

Processes are spawned, for TileDB does not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import DataError, LostWorkerError
from geneformer_mcore.io.workers import describe_end, end_with_parent, interrupts_kept_back
from geneformer_mcore.tokenizer.corpus import InputOptions, find_genes
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
_POLL_S = 0.2
_STOP_S = 5.0
_AGAIN = (
    "Remedy: start the same command again; if memory is short, with fewer --workers or less "
    "--memory-gb."
)

Progress = Callable[[str, int, int], None]
"""Called with (what is done, cells done, cells in all)."""


def no_progress(what: str, done: int, total: int) -> None:
    """Shows nothing."""


@dataclass(frozen=True)
class Unit:
    """Rows start..stop-1 of one source."""

    source: str
    start: int
    stop: int


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
    """What the cells of these files or SOMA Experiments hold.

    memory_gb:  for the values, 10^9 bytes each; where they do not fit, histograms are kept
    workers:    processes; 1: this one alone
    Neither `workers` nor the order of `sources` makes any difference to the vocabulary.
    Raises DataError for sources that cannot be used; LostWorkerError if a worker is killed or
    memory runs out.
    """
    if not sources:
        raise DataError("no input file given. Remedy: name one h5ad file or more.")
    if workers < 1:
        raise DataError(f"--workers must be 1 or more, not {workers}.")
    limit = most_values(memory_gb)
    units = _inspect(sorted({str(source) for source in sources}), options)
    if workers == 1 or len(units) == 1:
        return _gather_here(units, options, limit, progress)
    whole: Tally | None = None
    for part in _gather_by_workers(units, options, limit, workers, progress):
        if whole is None:
            whole = part
        else:
            whole.absorb(part)
            whole.add_rows(part.files)
    assert whole is not None
    return whole


def merge_parts(paths: Sequence[str | Path], memory_gb: float = DEFAULT_MEMORY_GB) -> Tally:
    """The sum of partial files (see tally_file). DataError unless all were read alike."""
    limit = most_values(memory_gb)
    whole: Tally | None = None
    for path in sorted({str(path) for path in paths}):
        part = load_tally(path, limit)
        whole = whole or Tally(part.options, limit)
        if part.options != whole.options:
            raise DataError(
                f"{path} was made with {part.options}, the partial files before it with "
                f"{whole.options}. Remedy: make all with the same --layer, --symbols and "
                "--allow-normalised."
            )
        for file in part.files:
            whole.add_file(file)
        whole.absorb(part)
    if whole is None:
        raise DataError("no partial file given. Remedy: --merge part1.npz part2.npz ...")
    return whole


def _inspect(sources: Sequence[str], options: InputOptions) -> list[Unit]:
    """Opens every source, before any is read through; what there is to read."""
    files, units = [], []
    for source in sources:
        with options.open(source) as counts:
            files.append(FileRecord(source, ensembl_share(find_genes(counts, options).ids)))
            check_one_kind(files)
            # One that is cheap in order alone is one worker's, as a whole.
            step = counts.num_cells if counts.is_sequential else ROWS_PER_UNIT
            for start in range(0, counts.num_cells, step):
                units.append(Unit(source, start, min(start + step, counts.num_cells)))
    return units


def _gather_here(
    units: Sequence[Unit], options: InputOptions, limit: int, progress: Progress
) -> Tally:
    tally = Tally(describe_options(options), limit)
    total = _num_cells(units)
    try:
        for done in _read(iter(units), options, tally):
            progress("counting", done, total)
    except MemoryError as error:
        raise _short_of_memory(error) from error
    return tally


def _num_cells(units: Sequence[Unit]) -> int:
    return sum(unit.stop - unit.start for unit in units)


def _read(units: Iterator[Unit], options: InputOptions, tally: Tally) -> Iterator[int]:
    """Reads the units into `tally`; gives the cells read so far, after each block."""
    done = 0
    for source, of_source in groupby(units, key=lambda unit: unit.source):
        with options.open(source) as counts:
            ids = find_genes(counts, options).ids
            tally.add_file(FileRecord(source, ensembl_share(ids)))
            tally.add_names(ids, counts.gene_names())
            column_places = tally.places(ids)
            for unit in of_source:
                for block in counts.blocks(start=unit.start, stop=unit.stop):
                    tally.add_block(block, column_places)
                    done += len(block)
                    yield done


@dataclass
class _Worker:
    """What a spawned process keeps between its start and its task.

    next_unit, cells, values: shared by all workers
    """

    units: Sequence[Unit] = ()
    options: InputOptions = field(default_factory=InputOptions)
    limit: int = 0
    next_unit: Any = None
    cells: Any = None
    values: Any = None


_worker = _Worker()


def _start_worker(*fields: Any) -> None:
    # The pool keeps both ends of its queue in every worker: none is told by a pipe that closes.
    end_with_parent()
    _become_worker(*fields)


def _become_worker(*fields: Any) -> None:
    global _worker
    _worker = _Worker(*fields)


def _units_as_asked() -> Iterator[Unit]:
    while True:
        number = _take(_worker.next_unit, 1)
        if number >= len(_worker.units):
            return
        yield _worker.units[number]


def _take(shared: Any, step: int) -> int:
    """Adds `step` to a shared number; returns what it was before."""
    with shared.get_lock():
        before = int(shared.value)
        shared.value = before + step
    return before


def _work() -> Tally:
    tally = Tally(describe_options(_worker.options), _worker.limit)
    done_before = values_before = 0
    for done in _read(_units_as_asked(), _worker.options, tally):
        _take(_worker.cells, done - done_before)
        new_values = tally.collector.num_values - values_before
        # What all workers hold together must fit, not what one of them holds.
        if _take(_worker.values, new_values) + new_values > _worker.limit:
            tally.collector.give_up_values()
        done_before, values_before = done, tally.collector.num_values
    return tally


def _gather_by_workers(
    units: Sequence[Unit], options: InputOptions, limit: int, workers: int, progress: Progress
) -> Iterator[Tally]:
    total = _num_cells(units)
    spawn = multiprocessing.get_context("spawn")
    workers = min(workers, len(units))
    next_unit, cells, values = (spawn.Value("q", 0) for _ in range(3))
    fields = (units, options, limit, next_unit, cells, values)
    with ProcessPoolExecutor(workers, spawn, _start_worker, fields) as pool:
        others = set(multiprocessing.active_children())
        processes: set[BaseProcess] = set()
        try:
            with interrupts_kept_back():
                waiting = {pool.submit(_work) for _ in range(workers)}
                processes |= set(multiprocessing.active_children()) - others
            while waiting:
                finished, waiting = wait(waiting, _POLL_S, "FIRST_COMPLETED")
                # The pool begins to look after its latest process when another one is done (3.11).
                if any(process.exitcode for process in processes):
                    raise BrokenProcessPool
                progress("counting", int(cells.value), total)
                yield from map(_result, finished)
        except BrokenProcessPool as error:
            raise _lost(processes) from error
        except BaseException:
            # The pool would wait until they have read all they are at, which is of no use now.
            for process in processes:
                process.terminate()
            raise


def _result(future: Future[Tally]) -> Tally:
    try:
        return future.result()
    except MemoryError as error:
        raise _short_of_memory(error) from error


def _short_of_memory(error: MemoryError) -> LostWorkerError:
    why = f"there is not enough memory ({error or 'Python has none left'})"
    return LostWorkerError(f"{why}, while the vocabulary was counted. {_AGAIN}")


def _lost(processes: set[BaseProcess]) -> LostWorkerError:
    """What ended the first of them; the others are ended by SIGTERM."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(_STOP_S)
    codes = {process.exitcode for process in processes} - {None, 0, -signal.SIGTERM}
    how = describe_end(codes.pop()) if codes else "without a word"
    return LostWorkerError(
        f"a worker process was ended {how}, while the vocabulary was counted. {_AGAIN}"
    )
