"""How well a trained model predicts hidden genes of cells that it has not seen.

    checkpoint + split of a store -> masks by (seed, cell) -> sums per cell, in the store's order
    training cells of the store   -> unigram, gene given rank -> the same sums for the baselines
    sums per cell + obs           -> totals, and per group of every column asked for -> Evaluation

Masks are a function of seed and cell alone and sums are in fp64, so no layout changes a figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from geneformer_mcore.config.sections import Precision
from geneformer_mcore.downstream import encoder, pretrained
from geneformer_mcore.downstream.cells import StoredCells
from geneformer_mcore.downstream.embed import facts_of
from geneformer_mcore.downstream.encoder import BLOCK_CELLS, Work
from geneformer_mcore.downstream.pretrained import Pretrained
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.feed.masks import Masking
from geneformer_mcore.metrics import baselines
from geneformer_mcore.model import predictions
from geneformer_mcore.store.progress import ProgressLine, no_progress

BASELINE_CELLS = 20_000
"""Training cells that the baselines are counted on, at most: as many as in training."""
USUAL_COLUMNS = ("tissue_general", "assay", "cell_type", "dataset_id")
"""Columns of obs by which losses are broken down unless told otherwise, where a store has them."""
BASELINE_COLUMNS = ("unigram_sum", "gene_given_rank_sum")
MISSING = "(none)"


@dataclass(frozen=True)
class Request:
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


def evaluate(request: Request, is_first: bool) -> Evaluation | None:
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
        work = Work("evaluating", len(predictions.COLUMNS), masking, predictions.of_cells)
        line = stack.enter_context(ProgressLine("cells")) if is_first else None
        progress = line.update if line else no_progress
        sums_NW = encoder.per_cell(engine, cells, work, np.float64, progress)
        if sums_NW is None:
            return None
        table = pd.DataFrame(np.nan_to_num(sums_NW), columns=list(predictions.COLUMNS))
        _refuse_nothing(table, masking, request)
        described = _add_baselines(table, cells, masking)
        facts = _facts(model, cells, request, masking) | {
            "precision": engine.precision.value,
            "baselines": described,
        }
        by = {name: _by(table, cells.obs()[name]) for name in columns}
    return Evaluation(facts, _figures(table), by, _notes(model, cells))


def _columns(cells: StoredCells, request: Request) -> list[str]:
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


def _refuse_nothing(table: pd.DataFrame, masking: Masking, request: Request) -> None:
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
    model: Pretrained, cells: StoredCells, request: Request, masking: Masking
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
