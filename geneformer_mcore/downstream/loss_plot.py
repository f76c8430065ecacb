"""The loss curve of a run as a PNG: training, validation, and the baselines to beat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from geneformer_mcore.downstream.results import Curve, Results
from geneformer_mcore.errors import DataError

# Okabe and Ito's colours, which most eyes can tell apart.
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#666666", "#009E73"
BASELINES = (
    ("unigram", "baseline: unigram", GREY, "--"),
    ("gene_given_rank", "baseline: gene given rank", GREEN, "-."),
)


def save(results: Results, path: Path) -> None:
    """Writes the plot of `results` to `path` (PNG). No display is needed or opened. Raises
    DataError where it cannot."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
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
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise DataError(f"the plot {path} cannot be written: {error.strerror}.") from None


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """float64 [steps] twice; a missing loss is a gap."""
    return np.array(curve.steps, dtype=np.float64), np.array(curve.losses, dtype=np.float64)
