"""Which cells have a label, and what the classes are.

obs column of all cells -> empty: left out, counted       -> the labelled cells, numbered anew
                        -> classes: those of training cells, sorted
                        -> of held-out cells, a class without a training cell: left out, counted
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geneformer_mcore.errors import DataError
from geneformer_mcore.feed.labelled import labelled_source
from geneformer_mcore.store.labels import as_text
from geneformer_mcore.train.data import Cells

_FEW_CELLS = 2
"""So many training cells per class, in the mean, are the least: else the column names cells."""


@dataclass(frozen=True)
class Labels:
    """The classes of the cells that have one.

    name:        the column of obs
    classes:     their names, sorted; a class is its place in here
    keys_N, classes_N:  uint64, int64: `cell_key` and class of every labelled cell
    counts:      {split: {class: cells}}
    unlabelled:  {split: cells without a value}, which are left out
    unseen:      {class: held-out cells}, left out because no training cell has that class
    """

    name: str
    classes: tuple[str, ...]
    keys_N: np.ndarray
    classes_N: np.ndarray
    counts: dict[str, dict[str, int]]
    unlabelled: dict[str, int]
    unseen: dict[str, int]

    def described(self) -> dict[str, Any]:
        """Plain JSON, for people."""
        names = ("counts", "unlabelled", "unseen")
        parts = {name: getattr(self, name) for name in names}
        return {"label": self.name, "classes": list(self.classes)} | parts

    def told(self) -> list[str]:
        """Lines for the console."""
        cells = sum(self.counts["train"].values())
        lines = [
            f"{self.name}: {len(self.classes)} classes, {cells:,} training cells, the fewest "
            f"{min(self.counts['train'].values()):,} of a class"
        ]
        left_out = sum(self.unlabelled.values())
        if left_out:
            lines.append(f"{left_out:,} cell(s) without a value of {self.name} are left out")
        if self.unseen:
            found = ", ".join(f"{name} ({cells:,})" for name, cells in self.unseen.items())
            lines.append(
                "no training cell has these classes, so held-out cells of them are left out: "
                + found
            )
        return lines


def labelled(cells: Cells, name: str) -> tuple[Cells, Labels]:
    """The cells that have a label, as cells of their own, and their classes.

    Raises DataError if there is no such column, or it holds no classes.
    """
    if cells.labels is None:
        raise DataError(f"{cells.name} has no labels. Remedy: name a token store.")
    table = cells.labels(name)
    text_N = as_text(table[name], cells.name, name)
    start, stop = cells.rows["train"]
    classes = np.unique([each for each in text_N[start:stop] if each])
    _check_classes(classes, stop - start, cells, name)
    places_N = np.minimum(np.searchsorted(classes, text_N), len(classes) - 1)
    is_known_N = classes[places_N] == text_N
    rows = np.flatnonzero(is_known_N)
    found = Labels(
        name,
        tuple(str(each) for each in classes),
        table["cell_key"].to_numpy()[rows].astype(np.uint64),
        places_N[rows].astype(np.int64),
        {split: dict(sorted(Counter(text_N[slice(*span)][is_known_N[slice(*span)]].tolist())
                            .items())) for split, span in cells.rows.items()},
        {split: int((text_N[slice(*span)] == "").sum()) for split, span in cells.rows.items()},
        dict(sorted(Counter(text_N[~is_known_N & (text_N != "")].tolist()).items())),
    )  # fmt: skip
    return _numbered_anew(cells, rows), found


def _check_classes(classes: np.ndarray, num_cells: int, cells: Cells, name: str) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{cells.name}: training cells must have two values of {name!r} at least, to be told "
            f"apart, and have {len(classes)}"
            + (f" ({classes[0]})" if len(classes) else "")
            + ". Remedy: another --label, or a store of more cells."
        )
    if len(classes) * _FEW_CELLS > num_cells:
        raise DataError(
            f"{cells.name}: {name!r} has {len(classes):,} values in {num_cells:,} training cells: "
            "that names cells, and not classes of them. Remedy: another --label."
        )


def _numbered_anew(cells: Cells, rows: np.ndarray) -> Cells:
    ends = {
        split: (int(np.searchsorted(rows, start)), int(np.searchsorted(rows, stop)))
        for split, (start, stop) in cells.rows.items()
    }
    return replace(
        cells,
        rows=ends,
        source=labelled_source(cells.source, rows),
        names=lambda numbers: cells.names(rows[numbers]),
    )
