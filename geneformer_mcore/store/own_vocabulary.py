"""The vocabulary of the very inputs a store is built from, for those that can be used.

inputs  ->  those that open  ->  genes and medians over all their cells
        ->  where one turns out bad: all are read to find which, and the rest is gathered anew
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from geneformer_mcore.cells.corpus import InputOptions
from geneformer_mcore.cells.gathering import build_vocabulary
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError, OutsideError
from geneformer_mcore.store.progress import Progress, no_progress
from geneformer_mcore.store.sources import in_order
from geneformer_mcore.store.workers import Workers

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
    """Genes and medians of all inputs that can be used (see gathering.build_vocabulary).

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
        except OutsideError:
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
        if isinstance(outcome, OutsideError):
            raise outcome
        outcomes[name] = outcome
    good = [name for name in names if outcomes[name] is None]
    return good, [str(outcomes[name]) for name in names if outcomes[name] is not None]
