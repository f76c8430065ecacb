"""Shifts of many cells are held twice at most, as the limit on them has it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist

from geneformer_mcore.inference.cells import CountedCell
from geneformer_mcore.io.progress import no_progress
from geneformer_mcore.model.forward_only import DISPLACEMENT_COLUMNS
from geneformer_mcore.perturbation import displacements, perturb, statistics
from geneformer_mcore.perturbation.question import GeneNames, Sets
from geneformer_mcore.perturbation.statistics import Controls
from geneformer_mcore.types import NUM_SPECIALS
from tests.distributed import toy
from tests.distributed.ranks import run_ranks
from tests.support.small_cells import vocabulary_of

NUM_CELLS, NUM_GENES = 1000, 500
WHOLE = NUM_CELLS * NUM_GENES * len(DISPLACEMENT_COLUMNS) * 4
NAMES = GeneNames(vocabulary_of(NUM_GENES), {}, {})
ASKED = [NAMES.single(NUM_SPECIALS + number) for number in range(NUM_GENES)]


class Many:
    """Cells of one gene each. Stands in for ChosenCells."""

    rows_N = np.arange(NUM_CELLS)

    def __len__(self) -> int:
        return NUM_CELLS

    def counted(self, start: int, stop: int) -> Iterator[CountedCell]:
        nothing = np.empty(0)
        for place in range(start, stop):
            yield CountedCell(place, nothing, nothing, np.array([2, 5]))


def peak_bytes(function: Callable[..., Any], *given: Any) -> tuple[int, Any]:
    tracemalloc.start()
    found = function(*given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, found


def numbered(job: Any, cells: list[CountedCell], values_NPC: np.ndarray) -> Iterator[int]:
    """In place of the encoder: the cell's place, but for its last perturbation."""
    for row, cell in enumerate(cells):
        values_NPC[row, :-1] = cell.place
    yield len(cells)


def all_cells() -> tuple[int, np.ndarray | None]:
    displacements._block, displacements.GATHERED_VALUES = numbered, 1 << 14
    topology = SimpleNamespace(data_rank=dist.get_rank(), data_size=dist.get_world_size())
    engine = SimpleNamespace(
        topology=topology, tokens_per_batch=20, holds_states=True, device=toy.CPU
    )
    sets = Sets(ASKED, NUM_GENES + NUM_SPECIALS)
    job = SimpleNamespace(engine=engine, cells=Many(), sets=sets, total=NUM_CELLS)
    return peak_bytes(displacements.of_all_cells, job, no_progress)


def test_first_rank_holds_two_copies_and_others_their_own_cells() -> None:
    for ranks in (1, 2):
        (first, values_NPC), *others = run_ranks(all_cells, ranks)
        assert values_NPC is not None
        expected = np.arange(NUM_CELLS)[:, None, None]
        assert (values_NPC[:, :-1] == expected).all()
        assert np.isnan(values_NPC[:, -1]).all()
        assert first < (1 + 1 / ranks + 0.2) * WHOLE <= (perturb.COPIES + 0.2) * WHOLE
        for peak, nothing in others:
            assert nothing is None
            assert peak < (1 / ranks + 0.2) * WHOLE


def test_a_table_needs_no_further_copy(monkeypatch: Any, rng: np.random.Generator) -> None:
    monkeypatch.setattr(statistics, "COPIED_VALUES", 1 << 14)
    values_NPC = rng.random((NUM_CELLS, NUM_GENES, len(DISPLACEMENT_COLUMNS)), np.float32)
    values_NPC[rng.random(values_NPC.shape) < 0.3] = np.nan
    number_P = np.full(NUM_GENES, NUM_CELLS)
    tested = statistics.Tested(ASKED, number_P, number_P)
    alone = Controls(ASKED, [np.array([0, 1, 2])] * NUM_GENES)
    peak, rows = peak_bytes(statistics.table, tested, NAMES, alone, values_NPC, True)
    assert peak < 0.3 * WHOLE
    shift_NP = values_NPC[:, :, 0].astype(np.float64)
    np.testing.assert_array_equal(rows["shift"], np.nanmean(shift_NP, axis=0))
    np.testing.assert_array_equal(rows["shift_sd"], np.nanstd(shift_NP, axis=0, ddof=1))
