"""From files of counts to a store, by several processes, through any number of kills.

    inputs  ->  looked at, refusals named  ->  units of rows  ->  tokenised, each by one process
            ->  merged, published          (see sources, plan, tokenise, merge, writer)

An input that cannot be used, or turns out bad on the way, is left out altogether and told of; the
others are stored. Work that is done stays until the store is there: the same command goes on.
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

# The vocabulary of the very inputs a store is built from, for those that can be used.
#
# inputs  ->  those that open  ->  genes and medians over all their cells
#         ->  where one turns out bad: all are read to find which, and the rest is gathered anew

DEFAULT_MEMORY_GB = 1.0
"""For values: with the processes around them a build stays under 2 GB."""


@dataclass(frozen=True)
class Trial:
    """The work of trying whether an input can be used (a workers.Work)."""

    options: InputOptions
    whole: bool

    def __call__(self, job: str, tell: Callable[[int], None]) -> None:
        """Opens `job`, and reads it if `whole`. Raises DataError if it is of no use."""
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
    """Genes and medians of all inputs that can be used (see build.build_vocabulary).

    strict:     an input that cannot be used is an error
    memory_gb:  for values (see gathering.gather)
    Raises DataError if none is left, or if inputs name genes by ids of different kinds, and
    OutsideError or LostWorkerError for what is no fault of an input's.
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
    """(inputs that passed, what is wrong with the others), both in order. Raises OutsideError."""
    outcomes: dict[str, DataError | None] = {}
    most = None if trial.whole else len(names) // 32
    for name, outcome in processes.run(trial, names, most=most):
        if isinstance(outcome, ExternalIOError):
            raise outcome
        outcomes[name] = outcome
    good = [name for name in names if outcomes[name] is None]
    return good, [str(outcomes[name]) for name in names if outcomes[name] is not None]


_INPUTS_PER_WORKER, _CELLS_PER_WORKER = 32, 8192
"""To look at so many inputs, or do so many cells, takes as long as to start a process (1-2 s)."""

Say = Callable[[str], None]
"""Called with a line to be told at once."""


def silent(line: str) -> None:
    """Says nothing."""


def build_store(
    inputs: Sequence[str | Path],
    out: str | Path,
    vocabulary: Vocabulary,
    seq_length: int = 2048,
    options: InputOptions | None = None,
    split_rule: SplitRule | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    say: Say = silent,
    workers: int = 1,
    strict: bool = False,
) -> Manifest:
    """Builds the store `out` from h5ad files and SOMA Experiments, in whatever order they come.

    seq_length:  tokens per cell at most, [CLS] included
    workers:     processes at most
    strict:      an input that cannot be used ends it all, before any work where that can be told
    Nothing is at `out` unless it returns. The manifest's `refused` names inputs that were left out;
    DataError if none is left, if two cells of different inputs have one name, or if the disk is
    full; OutsideError if a network or a disk failed while an input was read; LostWorkerError if a
    worker is killed or memory runs out. Units that are done stay for the next call.
    """
    recipe = _recipe(vocabulary, seq_length, options, split_rule)
    with _working(Path(out), overwrite, workers, say) as (staged, processes):
        remove_partial(staged.units)
        build = _Build(recipe, staged, processes, strict, progress, say)
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
    say: Say = silent,
    workers: int = 1,
    strict: bool = False,
) -> list[Refusal]:
    """Does one part of the units of the store `out`, beside processes that do the others.

    `build_store` with the same arguments takes them from there. Returns the inputs that this part
    found to be of no use; see build_store for the rest. DataError if another part was asked for
    with other inputs or options.
    """
    recipe = _recipe(vocabulary, seq_length, options, split_rule)
    with _working(Path(out), overwrite, workers, say, part) as (staged, processes):
        build = _Build(recipe, staged, processes, strict, progress, say)
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
    out: Path, overwrite: bool, workers: int, say: Say, part: Part | None = None
) -> Iterator[tuple[StagedFolder, Workers]]:
    """The folder and the processes of a build, both given back at the end."""
    name = None if part is None else str(part)
    with StagedFolder(out, overwrite, name) as staged, Workers(workers) as processes:
        try:
            yield staged, processes
        except BaseException:
            number = len(unit_names(staged.units))
            if number:
                say(f"{number} finished units of work stay in {staged.path}: start the same again.")
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
    say: Say
    done: dict[str, UnitReport] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def plan(self, inputs: Sequence[str | Path]) -> Plan:
        """Looks at all inputs. DataError if none can be used, or one cannot and must."""
        names = in_order(inputs)
        found: dict[str, InputSource | DataError] = {}
        recipe = self.recipe
        look = Inspection(recipe.vocabulary, recipe.options, recipe.split_rule)
        for name, outcome in self.workers.run(look, names, most=len(names) // _INPUTS_PER_WORKER):
            _check_inside(outcome)
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
        """Does all `units` but those of inputs that turn out bad, and those that are there."""
        there = {unit for unit in units if read_report(self.staged.units, unit.name)}
        if there:
            self.say(f"continues: {len(there)} of {len(units)} units of work are there")
        told = _CellsTold(units, there, self.progress)
        faults: dict[str, tuple[int, str]] = {}
        work = Tokenising(self.recipe, plan.num_buckets, self.staged.units)

        def is_wanted(unit: Unit) -> bool:
            return unit.source.name not in faults

        most = sum(map(len, units)) // _CELLS_PER_WORKER
        for unit, outcome in self.workers.run(work, units, told.add, is_wanted, most, _chain):
            _check_inside(outcome)
            told.finish(unit)
            if isinstance(outcome, DataError):
                # Of several faults of an input the first is told, whichever was found first.
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
            self.say(f"refused: {reason}")

    def _check_strict(self, *reasons: str) -> None:
        if self.strict and reasons:
            raise DataError("\n".join(reasons))

    def _estimate(self, units: Sequence[Unit]) -> None:
        """How much room all units and their rows will take, judged by those that are done."""
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
        """What became of one of them."""
        return report_source(
            source, [self.done[unit.name] for unit in plan.units if unit.source is source]
        )


def _check_inside(outcome: object) -> None:
    """Raises an outcome that says nothing of the input: without it, the store would lack cells."""
    if isinstance(outcome, ExternalIOError):
        raise outcome


def _chain(unit: Unit) -> str | None:
    return unit.source.address if unit.source.is_sequential else None


class _CellsTold:
    """How many cells are done, over all units: those that were there from the start."""

    def __init__(self, units: Sequence[Unit], there: set[Unit], progress: Progress) -> None:
        self._total = sum(map(len, units))
        self._of_unit = {unit: len(unit) for unit in there}
        self._there, self._progress = there, progress
        self._tell()

    def add(self, unit: Unit, cells: int) -> None:
        if unit not in self._there:
            self._of_unit[unit] = self._of_unit.get(unit, 0) + cells
            self._tell()

    def finish(self, unit: Unit) -> None:
        self._of_unit[unit] = len(unit)
        self._tell()

    def _tell(self) -> None:
        self._progress("tokenising", sum(self._of_unit.values()), self._total)
