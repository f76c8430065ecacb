"""The soma_joinids of chosen cells, kept as runs: the Census' data sets are few runs of many cells.

ids, ascending  ->  runs of neighbours (first id, place of the first)  ->  ids of places a..b
"""

from __future__ import annotations

import numpy as np


class JoinIds:
    """Ascending ids, by their places 0, 1, ...; 16 bytes for each run of neighbours."""

    def __init__(self, ids: np.ndarray) -> None:
        """ids: int64, strictly ascending (else ValueError)."""
        if len(ids) and (int(ids[0]) < 0 or np.any(np.diff(ids) <= 0)):
            raise ValueError("joinids must ascend from 0 or above, each once")
        breaks = np.flatnonzero(np.diff(ids) != 1) + 1
        self._places = np.concatenate([np.zeros(min(1, len(ids)), np.int64), breaks])
        self._firsts = ids[self._places].astype(np.int64)
        self._length = len(ids)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64: the ids of places start..stop-1."""
        places = np.arange(start, stop)
        runs = np.searchsorted(self._places, places, side="right") - 1
        return self._firsts[runs] + places - self._places[runs]

    def describe(self) -> bytes:
        """What is the same for the same ids alone."""
        return self._places.tobytes() + self._firsts.tobytes() + str(self._length).encode()


def as_coordinates(ids: np.ndarray) -> slice | np.ndarray:
    """What SOMA reads best: a slice where ids are neighbours (its end is part of it), else all."""
    if len(ids) and int(ids[-1]) - int(ids[0]) == len(ids) - 1:
        return slice(int(ids[0]), int(ids[-1]))
    return ids
