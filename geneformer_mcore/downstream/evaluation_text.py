"""An evaluation as a table for people, as JSON, and as bars.

Evaluation  ->  lines  |  evaluation.json  |  one PNG per column of obs, and one of the whole
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from geneformer_mcore.cells.output import whole_file
from geneformer_mcore.downstream.evaluate import Evaluation
from geneformer_mcore.downstream.loss_plot import BLUE, GREEN, GREY
from geneformer_mcore.metrics.provenance import provenance

MOST_GROUPS = 20
"""Groups of a column that are shown; all are in the JSON."""
_HEADINGS = (
    *("cells", "genes", "loss", "per cell", "perplexity", "top-1", "top-5"),
    *("[MASK] loss", "[MASK] top-1", "[MASK] top-5", "unigram", "rank"),
)


def lines(evaluation: Evaluation) -> list[str]:
    """What the command prints."""
    facts = evaluation.facts
    shares = ", ".join(f"{share:g}" for share in facts["mask_fractions"])
    found = [
        f"{facts['checkpoint']} on {facts['split']} of {facts['store']}: "
        f"{facts['mask_probability']:.0%} of genes hidden ({shares}), seed {facts['seed']}",
        "loss, unigram, rank: nats per hidden gene, of the model, of p(gene), of p(gene | rank); "
        "per cell: mean over cells;",
        "[MASK]: of the genes shown as [MASK] alone: one that is shown unchanged can be copied",
        "",
    ]
    width = max(len(name) for name in ["all", *_shown_names(evaluation)])
    found += [_row("", _HEADINGS, width), _row("all", _cells(evaluation.overall), width)]
    for column, groups in evaluation.by.items():
        found += ["", f"by {column}"]
        shown = list(groups.items())[:MOST_GROUPS]
        found += [_row(name, _cells(figures), width) for name, figures in shown]
        if len(groups) > MOST_GROUPS:
            found.append(f"and {len(groups) - MOST_GROUPS} more, in the JSON")
    return found + [f"note: {note}" for note in evaluation.notes]


def save_json(evaluation: Evaluation, path: Path) -> None:
    """Writes all figures, with machine, versions and commit. Raises DataError if it cannot."""
    content = {
        **evaluation.overall,
        "by": evaluation.by,
        "notes": evaluation.notes,
        **evaluation.facts,
        **provenance(),
    }
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def save_plots(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Writes loss.png, and loss_by_COLUMN.png per column. Raises DataError if it cannot."""
    whole = {evaluation.facts["split"]: evaluation.overall}
    found = []
    for column, groups in [("", whole), *evaluation.by.items()]:
        plain = re.sub(r"[^\w.-]+", "_", column)
        path = folder / (f"loss_by_{plain}.png" if column else "loss.png")
        with whole_file(path) as partial:
            _bars(groups, column or "split").savefig(partial, dpi=120, format="png")
        found.append(path)
    return found


def _bars(groups: dict[str, dict[str, Any]], column: str) -> Figure:
    shown = [item for item in groups.items() if item[1]["num_predicted"]][:MOST_GROUPS]
    figure = Figure(figsize=(8, 1.6 + 0.55 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds = (
        ("loss", "model", BLUE),
        ("gene_given_rank", "baseline: gene given rank", GREEN),
        ("unigram", "baseline: unigram", GREY),
    )
    for place, (key, label, colour) in enumerate(kinds):
        heights = [figures[key] for _, figures in shown]
        middles = [number + (place - 1) * 0.27 for number in range(len(shown))]
        bars = axes.barh(middles, heights, 0.25, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set_yticks(range(len(shown)), [f"{name} ({f['num_cells']:,})" for name, f in shown])
    axes.invert_yaxis()
    axes.set_xlabel("loss (nats per hidden gene)")
    axes.set_ylabel(f"{column} (cells)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _shown_names(evaluation: Evaluation) -> list[str]:
    return [name for groups in evaluation.by.values() for name in list(groups)[:MOST_GROUPS]]


def _cells(figures: dict[str, Any]) -> tuple[str, ...]:
    counts = (f"{figures['num_cells']:,}", f"{figures['num_predicted']:,}")
    if not figures["num_predicted"]:
        return (*counts, *["-"] * (len(_HEADINGS) - 2))
    return (
        *counts,
        f"{figures['loss']:.4f}",
        f"{figures['cell_mean_loss']:.4f}",
        f"{figures['perplexity']:,.1f}",
        f"{figures['top1']:.2%}",
        f"{figures['top5']:.2%}",
        *_masked(figures),
        f"{figures['unigram']:.4f}",
        f"{figures['gene_given_rank']:.4f}",
    )


def _masked(figures: dict[str, Any]) -> tuple[str, str, str]:
    if not figures["num_masked"]:
        return "-", "-", "-"
    loss, top1, top5 = (figures[f"masked_{name}"] for name in ("loss", "top1", "top5"))
    return f"{loss:.4f}", f"{top1:.2%}", f"{top5:.2%}"


def _row(name: str, values: tuple[str, ...], width: int) -> str:
    return f"{name:<{width}}" + "".join(
        f"{value:>{max(11, len(heading) + 2)}}"
        for value, heading in zip(values, _HEADINGS, strict=True)
    )
