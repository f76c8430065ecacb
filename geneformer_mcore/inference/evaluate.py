"""Evaluation of a trained model: loss and accuracy of masked genes of held-out cells.

    checkpoint + split of a store -> masks by (seed, cell) -> sums per cell, in the store's order
    training cells of the store   -> unigram, gene given rank -> the same sums for the baselines
    sums per cell + obs           -> totals, and per group of each column -> Evaluation
    Evaluation                    -> lines  |  evaluation.json  |  bars as PNG

Masks are a function of seed and cell alone and sums are in fp64, so no layout changes a figure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from geneformer_mcore.config.sections import Precision
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.inference import encoder, pretrained
from geneformer_mcore.inference.cells import StoredCells
from geneformer_mcore.inference.embed import facts_of
from geneformer_mcore.inference.encoder import BLOCK_CELLS, CellFunction
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.files import whole_file, write_json
from geneformer_mcore.metrics import baselines
from geneformer_mcore.metrics.provenance import provenance
from geneformer_mcore.model import forward_only
from geneformer_mcore.report.figures import BLUE, GREEN, GREY, new_figure

BASELINE_CELLS = 20_000
"""Most training cells that the baselines are fitted to, as in training."""
USUAL_COLUMNS = ("tissue_general", "assay", "cell_type", "dataset_id")
"""Default columns of obs to break losses down by, where a store has them."""
MISSING = "(none)"
MOST_GROUPS = 20
"""Groups of a column that are shown; all are in the JSON."""
_MOST_NATS = 700.0
"""Of a loss whose perplexity fp64 can hold."""
_COLUMNS = (
    ("cells", "num_cells", ","),
    ("genes", "num_predicted", ","),
    ("loss", "loss", ".4f"),
    ("per cell", "cell_mean_loss", ".4f"),
    ("perplexity", "perplexity", ",.1f"),
    ("top-1", "top1", ".2%"),
    ("top-5", "top5", ".2%"),
    ("[MASK] loss", "masked_loss", ".4f"),
    ("[MASK] top-1", "masked_top1", ".2%"),
    ("[MASK] top-5", "masked_top5", ".2%"),
    ("unigram", "unigram", ".4f"),
    ("rank", "gene_given_rank", ".4f"),
)
"""(heading, figure, its format) of the printed table."""


@dataclass(frozen=True)
class EvaluateRequest:
    """Arguments of launch/evaluate.py.

    columns:         of obs, to break losses down by; None: USUAL_COLUMNS
    mask_fractions:  [MASK], random gene, unchanged; None: those of training, as for seed
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
    """facts: model, cells and masks;  overall: figures of all cells;  by: column -> group ->
    figures, largest groups first;  notes: caveats. For the figures see `_figures`."""

    facts: dict[str, Any]
    overall: dict[str, Any]
    by: dict[str, dict[str, dict[str, Any]]]
    notes: list[str] = field(default_factory=list)


def evaluate(request: EvaluateRequest, is_first: bool) -> Evaluation | None:
    """Evaluate on all ranks: the Evaluation on the first one, None on others.

    Raises a GeneformerError for the user's mistakes, such as masks without a gene.
    """
    model = pretrained.find(request.checkpoint, request.vocabulary, request.layout)
    data, train = model.config.data, model.config.train
    if request.mask_fractions is not None:
        data.mask_fractions = list(request.mask_fractions)
    train.seed = train.seed if request.seed is None else request.seed
    opened = StoredCells(request.store, model.vocabulary, data.seq_length, request.split)
    names = forward_only.PREDICTION_COLUMNS
    with closing(opened) as cells:
        columns = _columns(cells, request)
        with (
            encoder.started(model, request.precision, request.tokens_per_batch) as engine,
            encoder.progress_line("cells", is_first) as progress,
        ):
            masked, random, kept = data.mask_fractions  # `started` has checked that they are three
            fractions = (masked, random, kept)
            masking = Masking(data.mask_probability, fractions, model.vocabulary.size, train.seed)
            work = CellFunction("evaluating", len(names), masking, forward_only.cell_predictions)
            sums_NW = encoder.per_cell(engine, cells, work, np.float64, progress)
        if sums_NW is None:
            return None
        table = pd.DataFrame(np.nan_to_num(sums_NW), columns=list(names))
        _check_masks(table, masking, request)
        facts = _facts(model, cells, request, masking)
        facts["precision"] = engine.precision.value
        facts["baselines"] = _add_baselines(table, cells, masking)
        by = {name: _by(table, cells.obs()[name]) for name in columns}
    notes = []
    if not facts["trained_on_this_store"]:
        notes.append(
            "the model was trained on another store than this one: whether it has seen these cells "
            "in training cannot be told from their split"
        )
    return Evaluation(facts, _figures(table), by, notes)


def _columns(cells: StoredCells, request: EvaluateRequest) -> list[str]:
    if len(cells) == 0:
        rows = cells.store.manifest.rows
        raise DataError(
            f"{request.store}: its {request.split} split has no cells (cells: "
            + ", ".join(f"{name} {stop - start:,}" for name, (start, stop) in rows.items())
            + "). Remedy: another `split=`, or a store built with a larger fraction for this one."
        )
    known = {*cells.store.manifest.labels, "dataset_id"}
    if request.columns is None:
        return [name for name in USUAL_COLUMNS if name in known]
    unknown = [name for name in request.columns if name not in known]
    if unknown:
        raise DataError(
            f"{request.store}: `columns=` takes those of its obs ({', '.join(sorted(known))}), and "
            f"got {', '.join(unknown)}."
        )
    return list(request.columns)


def _check_masks(table: pd.DataFrame, masking: Masking, request: EvaluateRequest) -> None:
    if table["num_predicted"].sum() == 0:
        raise DataError(
            f"no gene is masked in the {len(table):,} cell(s) of {request.split} with probability "
            f"{masking.probability} and seed {masking.seed}, so there is nothing to predict. "
            "Remedy: a split with more cells, or another `seed=`."
        )


def _add_baselines(table: pd.DataFrame, cells: StoredCells, masking: Masking) -> dict[str, Any]:
    """Add unigram_sum and gene_given_rank_sum, the baselines' losses on the same masked genes."""
    masked = []
    for start in range(0, len(cells), BLOCK_CELLS):
        block = cells.read(start, min(start + BLOCK_CELLS, len(cells)))
        labels_M, positions_M, owners_M = masking.validation_genes(block)
        masked.append((labels_M, positions_M, start + owners_M))
    labels_M, positions_M, owners_M = map(np.concatenate, zip(*masked, strict=True))
    training = cells.training_cells(BASELINE_CELLS)
    if len(training) == 0:
        raise DataError(
            f"{cells.store.path}: the baselines are counted on training cells, and it has none. "
            "Remedy: evaluate on the store that the model was trained on."
        )
    alpha, ranks = baselines.fit(training, masking.vocabulary_size, labels_M, positions_M)
    for name, log_p_M in (
        ("unigram_sum", ranks.unigram_V[labels_M]),
        ("gene_given_rank_sum", ranks.log_probabilities(labels_M, positions_M)),
    ):
        table[name] = np.bincount(owners_M, -log_p_M, minlength=len(table))
    return {"training_cells": len(training), "alpha": alpha, "shrinkage": ranks.shrinkage}


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    """Figures of some cells; losses in nats per masked gene.

    loss, cell_mean_loss: mean over genes; over cells of their own means, as in the model card
    top1, top5:           shares of genes among the likeliest 1 and 5
    masked_*:             the same of genes shown as [MASK] alone, as others can be copied
    """
    sums = {name: float(column.sum()) for name, column in table.items()}
    total, num_masked = int(sums["num_predicted"]), int(sums["num_masked"])
    if total == 0:
        return {"num_cells": len(table), "num_predicted": 0}
    loss = sums["loss_sum"] / total
    has = table["num_predicted"] > 0

    def share(column: str) -> float | None:
        return sums[column] / num_masked if num_masked else None

    return {
        "num_cells": len(table),
        "num_predicted": total,
        "loss": loss,
        "cell_mean_loss": float((table["loss_sum"][has] / table["num_predicted"][has]).mean()),
        "perplexity": math.exp(loss) if loss < _MOST_NATS else None,
        "top1": sums["num_top1"] / total,
        "top5": sums["num_top5"] / total,
        "num_masked": num_masked,
        "masked_loss": share("masked_loss_sum"),
        "masked_top1": share("masked_num_top1"),
        "masked_top5": share("masked_num_top5"),
        "unigram": sums["unigram_sum"] / total,
        "gene_given_rank": sums["gene_given_rank_sum"] / total,
    }


def _by(table: pd.DataFrame, labels: pd.Series) -> dict[str, dict[str, Any]]:
    names = labels.astype(object).where(labels.notna(), MISSING).astype(str).to_numpy()
    groups = {str(name): _figures(part) for name, part in table.groupby(names, sort=True)}
    return dict(sorted(groups.items(), key=lambda item: -item[1]["num_cells"]))


def _facts(
    model: Pretrained, cells: StoredCells, request: EvaluateRequest, masking: Masking
) -> dict[str, Any]:
    content = cells.store.manifest.content_hash
    return facts_of(model) | {
        "store": Path(request.store).resolve().name,
        "content_hash": content,
        "trained_on_this_store": content == model.record.identity.content,
        "split": request.split,
        "mask_probability": masking.probability,
        "mask_fractions": list(masking.fractions),
        "seed": masking.seed,
    }


def parse_fractions(text: str) -> list[float]:
    """ "0.8,0.02,0.18" as numbers; their values are checked with the settings."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"`mask_fractions=` are three shares with commas between, such as 0.8,0.02,0.18, and "
            f"are {text}."
        ) from None


def lines(evaluation: Evaluation) -> list[str]:
    """The table that the command prints."""
    facts = evaluation.facts
    shares = ", ".join(f"{share:g}" for share in facts["mask_fractions"])
    found = [
        f"{facts['checkpoint']} on {facts['split']} of {facts['store']}: "
        f"{facts['mask_probability']:.0%} of genes masked ({shares}), seed {facts['seed']}",
        "loss, unigram, rank: nats per masked gene, of the model, of p(gene), of p(gene | rank); "
        "per cell: mean over cells;",
        "[MASK]: of the genes shown as [MASK] alone: one that is shown unchanged can be copied",
        "",
    ]
    shown = {name: list(groups.items())[:MOST_GROUPS] for name, groups in evaluation.by.items()}
    width = max([len("all"), *(len(name) for items in shown.values() for name, _ in items)])
    headings = "".join(f"{heading:>{_width(heading)}}" for heading, *_ in _COLUMNS)
    found += [" " * width + headings, _row("all", evaluation.overall, width)]
    for column, groups in evaluation.by.items():
        found += ["", f"by {column}"]
        found += [_row(name, figures, width) for name, figures in shown[column]]
        if len(groups) > MOST_GROUPS:
            found.append(f"and {len(groups) - MOST_GROUPS} more, in the JSON")
    return found + [f"note: {note}" for note in evaluation.notes]


def save_json(evaluation: Evaluation, path: Path) -> None:
    """Write all figures, with machine, versions and commit. Raises DataError if it cannot."""
    of_groups = {"by": evaluation.by, "notes": evaluation.notes}
    content = {**evaluation.overall, **of_groups, **evaluation.facts, **provenance()}
    write_json(path, content)


def save_plots(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write loss.png, and loss_by_COLUMN.png per column. Raises DataError if it cannot."""
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
    figure = new_figure(8, 1.6 + 0.55 * len(shown))
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
    axes.set_xlabel("loss (nats per masked gene)")
    axes.set_ylabel(f"{column} (cells)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _row(name: str, figures: dict[str, Any], width: int) -> str:
    values = ((heading, figures.get(key), form) for heading, key, form in _COLUMNS)
    return f"{name:<{width}}" + "".join(
        f"{'-' if value is None else format(value, form):>{_width(heading)}}"
        for heading, value, form in values
    )


def _width(heading: str) -> int:
    return max(11, len(heading) + 2)
