"""Which split a cell belongs to, as a pure function of the cell.

cell_key, dataset_id  ->  train | validation | test
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.keys import split_draws

SPLITS = ("train", "validation", "test")
"""In the order in which their rows lie in a store; a split's code is its place here."""


class SplitRule(Protocol):
    """Anything that deals cells to splits."""

    def assign(self, keys_N: np.ndarray, dataset_ids: Sequence[str]) -> np.ndarray:
        """int8 [N], the code of each cell's split. Must depend on nothing but the arguments."""
        ...

    def describe(self) -> dict[str, object]:
        """What the manifest says of the rule (plain JSON)."""
        ...


@dataclass(frozen=True)
class RandomSplit:
    """Cells at random, by a hash of their key: the same cell always falls into the same split.

    validation_fraction, test_fraction: expected shares, each >= 0, together < 1 (else DataError).
    """

    validation_fraction: float = 0.05
    test_fraction: float = 0.05

    def __post_init__(self) -> None:
        held_out = self.validation_fraction + self.test_fraction
        if not (self.validation_fraction >= 0 and self.test_fraction >= 0 and held_out < 1):
            raise DataError(
                "the fractions of validation and test must be >= 0 and together below 1, not "
                f"{self.validation_fraction} and {self.test_fraction}."
            )

    def assign(self, keys_N: np.ndarray, dataset_ids: Sequence[str]) -> np.ndarray:
        """int8 [N], the code of each cell's split."""
        draws = split_draws(keys_N)
        in_validation = draws < self.validation_fraction
        in_test = ~in_validation & (draws < self.validation_fraction + self.test_fraction)
        return (in_validation * 1 + in_test * 2).astype(np.int8)

    def describe(self) -> dict[str, object]:
        """The rule's name and fractions."""
        return {
            "policy": "random",
            "validation_fraction": self.validation_fraction,
            "test_fraction": self.test_fraction,
        }
