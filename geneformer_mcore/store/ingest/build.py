"""From inputs of counts to a store, by several processes, resumable after any kill.

    inputs  ->  vocabulary_of_inputs, where none is given: genes and medians of all their cells
    inputs  ->  inspected, refusals reported  ->  units of rows  ->  tokenised, each by one process
            ->  merged, published             (see sources, plan, tokenise, merge, staging)

An input that cannot be used, or turns out bad on the way, is left out and reported; the others are
stored. Finished units stay until the store is complete: the same command resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from geneformer_mcore.errors import DataError, ExternalIOError
from geneformer_mcore.io.progress import Progress, no_progress
from geneformer_mcore.io.workers import Workers
from geneformer_mcore.store.ingest.labels import unify_kinds
from geneformer_mcore.store.ingest.merge import Merge, write_store
from geneformer_mcore.store.ingest.plan import (
    Part,
    Plan,
    Recipe,
    Unit,
    UnitReport,
    declare,
    join,
    make_plan,
    read_report,
    remove_others,
    remove_partial,
    unit_names,
)
from geneformer_mcore.store.ingest.sources import InputSource, Inspection, Refusal, in_order
from geneformer_mcore.store.ingest.staging import StagedFolder
from geneformer_mcore.store.ingest.tokenise import Tokenising, close_inputs
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.report import SourceReport, report_source
from geneformer_mcore.store.split.table import RandomSplit, SplitRule
from geneformer_mcore.tokenizer.build import build_vocabulary
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.tokenizer.rank_encoder import RankEncoder
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

DEFAULT_MEMORY_GB = 1.0
"""For values: with the processes around them a build stays under 2 GB."""


@dataclass(frozen=True)
class Trial:
    """Tries whether an input can be used (a workers.Work)."""

    options: InputOptions
    whole: bool

    def __call__(self, job: str, advance: Callable[[int], None]) -> None:
        """Opens `job`, and reads it if `whole`. Raises DataError if it cannot be used."""
        with self.options.open(job) as counts:
            for _ in counts.blocks() if self.whole else ():
                pass


def vocabulary_of_inputs(
    inputs: Sequence[str | Path],
    options: InputOptions,
    workers: int = 1,
    strict: bool = False,
    progress: Progress = no_progress,
    memory_gb: float = DEFAULT_MEMORY_GB,
) -> Vocabulary:
    """Genes and medians of all usable inputs (see tokenizer.build.gather). Where one turns out bad
    on the way, all are read to find it, and the others counted again.

    strict:  an input that cannot be used is an error
    Raises DataError if none is left, or if inputs name genes by ids of different kinds, and
    ExternalIOError or LostWorkerError for other failures.
    """
    names = in_order(inputs)
    with Workers(workers) as processes:
        good, faults = _try(processes, names, Trial(options, whole=False))
        if not good or (strict and faults):
            raise DataError("\n".join(faults))
        try:
            return build_vocabulary(good, options, memory_gb, workers, progress)
        except ExternalIOError:
            raise
        except DataError:
            left, faults = _try(processes, good, Trial(options, whole=True))
            if strict or not left or not faults:
                raise
    return build_vocabulary(left, options, memory_gb, workers, progress)


def _try(processes: Workers, names: Sequence[str], trial: Trial) -> tuple[list[str], list[str]]:
    """(inputs that passed, faults of the others), both in order. Raises ExternalIOError."""
    outcomes: dict[str, DataError | None] = {}
    most = None if trial.whole else len(names) // 32
    for name, outcome in processes.run(trial, names, most=most):
        _raise_external(outcome)
        outcomes[name] = outcome
    good = [name for name in names if outcomes[name] is None]
    return good, [str(outcomes[name]) for name in names if outcomes[name] is not None]


_INPUTS_PER_WORKER, _CELLS_PER_WORKER = 32, 8192
"""To inspect so many inputs, or tokenise so many cells, takes as long as to start a process."""

Log = Callable[[str], None]
"""Called with a line to be shown at once."""


def no_log(line: str) -> None:
    """Shows nothing."""


def build_store(
    inputs: Sequence[str | Path],
    out: str | Path,
    vocabulary: Vocabulary,
    seq_length: int = 2048,
    options: InputOptions | None = None,
    split_rule: SplitRule | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    log: Log = no_log,
    workers: int = 1,
    strict: bool = False,
) -> Manifest:
    """Builds the store `out` from h5ad, zarr and SOMA inputs, independent of their order.

    seq_length:  maximum tokens per cell, [CLS] included
    workers:     maximum number of processes
    strict:      an input that cannot be used is an error, raised before any work where possible
    Nothing is at `out` unless it returns. The manifest's `refused` lists inputs that were left out;
    DataError if none is left, if two cells of different inputs have one name, or if the disk is
    full; ExternalIOError if a network or a disk failed while an input was read; LostWorkerError if
    a worker is killed or memory runs out. Finished units stay for the next call.
    """
    recipe = _recipe(vocabulary, seq_length, options, split_rule)
    with _working(Path(out), overwrite, workers, log) as (staged, processes):
        remove_partial(staged.units)
        build = _Build(recipe, staged, processes, strict, progress, log)
        plan = build.plan(inputs)
        declare(plan, staged.path)
        build.tokenise(plan, plan.units)
        processes.end()  # The merge has use for their memory.
        sources = build.stored_sources(plan)
        units = [unit for unit in plan.units if unit.source in sources]
        remove_others(staged.units, [unit.name for unit in units])
        merge = Merge(
            staged.units,
            {unit.name: build.done[unit.name] for unit in units},
            plan.num_buckets,
            unify_kinds(source.kinds for source in sources),
        )
        reports = [build.report(plan, source) for source in sources]
        return write_store(staged, merge, recipe, reports, build.refusals, progress)


def tokenise_part(
    inputs: Sequence[str | Path],
    out: str | Path,
    part: Part,
    vocabulary: Vocabulary,
    seq_length: int = 2048,
    options: InputOptions | None = None,
    split_rule: SplitRule | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    log: Log = no_log,
    workers: int = 1,
    strict: bool = False,
) -> list[Refusal]:
    """Does one part of the units of the store `out`, while other processes do the others; then
    `build_store` with the same arguments merges them.

    Returns the inputs that this part found unusable; see build_store for the rest. DataError if
    another part was started with other inputs or options.
    """
    recipe = _recipe(vocabulary, seq_length, options, split_rule)
    with _working(Path(out), overwrite, workers, log, part) as (staged, processes):
        build = _Build(recipe, staged, processes, strict, progress, log)
        plan = build.plan(inputs)
        join(plan, staged.path)
        build.tokenise(plan, part.of(plan.units))
        return build.refusals


def _recipe(
    vocabulary: Vocabulary,
    seq_length: int,
    options: InputOptions | None,
    split_rule: SplitRule | None,
) -> Recipe:
    RankEncoder(vocabulary, seq_length)
    return Recipe(vocabulary, seq_length, options or InputOptions(), split_rule or RandomSplit())


@contextmanager
def _working(
    out: Path, overwrite: bool, workers: int, log: Log, part: Part | None = None
) -> Iterator[tuple[StagedFolder, Workers]]:
    """The folder and the processes of a build, both released at the end."""
    name = None if part is None else str(part)
    with StagedFolder(out, overwrite, name) as staged, Workers(workers) as processes:
        try:
            yield staged, processes
        except BaseException:
            number = len(unit_names(staged.units))
            if number:
                log(f"{number} finished units of work stay in {staged.path}: start the same again.")
            raise
        finally:
            close_inputs()


@dataclass
class _Build:
    """One run over the units of a store, or over a part of them.

    done:      {name of a unit: its report}
    refusals:  inputs that are left out
    """

    recipe: Recipe
    staged: StagedFolder
    workers: Workers
    strict: bool
    progress: Progress
    log: Log
    done: dict[str, UnitReport] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def plan(self, inputs: Sequence[str | Path]) -> Plan:
        """Inspects all inputs. DataError if none can be used, or if strict and one cannot."""
        names = in_order(inputs)
        found: dict[str, InputSource | DataError] = {}
        recipe = self.recipe
        look = Inspection(recipe.vocabulary, recipe.options, recipe.split_rule)
        for name, outcome in self.workers.run(look, names, most=len(names) // _INPUTS_PER_WORKER):
            _raise_external(outcome)
            found[name] = outcome
            self.progress("looking at inputs", len(found), len(names))
        sources = [source for name in names if isinstance(source := found[name], InputSource)]
        faults = {name: str(found[name]) for name in names if isinstance(found[name], DataError)}
        if not sources:
            raise DataError("\n".join(faults.values()))
        self._check_strict(*faults.values())
        self._refuse(faults)
        return make_plan(self.recipe, sources, self.refusals)

    def tokenise(self, plan: Plan, units: Sequence[Unit]) -> None:
        """Does the missing `units`, without those of inputs that turn out bad."""
        there = {unit for unit in units if read_report(self.staged.units, unit.name)}
        if there:
            self.log(f"continues: {len(there)} of {len(units)} units of work are there")
        reported = _CellProgress(units, there, self.progress)
        faults: dict[str, tuple[int, str]] = {}
        work = Tokenising(self.recipe, plan.num_buckets, self.staged.units)

        def is_wanted(unit: Unit) -> bool:
            return unit.source.name not in faults

        most = sum(map(len, units)) // _CELLS_PER_WORKER
        for unit, outcome in self.workers.run(work, units, reported.add, is_wanted, most, _chain):
            _raise_external(outcome)
            reported.finish(unit)
            if isinstance(outcome, DataError):
                # Of several faults of an input the first in order is reported.
                fault = unit.index, str(outcome)
                faults[unit.source.name] = min(fault, faults.get(unit.source.name, fault))
                self._check_strict(str(outcome))
            else:
                self.done[unit.name] = outcome
                self._estimate(units)
        self._refuse({name: reason for name, (_, reason) in sorted(faults.items())})

    def _refuse(self, reasons: dict[str, str]) -> None:
        self.refusals += [Refusal(name, reason) for name, reason in reasons.items()]
        for reason in reasons.values():
            self.log(f"refused: {reason}")

    def _check_strict(self, *reasons: str) -> None:
        if self.strict and reasons:
            raise DataError("\n".join(reasons))

    def _estimate(self, units: Sequence[Unit]) -> None:
        """The size of all units and their rows, extrapolated from finished ones."""
        num_bytes = sum(report.num_bytes for report in self.done.values())
        num_cells = sum(report.cells_in for report in self.done.values())
        total = sum(map(len, units))
        self.staged.bytes_needed = 2 * num_bytes * total // num_cells

    def stored_sources(self, plan: Plan) -> list[InputSource]:
        """The inputs whose cells are stored, in order; DataError if there is none."""
        refused = {refusal.name for refusal in self.refusals}
        stored = [source for source in plan.sources if source.name not in refused]
        if not stored:
            raise DataError("\n".join(refusal.reason for refusal in self.refusals))
        return stored

    def report(self, plan: Plan, source: InputSource) -> SourceReport:
        """The report of one of them."""
        return report_source(
            source, [self.done[unit.name] for unit in plan.units if unit.source is source]
        )


def _raise_external(outcome: object) -> None:
    """Raises a failure that is not the input's: leaving it out, the store would lack cells."""
    if isinstance(outcome, ExternalIOError):
        raise outcome


def _chain(unit: Unit) -> str | None:
    return unit.source.address if unit.source.is_sequential else None


class _CellProgress:
    """Progress in cells, over all units; there: those finished before."""

    def __init__(self, units: Sequence[Unit], there: set[Unit], progress: Progress) -> None:
        self._total = sum(map(len, units))
        self._of_unit = {unit: len(unit) for unit in there}
        self._there, self._progress = there, progress
        self._advance()

    def add(self, unit: Unit, cells: int) -> None:
        if unit not in self._there:
            self._of_unit[unit] = self._of_unit.get(unit, 0) + cells
            self._advance()

    def finish(self, unit: Unit) -> None:
        self._of_unit[unit] = len(unit)
        self._advance()

    def _advance(self) -> None:
        self._progress("tokenising", sum(self._of_unit.values()), self._total)
