"""Figures of a Classification: scores, confusion matrices, UMAPs.

Classification  ->  scores.png     macro F1 of every method, with its interval
                    confusion.png  true against predicted labels, forest on each kind of features
                    umap.png       scanpy's UMAP of each kind of features, coloured by true label
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geneformer_mcore.celltypes.classify import Classification, Judged
from geneformer_mcore.celltypes.cross_validation import Features, principal_components
from geneformer_mcore.io.files import whole_file
from geneformer_mcore.report.figures import BLUE, GREEN, GREY, ORANGE, new_figure

MOST_PANELS = 4
MOST_COLOURS = 20
_COLOURS = (BLUE, ORANGE, GREEN, GREY)
_MOST_LETTERS = 28


def save(found: Classification, folder: Path, seed: int) -> list[str]:
    """Write the figures into a folder. Returns their names."""
    figures: dict[str, Callable[[], Figure]] = {
        "scores.png": lambda: _bars(found.judged),
        "confusion.png": lambda: _confusion(found.judged[0]),
        "umap.png": lambda: _umaps(found, seed),
    }
    for name, draw in figures.items():
        figure = draw()
        with whole_file(folder / name) as partial:
            figure.savefig(partial, dpi=110, format="png")
    return list(figures)


def _bars(judged: list[Judged]) -> Figure:
    num_methods = len(judged[0].methods)
    figure = new_figure(4 + 3.4 * len(judged), 1.4 + 0.36 * num_methods)
    panels = figure.subplots(1, len(judged), squeeze=False, sharey=True)[0]
    kinds = list(dict.fromkeys(each.features for each in judged[0].methods))
    for axes, one in zip(panels, judged, strict=True):
        for y, each in enumerate(one.methods):
            score = each.scores["macro_f1"]
            value = score["value"]
            low, high = score.get("low", value), score.get("high", value)
            colour = _COLOURS[kinds.index(each.features) % len(_COLOURS)]
            margin = np.abs([[value - low], [high - value]])
            axes.barh(y, value, 0.75, color=colour, xerr=margin, capsize=2)
            axes.annotate(f"{value:.2f}", (high + 0.015, y), va="center", fontsize=8)
        names = [f"{each.features}, {each.classifier}" for each in one.methods]
        axes.set_yticks(range(num_methods), names, fontsize=8)
        axes.set_xlim(0, 1.08)
        axes.set_xlabel("macro F1, with 95 % interval")
        axes.set_title(one.scheme.name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return figure


def _confusion(judged: Judged) -> Figure:
    """Confusion matrices of the model card's classifier on each kind of features."""
    kinds = list(dict.fromkeys(each.features for each in judged.methods))[:MOST_PANELS]
    labels = [_short(label) for label in judged.labels]
    side = 1.6 + 0.28 * len(labels)
    figure = new_figure(1.8 + side * len(kinds), side + 2.4)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        counts = np.array(judged.method(kind).scores["confusion"], np.float64)
        share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("predicted")
    panels[0].set_yticks(range(len(labels)), labels, fontsize=7)
    panels[0].set_ylabel("true")
    figure.colorbar(image, ax=list(panels), label="share of the label's cells", shrink=0.7)
    return figure


def _umaps(found: Classification, seed: int) -> Figure:
    shown = found.features[:MOST_PANELS]
    judged = found.judged[0]
    figure = new_figure(3.6 * len(shown) + 2.6, 4.0)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    truth_N = found.cells.labels_N[judged.scheme.cells]
    for axes, each in zip(panels, shown, strict=True):
        _scatter(axes, _umap(each, judged.scheme.cells, seed), truth_N, judged.labels)
        axes.set_title(each.name, fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)
    return figure


def _umap(features: Features, cells: np.ndarray, seed: int) -> np.ndarray:
    """[cells, 2]. PCA is fitted to all cells, as nothing is predicted."""
    values = features.values[cells]
    if features.is_counts:
        values = principal_components(values, seed).transform(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of umap and numba, of themselves.
        import scanpy

        adata = scanpy.AnnData(np.zeros((len(cells), 1), np.float32))
        adata.obsm["X"] = np.asarray(values, np.float32)
        neighbours = min(15, len(cells) - 1)
        scanpy.pp.neighbors(adata, neighbours, use_rep="X", random_state=seed)
        scanpy.tl.umap(adata, random_state=seed)
    return adata.obsm["X_umap"]


def _scatter(axes: Axes, points_N2: np.ndarray, truth_N: np.ndarray, labels: list[str]) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"](np.arange(MOST_COLOURS))
    size = float(np.clip(6000 / len(truth_N), 1, 12))
    for number, label in enumerate(labels):
        name = _short(label) if number < MOST_COLOURS else None
        colour = colours[number % MOST_COLOURS]
        x, y = points_N2[truth_N == label].T
        axes.scatter(x, y, s=size, color=colour, linewidths=0, label=name)
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")


def _short(label: str) -> str:
    return label if len(label) <= _MOST_LETTERS else f"{label[: _MOST_LETTERS - 3]}..."
