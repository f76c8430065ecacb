"""What is told of cells that a model may have been trained on, before it is judged on them.

model, cells  ->  overlap  ->  Seen: what was compared, what was found, what nobody could tell
Seen          ->  facts (JSON)  |  notes  |  a refusal
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.checkpoint.converted import ORIGIN
from geneformer_mcore.downstream import overlap, training_cells
from geneformer_mcore.downstream.cells import CountedCells
from geneformer_mcore.downstream.pretrained import Pretrained
from geneformer_mcore.downstream.training_cells import NoTrainingCellsError
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.progress import Progress

Facts = dict[str, Any]
"""Of one model and the cells: plain JSON.

cells, of: found among the training cells, of those that were looked for
too_short_to_tell: of those that were not found, with too few genes in common with these
training_cells, training_cells_too_short: compared, and with too few genes to be compared
largest_share_of_others: of windows in common, where a cell was not found
pretraining_unknown: the model was fine-tuned, and of these cells alone anything is known
"""


def check(
    source: str,
    models: Mapping[str, Pretrained],
    open_cells: Callable[[Pretrained], CountedCells],
    store: Path | None,
    allow: bool,
    progress: Progress,
) -> tuple[dict[str, Facts | None], list[str]]:
    """({model: Facts, None where there was nothing to compare with}, notes).

    source: what messages call the cells;  open_cells: the cells for a model
    store: taken for those models that were trained on its cells
    Raises DataError for cells that a model was trained on, unless `allow`, and for a `store` that
    is none.
    """
    found: dict[str, Facts | None] = {}
    notes: list[str] = []
    given = training_cells.content_hash(store) if store is not None else ""
    trained = {name: model for name, model in models.items() if model.initial_seed is None}
    if store is not None and given not in _contents(trained):
        notes.append(f"--training-store {store}: none of the models was trained on its cells.")
    for name, model in trained.items():
        notes += _origin(name, model)
        try:
            seen, where = _compare(model, open_cells, store, progress)
        except NoTrainingCellsError as error:
            found[name] = None
            notes.append(
                f"whether {name} was trained on these cells could not be checked: {error}. If it "
                "was, its figures flatter it. Remedy: --training-store STORE."
            )
            continue
        if seen["cells"] and not allow:
            raise DataError(_refusal(source, name, seen, where))
        found[name] = seen
        notes += _notes(name, seen)
    return found, notes


def _contents(models: Mapping[str, Pretrained]) -> set[str]:
    return {model.record.identity.content for model in models.values()}


def _origin(name: str, model: Pretrained) -> list[str]:
    """Of what came before the run."""
    notes = []
    task = model.record.identity.task
    if task:
        pretrained = task.get("pretrained")
        began = f" it began with ({pretrained})" if pretrained else ""
        notes.append(
            f"{name} was fine-tuned, and only the cells of that were looked at: whether the "
            f"pretraining{began} has seen these cells was not checked. If it has, its figures "
            "flatter it. Remedy: judge the pretrained checkpoint, too."
        )
    if not model.record.is_converted and (model.folder.parent.parent / ORIGIN).is_file():
        notes.append(f"{name} began with converted weights: who knows which cells made them.")
    return notes


def _compare(
    model: Pretrained,
    open_cells: Callable[[Pretrained], CountedCells],
    store: Path | None,
    progress: Progress,
) -> tuple[Facts, str]:
    """(what was found, where the training cells are)."""
    with ExitStack() as stack:
        training = stack.enter_context(training_cells.training_cells(model, store))
        cells = open_cells(model)
        stack.callback(cells.close)
        has_gene_V = np.zeros(model.vocabulary.size, bool)
        has_gene_V[cells.genes.token_of_column] = True
        seen = overlap.find(cells, has_gene_V, training, progress)
    return {
        "cells": int(seen.same_N.sum()),
        "of": len(seen.same_N),
        "too_short_to_tell": int(seen.too_short_N.sum()),
        "training_cells": seen.num_training,
        "training_cells_too_short": seen.num_training_too_short,
        "largest_share_of_others": float(seen.share_N[~seen.same_N].max(initial=0.0)),
        "pretraining_unknown": bool(model.record.identity.task),
    }, training.name


def summary(seen: Facts) -> str:
    """For the line of a model: how many cells it was trained on, as far as that could be told."""
    short, which = seen["too_short_to_tell"], "trained on"
    if seen["pretraining_unknown"]:
        which = "fine-tuned on, its pretraining not checked"
    told = seen["of"] - short
    if not told:
        return f"no cell has genes enough to tell whether it was {which}"
    unknown = f", {short:,} with too few genes to tell" if short else ""
    return f"{seen['cells']:,} of {told:,} cells {which}{unknown}"


def _notes(name: str, seen: Facts) -> list[str]:
    notes = []
    if seen["cells"]:
        notes.append(f"{_told(name, seen)}: its figures flatter it (--allow-overlap).")
    if seen["too_short_to_tell"]:
        notes.append(
            f"{seen['too_short_to_tell']:,} of {seen['of']:,} cells have too few genes in common "
            f"with the training cells of {name} to tell whether they are among them."
        )
    if seen["training_cells_too_short"]:
        notes.append(
            f"{seen['training_cells_too_short']:,} training cells of {name} have too few genes in "
            "common with these cells to be compared with them."
        )
    return notes


def _told(name: str, seen: Facts) -> str:
    tuned = "fine-tuned" if seen["pretraining_unknown"] else "trained"
    return (
        f"{seen['cells']:,} of {seen['of']:,} cells are among the {seen['training_cells']:,} that "
        f"{name} was {tuned} on"
    )


def _refusal(source: str, name: str, seen: Facts, where: str) -> str:
    return (
        f"{source}: {_told(name, seen)} ({where}), by the order of their genes, whatever they are "
        "called: a model must be judged on cells that it has not seen. Remedy: give other cells, "
        "or a model that was trained without them; --allow-overlap judges it all the same."
    )
