"""How well a trained model predicts hidden genes of cells that it has not seen.

    checkpoint + split of a store -> masks by (seed, cell) -> sums per cell, in the store's order
    training cells of the store   -> unigram, gene given rank -> the same sums for the baselines
    sums per cell + obs           -> totals, and per group of every column asked for -> Evaluation

Masks are a function of seed and cell alone and sums are in fp64, so no layout changes a figure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from geneformer_mcore.config.sections import Precision
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.inference import encoder, pretrained
from geneformer_mcore.inference.cells import StoredCells
from geneformer_mcore.inference.embed import facts_of
from geneformer_mcore.inference.encoder import BLOCK_CELLS, CellFunction
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.files import whole_file
from geneformer_mcore.io.progress import ProgressLine, no_progress
from geneformer_mcore.metrics import baselines
from geneformer_mcore.metrics.provenance import provenance
from geneformer_mcore.model import forward_only
from geneformer_mcore.report.figures import BLUE, GREEN, GREY

BASELINE_CELLS = 20_000
"""Training cells that the baselines are counted on, at most: as many as in training."""
USUAL_COLUMNS = ("tissue_general", "assay", "cell_type", "dataset_id")
"""Columns of obs by which losses are broken down unless told otherwise, where a store has them."""
BASELINE_COLUMNS = ("unigram_sum", "gene_given_rank_sum")
MISSING = "(none)"


@dataclass(frozen=True)
class EvaluateRequest:
    """What launch/evaluate.py was asked for.

    columns:         of obs, to break down by; None takes the USUAL_COLUMNS that there are
    mask_fractions:  [MASK], random gene, unchanged; None takes the model's own, as does seed
    """

    checkpoint: Path
    store: str
    split: str = "test"
    columns: Sequence[str] | None = None
    mask_fractions: Sequence[float] | None = None
    seed: int | None = None
    precision: Precision | None = None
    tokens_per_batch: int = 0
    vocabulary: Path | None = None
    layout: Sequence[str] = ()


@dataclass(frozen=True)
class Evaluation:
    """facts: what was evaluated on what;  overall: figures of all cells;  by: column -> group ->
    figures, largest groups first;  notes: what a reader must know of them.

    Figures (see `_figures`) are in nats per hidden gene, and shares of them.
    """

    facts: dict[str, Any]
    overall: dict[str, Any]
    by: dict[str, dict[str, dict[str, Any]]]
    notes: list[str] = field(default_factory=list)


def evaluate(request: EvaluateRequest, is_first: bool) -> Evaluation | None:
    """Evaluates on the ranks that are here; the figures are on the first one, None on the others.

    Raises a GeneformerError for what the user can mend, such as masks that hide nothing.
    """
    model = pretrained.find(request.checkpoint, request.vocabulary, request.layout)
    data, train = model.config.data, model.config.train
    if request.mask_fractions is not None:
        data.mask_fractions = list(request.mask_fractions)
    train.seed = train.seed if request.seed is None else request.seed
    cells = StoredCells(request.store, model.vocabulary, data.seq_length, request.split)
    with ExitStack() as stack:
        stack.callback(cells.close)
        columns = _columns(cells, request)
        engine = stack.enter_context(
            encoder.started(model, request.precision, request.tokens_per_batch)
        )
        masked, random, kept = data.mask_fractions  # three, or `started` would have refused
        fractions = (masked, random, kept)
        masking = Masking(data.mask_probability, fractions, model.vocabulary.size, train.seed)
        work = CellFunction(
            "evaluating",
            len(forward_only.PREDICTION_COLUMNS),
            masking,
            forward_only.cell_predictions,
        )
        line = stack.enter_context(ProgressLine("cells")) if is_first else None
        progress = line.update if line else no_progress
        sums_NW = encoder.per_cell(engine, cells, work, np.float64, progress)
        if sums_NW is None:
            return None
        table = pd.DataFrame(np.nan_to_num(sums_NW), columns=list(forward_only.PREDICTION_COLUMNS))
        _refuse_nothing(table, masking, request)
        described = _add_baselines(table, cells, masking)
        facts = _facts(model, cells, request, masking) | {
            "precision": engine.precision.value,
            "baselines": described,
        }
        by = {name: _by(table, cells.obs()[name]) for name in columns}
    return Evaluation(facts, _figures(table), by, _notes(model, cells))


def _columns(cells: StoredCells, request: EvaluateRequest) -> list[str]:
    if len(cells) == 0:
        rows = cells.store.manifest.rows
        raise DataError(
            f"{request.store}: its {request.split} split has no cells (cells: "
            + ", ".join(f"{name} {stop - start:,}" for name, (start, stop) in rows.items())
            + "). Remedy: another --split, or a store built with a larger fraction for this one."
        )
    there = {*cells.store.manifest.labels, "dataset_id"}
    if request.columns is None:
        return [name for name in USUAL_COLUMNS if name in there]
    strange = [name for name in request.columns if name not in there]
    if strange:
        raise DataError(
            f"{request.store}: --by takes columns of its obs ({', '.join(sorted(there))}), and "
            f"got {', '.join(strange)}."
        )
    return list(request.columns)


def _refuse_nothing(table: pd.DataFrame, masking: Masking, request: EvaluateRequest) -> None:
    if table["num_predicted"].sum() == 0:
        raise DataError(
            f"no gene is hidden in the {len(table):,} cell(s) of {request.split} with probability "
            f"{masking.probability} and seed {masking.seed}, so there is nothing to predict. "
            "Remedy: a split with more cells, or another --seed."
        )


def _add_baselines(table: pd.DataFrame, cells: StoredCells, masking: Masking) -> dict[str, Any]:
    """Adds the BASELINE_COLUMNS: what the baselines lose on the very genes that were hidden."""
    labels, positions, owners = [], [], []
    for start in range(0, len(cells), BLOCK_CELLS):
        block = cells.read(start, min(start + BLOCK_CELLS, len(cells)))
        found, places, whose = masking.validation_genes(block)
        labels.append(found)
        positions.append(places)
        owners.append(start + whose)
    labels_M, positions_M = np.concatenate(labels), np.concatenate(positions)
    owners_M = np.concatenate(owners)
    seen = cells.training_cells(BASELINE_CELLS)
    if len(seen) == 0:
        raise DataError(
            f"{cells.store.path}: the baselines are counted on training cells, and it has none. "
            "Remedy: evaluate on the store that the model was trained on."
        )
    alpha, ranks = baselines.fit(seen, masking.vocabulary_size, labels_M, positions_M)
    for name, log_p_M in (
        ("unigram_sum", ranks.unigram_V[labels_M]),
        ("gene_given_rank_sum", ranks.log_probabilities(labels_M, positions_M)),
    ):
        table[name] = np.bincount(owners_M, -log_p_M, minlength=len(table))
    return {"training_cells": len(seen), "alpha": alpha, "shrinkage": ranks.shrinkage}


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    """loss: mean over hidden genes;  cell_mean_loss: mean over cells of their own means, as the
    model card counts;  top1, top5: shares of hidden genes among the likeliest 1 and 5;  masked_*:
    the same of genes shown as [MASK] alone, None if there are none: others can be copied."""
    hidden = table["num_predicted"]
    total, masked = int(hidden.sum()), int(table["num_masked"].sum())
    has = hidden > 0
    if total == 0:
        return {"num_cells": len(table), "num_predicted": 0}
    loss = float(table["loss_sum"].sum()) / total
    return {
        "num_cells": len(table),
        "num_predicted": total,
        "loss": loss,
        "cell_mean_loss": float((table["loss_sum"][has] / hidden[has]).mean()),
        "perplexity": math.exp(loss),
        "top1": float(table["num_top1"].sum()) / total,
        "top5": float(table["num_top5"].sum()) / total,
        "num_masked": masked,
        "masked_loss": _share(table["masked_loss_sum"], masked),
        "masked_top1": _share(table["masked_num_top1"], masked),
        "masked_top5": _share(table["masked_num_top5"], masked),
        "unigram": float(table["unigram_sum"].sum()) / total,
        "gene_given_rank": float(table["gene_given_rank_sum"].sum()) / total,
    }


def _share(column: pd.Series, of: int) -> float | None:
    return float(column.sum()) / of if of else None


def _by(table: pd.DataFrame, labels: pd.Series) -> dict[str, dict[str, Any]]:
    names = labels.astype(object).where(labels.notna(), MISSING).astype(str).to_numpy()
    groups = {str(name): _figures(part) for name, part in table.groupby(names, sort=True)}
    return dict(sorted(groups.items(), key=lambda item: -item[1]["num_cells"]))


def _facts(
    model: Pretrained, cells: StoredCells, request: EvaluateRequest, masking: Masking
) -> dict[str, Any]:
    return facts_of(model) | {
        "store": Path(request.store).resolve().name,
        "content_hash": cells.store.manifest.content_hash,
        "trained_on_this_store": _is_own_store(model, cells),
        "split": request.split,
        "mask_probability": masking.probability,
        "mask_fractions": list(masking.fractions),
        "seed": masking.seed,
    }


def _is_own_store(model: Pretrained, cells: StoredCells) -> bool:
    return cells.store.manifest.content_hash == model.record.identity.content


def _notes(model: Pretrained, cells: StoredCells) -> list[str]:
    if _is_own_store(model, cells):
        return []
    return [
        "the model was trained on another store than this one: whether it has seen these cells "
        "in training cannot be told from their split"
    ]


def parse_fractions(text: str) -> list[float]:
    """ "0.8,0.02,0.18" as numbers; that they are shares is checked with the settings."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--mask-fractions are three shares with commas between, such as 0.8,0.02,0.18, and "
            f"are {text}."
        ) from None


# An evaluation as a table for people, as JSON, and as bars.
#
# Evaluation  ->  lines  |  evaluation.json  |  one PNG per column of obs, and one of the whole

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
