"""Figures as PNG: loss curve of a run, cell lengths of a store's input, confusion matrix.

Figures are drawn off screen. Functions that write one raise DataError where they cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from geneformer_mcore.io.files import whole_file
from geneformer_mcore.report.results import Curve, Results
from geneformer_mcore.store.report import Lengths, SourceReport

# Okabe and Ito's colours, which most eyes can tell apart.
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#666666", "#009E73"
BASELINES = (
    ("unigram", "baseline: unigram", GREY, "--"),
    ("gene_given_rank", "baseline: gene given rank", GREEN, "-."),
)
MOST_BARS = 64
"""Of a histogram of lengths."""
MOST_NUMBERED = 25
"""Classes up to which every field of a confusion matrix shows its number."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_loss(results: Results, path: Path) -> None:
    """Write the loss curves of training and validation, and the baselines."""
    figure = new_figure(8, 4.8)
    axes = figure.add_subplot()
    baselines = results.baselines or {}
    for name, label, colour, style in BASELINES:
        if name in baselines:
            nats = baselines[name]
            axes.axhline(nats, color=colour, linestyle=style, label=f"{label} ({nats:.2f})")
    axes.plot(*_points(results.train), color=BLUE, linewidth=1.4, label="training")
    last = results.validation.last
    label = "validation" if last is None else f"validation (last {last:.2f})"
    axes.plot(*_points(results.validation), "o-", color=ORANGE, markersize=5, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per masked gene)")
    axes.set_title(results.run_dir.name)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """Write a figure of one plot, with a grid and a legend."""
    (axes,) = figure.axes
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """float64 [steps] twice; a missing loss is a gap."""
    return np.array(curve.steps, dtype=np.float64), np.array(curve.losses, dtype=np.float64)


def save_lengths(source: SourceReport, seq_length: int, path: Path) -> None:
    """Write a histogram of tokens per stored cell, of one source of a manifest."""
    figure = new_figure(7, 3.6)
    axes = figure.add_subplot()
    edges, cells = _bars(source.lengths)
    axes.stairs(cells, edges, fill=True, color=BLUE, alpha=0.85)
    median = source.tokens_median
    axes.axvline(median, color=ORANGE, linewidth=1.4, label=f"median {median:,.0f}")
    # Truncated cells are all in the last bar, which must not flatten the others.
    most = max(cells[:-1].max(initial=0), 1)
    if cells[-1] > 2 * most:
        axes.set_ylim(0, 1.5 * most)
        place, text = (edges[-1], 1.4 * most), f"{cells[-1]:,.0f} cells"
        axes.annotate(text, place, (-10, 0), ha="right", textcoords="offset points", color=BLUE)
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel("tokens per cell, [CLS] included")
    axes.set_ylabel(f"cells per {edges[-1] - edges[-2]:,} tokens")
    stored, cut = source.cells_stored, source.cells_cut
    axes.set_title(f"{source.name}: {stored:,} cells, {cut:,} cut to {seq_length:,} tokens")
    _save(figure, path)


def _bars(lengths: Lengths) -> tuple[np.ndarray, np.ndarray]:
    """(edges [bars + 1] in tokens, cells [bars]) from the bins of a SourceReport."""
    cells = np.array(lengths.cells)
    bins = max(1, -(-len(cells) // MOST_BARS))
    padded = np.pad(cells, (-len(cells) % bins, 0))
    bars = padded.reshape(-1, bins).sum(axis=1)
    edges = (np.arange(len(bars) + 1) * bins - (len(padded) - len(cells))) * lengths.bin_tokens
    return np.maximum(edges, 0), bars


def save_confusion(counts_CC: np.ndarray, classes: Sequence[str], label: str, path: Path) -> None:
    """Write a confusion matrix in shares of each row. counts_CC: cells by true (row) and predicted
    class (column)."""
    size = max(4.5, 0.42 * len(classes) + 2.5)
    figure = new_figure(size + 0.8, size)
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
    if len(classes) <= MOST_NUMBERED:
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
        for true, predicted in zip(*np.nonzero(counts_CC), strict=True):
            colour = "white" if shares_CC[true, predicted] > 0.5 else "black"
            text = f"{counts_CC[true, predicted]}"
            axes.text(predicted, true, text, color=colour, **style)
    figure.colorbar(picture, ax=axes, label="share of the row", shrink=0.7)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
