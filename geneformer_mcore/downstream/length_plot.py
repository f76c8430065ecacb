"""How long the cells of an input are, as a PNG: a histogram of tokens per stored cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from geneformer_mcore.errors import DataError

BLUE, ORANGE = "#0072B2", "#D55E00"
MOST_BARS = 64


def save(source: dict[str, Any], seq_length: int, path: Path) -> None:
    """Writes the plot of one source of a manifest (see SourceReport) to `path`. No display is
    needed or opened. Raises DataError where it cannot be written."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    edges, cells = _bars(source["lengths"])
    axes.stairs(cells, edges, fill=True, color=BLUE, alpha=0.85)
    median = source["tokens_median"]
    axes.axvline(median, color=ORANGE, linewidth=1.4, label=f"median {median:,.0f}")
    # Cells cut to the full length stand in one bar, which must not flatten all others.
    most = max(cells[:-1].max(initial=0), 1)
    if cells[-1] > 2 * most:
        axes.set_ylim(0, 1.5 * most)
        axes.annotate(
            f"{cells[-1]:,.0f} cells",
            (edges[-1], 1.4 * most),
            (-10, 0),
            ha="right",
            textcoords="offset points",
            color=BLUE,
        )
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel("tokens per cell, [CLS] included")
    axes.set_ylabel(f"cells per {edges[-1] - edges[-2]:,} tokens")
    stored, cut = source["cells_stored"], source["cells_cut"]
    axes.set_title(f"{source['name']}: {stored:,} cells, {cut:,} cut to {seq_length:,} tokens")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise DataError(f"the plot {path} cannot be written: {error.strerror}.") from None


def _bars(lengths: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(edges [bars + 1] in tokens, cells [bars]), a few bins to a bar; see SourceReport.lengths."""
    cells = np.array(lengths["cells"])
    bins = max(1, -(-len(cells) // MOST_BARS))
    padded = np.pad(cells, (-len(cells) % bins, 0))
    bars = padded.reshape(-1, bins).sum(axis=1)
    edges = (np.arange(len(bars) + 1) * bins - (len(padded) - len(cells))) * lengths["bin_tokens"]
    return np.maximum(edges, 0), bars
