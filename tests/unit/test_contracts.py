"""Cells of a block: some of them, and those that lie anywhere laid end to end."""

from __future__ import annotations

import numpy as np

from geneformer_mcore.types import CellViews, RaggedCells

CELLS = RaggedCells(
    np.array([0, 7, 9, 0, 8, 0, 6, 5], np.uint16),
    np.array([0, 3, 5, 8]),
    np.array([11, 12, 13], np.uint64),
)


def as_lists(cells: RaggedCells) -> list[list[int]]:
    """The tokens of each cell."""
    bounds = zip(cells.offsets[:-1], cells.offsets[1:], strict=True)
    return [cells.tokens_T[start:stop].tolist() for start, stop in bounds]


def test_the_first_cells() -> None:
    first = CELLS.first(2)
    assert as_lists(first) == [[0, 7, 9], [0, 8]]
    assert first.keys_N.tolist() == [11, 12]
    assert len(first.tokens_T) == 5
    assert as_lists(CELLS.first(9)) == as_lists(CELLS)


def test_cells_that_lie_anywhere() -> None:
    """In another order, and one of them cut."""
    views = CellViews(CELLS.tokens_T, CELLS.offsets[:-1], CELLS.lengths, CELLS.keys_N)
    some = views.part(np.array([2, 0]))
    cut = CellViews(some.tokens_T, some.starts_N, np.array([2, 3]), some.keys_N)
    assert as_lists(cut.ragged()) == [[0, 6], [0, 7, 9]]
    assert cut.ragged().keys_N.tolist() == [13, 11]
