"""Files of a perturbation's Answer.

table        ->  .csv | .tsv, smallest p first
layers       ->  .h5ad of cells x perturbations
moved genes  ->  .csv | .tsv
table        ->  .png: bars of shift, spread and controls of up to 20 perturbations, or without p;
                 of more a volcano plot: p over the shift relative to the controls', with some names
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from geneformer_mcore.inference.embed import FACTS
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io.files import whole_file
from geneformer_mcore.perturbation.perturb import Answer
from geneformer_mcore.report.figures import BLUE, ORANGE, new_figure

GREY = "#999999"
MOST_BARS, MOST_NAMES = 20, 8
SIGNIFICANT = 0.05


def write_table(path: Path, answer: Answer) -> None:
    """Write the rows, smallest p first, of equals the larger shift."""
    rows = answer.table
    largest_first = rows.sort_values("shift", ascending=False, kind="stable")
    _write(path, largest_first.sort_values("p", kind="stable").reset_index())


def write_moved_genes(path: Path, answer: Answer) -> None:
    """Write the most moved genes of every perturbation."""
    assert answer.moved_genes is not None
    _write(path, answer.moved_genes)


def write_cells(path: Path, answer: Answer) -> None:
    """Write cells x perturbations."""
    with whole_file(path) as partial:
        as_anndata(answer).write_h5ad(partial)


def as_anndata(answer: Answer) -> Any:
    """AnnData: X the shift of each cell's vector, layers the other shifts, var the table."""
    others = {name: values for name, values in answer.layers.items() if name != "shift"}
    return anndata_out.of_matrix(
        answer.layers["shift"], answer.obs, answer.table, others, {FACTS: answer.facts}
    )


def _write(path: Path, rows: pd.DataFrame) -> None:
    with whole_file(path) as partial:
        rows.to_csv(partial, sep="\t" if path.suffix == ".tsv" else ",", index=False)


def save(path: Path, answer: Answer) -> None:
    """Write the plot to `path`. Raises DataError where it cannot."""
    rows = answer.table[answer.table["n_cells"] > 0]
    has_goal = "goal_shift" in rows
    figure = new_figure(7, 4.6)
    axes = figure.add_subplot()
    if len(rows) <= MOST_BARS or rows["p"].isna().all():
        _bars(axes, rows, "goal_shift" if has_goal else "shift")
    else:
        _volcano(axes, rows, has_goal)
    what = answer.facts["perturb"]
    verb = {"delete": "deleted", "overexpress": "overexpressed"}[what["mode"]]
    goal = f", toward {what['goal']}" if has_goal else ""
    axes.set_title(f"{len(answer.obs):,} cells, genes {verb}{goal}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _bars(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    largest = rows.reindex(rows[column].abs().sort_values(ascending=False).index)[:MOST_BARS][::-1]
    places = np.arange(len(largest))
    error = (largest[f"{column}_sd"] / np.sqrt(largest["n_cells"])).fillna(0)
    axes.barh(places, largest[column], xerr=error, color=BLUE, ecolor=GREY, height=0.7)
    if column == "shift" and largest["control_shift"].notna().any():
        axes.plot(largest["control_shift"], places, "|", color=ORANGE, markersize=13,
                  markeredgewidth=2, label="mean of its controls")  # fmt: skip
        axes.legend(frameon=False)
    q = "goal_q" if column == "goal_shift" else "q"
    marks = np.where(largest[q] < SIGNIFICANT, " *", "")
    names = [f"{name}{mark}" for name, mark in zip(largest.index, marks, strict=True)]
    axes.set_yticks(places, names)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel(f"{_words(column)}, mean and standard error over cells (* q < {SIGNIFICANT})")


def _volcano(axes: Axes, rows: pd.DataFrame, has_goal: bool) -> None:
    if has_goal:
        x, p, q, label = rows["goal_shift"], rows["goal_p"], rows["goal_q"], _words("goal_shift")
    else:
        x, p, q = np.log2(rows["shift"] / rows["control_shift"]), rows["p"], rows["q"]
        label = "log2 of shift (1 - cosine) over the mean of its controls"
    height = -np.log10(p)
    is_found, has_none = (q < SIGNIFICANT).to_numpy(), q.isna().to_numpy()
    for chosen, colour, name in (
        (~is_found & ~has_none, GREY, f"q >= {SIGNIFICANT}"),
        (is_found, ORANGE, f"q < {SIGNIFICANT}"),
        # NaN, so that no mark is drawn: its controls are in no cell.
        (has_none, "none", "no p, not shown"),
    ):
        if chosen.any():
            label_here = f"{name}: {chosen.sum():,}"
            axes.scatter(x[chosen], height[chosen], 14, colour, alpha=0.8, label=label_here)
    named = pd.DataFrame({"p": p, "far": -x.abs()}).dropna().sort_values(["p", "far"])
    for name in named.index[:MOST_NAMES]:
        axes.annotate(name, (x[name], height[name]), (3, 3), textcoords="offset points", fontsize=7)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel(label)
    axes.set_ylabel("-log10 p, against random genes")
    # Without a frame the legend's marks look like genes.
    axes.legend(framealpha=1, loc="lower right")


def _words(column: str) -> str:
    return {
        "shift": "shift of the cell (1 - cosine)",
        "goal_shift": "shift toward the goal (cosine after - before)",
    }[column]
