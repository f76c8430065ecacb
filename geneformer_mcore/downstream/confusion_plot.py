"""A confusion matrix as a PNG: a row per true class, in shares of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from geneformer_mcore.cells.output import whole_file

_MOST_NUMBERED = 25
"""Classes up to which every field shows its number: more would not be legible."""


def save(counts_CC: np.ndarray, classes: Sequence[str], label: str, path: Path) -> None:
    """Writes the plot to `path`. No display is needed or opened. Raises DataError where it cannot.

    counts_CC: cells by true (row) and predicted class (column)
    """
    size = max(4.5, 0.42 * len(classes) + 2.5)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    of_each = counts_CC.sum(axis=1)
    shares_CC = counts_CC / np.maximum(of_each, 1)[:, None]
    picture = axes.imshow(shares_CC, cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=45, ha="right", rotation_mode="anchor")
    rows = [f"{name} ({count:,})" for name, count in zip(classes, of_each, strict=True)]
    axes.set_yticks(places, rows)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label (test cells)")
    accuracy = counts_CC.trace() / counts_CC.sum()
    axes.set_title(f"{label}: {accuracy:.1%} of {counts_CC.sum():,} test cells", fontsize=11)
    if len(classes) <= _MOST_NUMBERED:
        for true, predicted in zip(*np.nonzero(counts_CC), strict=True):
            dark = shares_CC[true, predicted] > 0.5
            axes.text(
                predicted,
                true,
                f"{counts_CC[true, predicted]}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    figure.colorbar(picture, ax=axes, label="share of the row", shrink=0.7)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
