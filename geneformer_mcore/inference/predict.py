"""Classes of cells by a fine-tuned model.

fine-tuned run + cells -> encoder, classifier, on all ranks -> probabilities [cells, classes]
    -> likeliest class and its probability -> columns of obs in a copy of the h5ad file
    -> beside the labels of a test split   -> CSV, scores as JSON, confusion matrix as PNG
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from geneformer_mcore.config.sections import Precision
from geneformer_mcore.errors import CheckpointError, ConfigError
from geneformer_mcore.inference import embed, encoder, pretrained
from geneformer_mcore.inference.cells import Cells, StoredCells, open_cells
from geneformer_mcore.inference.embed import facts_of
from geneformer_mcore.inference.encoder import CellFunction
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io.anndata_out import Beside
from geneformer_mcore.io.files import whole_file
from geneformer_mcore.io.progress import ProgressLine, no_progress
from geneformer_mcore.metrics import classified
from geneformer_mcore.metrics.provenance import provenance
from geneformer_mcore.model import classifier, forward_only
from geneformer_mcore.report import figures
from geneformer_mcore.store.ingest.labels import as_text
from geneformer_mcore.tokenizer.genes import InputOptions

TEST_FOLDER = "test"
PREDICTIONS, REPORT, PICTURE = "predictions.csv", "report.json", "confusion.png"
"""What a finished run has in that folder of its own."""


@dataclass(frozen=True)
class PredictRequest:
    """Cells that a fine-tuned model is asked about: source, an h5ad file, an Experiment or a token
    store, and the h5ad file that the answer goes to."""

    checkpoint: Path
    source: str
    output: Path
    precision: Precision | None = None
    tokens_per_batch: int = 0
    vocabulary: Path | None = None
    options: InputOptions = field(default_factory=InputOptions)
    layout: Sequence[str] = ()
    overwrite: bool = False


def run(request: PredictRequest, is_first: bool) -> list[str]:
    """Predicts on the ranks that are here; lines that say what was written, on the first rank.

    Raises a GeneformerError for all that the user can mend, the output's place before any work.
    """
    _check(request)
    model = pretrained.find(request.checkpoint, request.vocabulary, request.layout)
    label, classes = classes_of(model)
    started_s = time.monotonic()
    with ExitStack() as stack:
        seq_length = model.config.data.seq_length
        cells = open_cells(request.source, model.vocabulary, seq_length, request.options)
        stack.callback(cells.close)
        precision, tokens = request.precision, request.tokens_per_batch
        found_NC = probabilities(model, cells, is_first, precision, tokens)
        if found_NC is None:
            return []
        beside = _beside(model, found_NC, label, classes)
        if cells.path is not None:
            anndata_out.write_copy(cells.path, request.output, beside)
        else:
            anndata_out.write_new(cells.obs(), request.output, beside)
    has, seconds = ~np.isnan(found_NC).any(axis=1), time.monotonic() - started_s
    told = pd.Series(np.array(classes)[found_NC[has].argmax(axis=1)]).value_counts()
    return [
        *model.messages,
        f"{request.output}: {len(has):,} cells, {int((~has).sum()):,} without a known gene (no "
        f"class), {seconds:.1f} s",
        *(f"  {name}: {count:,}" for name, count in told.items()),
    ]


def _check(request: PredictRequest) -> None:
    if request.output.exists() and Path(request.source).resolve() == request.output.resolve():
        raise ConfigError(
            f"{request.output}: the output must be another file than the input, which is never "
            "changed. Remedy: name another --output."
        )
    embed.check_target(request.output, (".h5ad",), request.overwrite)


def classes_of(model: Pretrained) -> tuple[str, list[str]]:
    """The label that a model was fine-tuned for and its classes, in their order. Raises
    CheckpointError for a model that was not."""
    classes = model.record.identity.task.get("classes", [])
    if not classes:
        raise CheckpointError(
            f"{model.folder} is of a pretrained model, which knows no classes. Remedy: name a run "
            "of launch/finetune.py."
        )
    return model.config.finetune.label, list(classes)


def probabilities(
    model: Pretrained,
    cells: Cells,
    shows_progress: bool,
    precision: Precision | None = None,
    tokens_per_batch: int = 0,
) -> np.ndarray | None:
    """On rank 0 float32 [cells, classes] in the order of the cells, NaN for those without a known
    gene; None on the other ranks."""
    _, classes = classes_of(model)
    ask = partial(forward_only.through, finish=classifier.probabilities)
    with ExitStack() as stack:
        engine = stack.enter_context(
            encoder.started(model, precision, tokens_per_batch, num_classes=len(classes))
        )
        work = CellFunction("predicting", len(classes), encoder.no_masking(engine), ask)
        line = stack.enter_context(ProgressLine("cells")) if shows_progress else None
        progress = line.update if line else no_progress
        return encoder.per_cell(engine, cells, work, np.float32, progress)


def _beside(model: Pretrained, found_NC: np.ndarray, label: str, classes: list[str]) -> Beside:
    likeliest, probability = _likeliest(found_NC)
    name = f"predicted_{label}"
    facts = facts_of(model) | {"label": label, "classes": np.array(classes, dtype=object)}
    return Beside(
        {f"{name}_probabilities": found_NC},
        {
            name: pd.Categorical.from_codes(likeliest, classes),
            f"{name}_probability": probability,
        },
        {f"geneformer_{name}": facts},
    )


def _likeliest(found_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(class of each cell, -1 where it has none; its probability, NaN there)."""
    has = ~np.isnan(found_NC).any(axis=1)
    likeliest = np.where(has, np.nan_to_num(found_NC).argmax(axis=1), -1)
    return likeliest, np.where(has, found_NC.max(axis=1), np.nan)


def test(run_dir: Path, store: str, layout: Sequence[str], is_first: bool) -> list[str]:
    """Predicts the test split of `store` with the newest checkpoint of a fine-tuning run, and
    writes what comes out into the run's folder, from the first rank; lines to be told there."""
    model = pretrained.find(run_dir, Path(store) / "vocabulary.json", layout)
    label, classes = classes_of(model)
    with ExitStack() as stack:
        cells = StoredCells(store, model.vocabulary, model.config.data.seq_length, "test")
        stack.callback(cells.close)
        if len(cells) == 0:
            return [f"{store} has no test cells, so nothing is said of any"]
        found_NC = probabilities(model, cells, is_first)
        if found_NC is None:
            return []
        start, stop = cells.store.rows("test")
        # As training reads them: pandas would make 3.0 of a 3 beside a missing value.
        text_N = as_text(cells.store.labels(label)[label], store, label)[start:stop]
        table = _table(pd.Series(text_N, cells.obs().index), found_NC, classes)
    return _reported(run_dir / TEST_FOLDER, table, label, classes, model)


def _table(labels: pd.Series, found_NC: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """A row per cell: label as it is ("" if none), predicted class, its probability."""
    likeliest, probability = _likeliest(found_NC)
    return pd.DataFrame(
        {
            "label": labels.to_numpy(),
            "predicted": np.array(classes)[likeliest],
            "probability": probability,
        },
        index=labels.index,
    )


def _reported(
    folder: Path, table: pd.DataFrame, label: str, classes: list[str], model: Pretrained
) -> list[str]:
    with whole_file(folder / PREDICTIONS) as partial_file:
        table.to_csv(partial_file, index_label="cell_id")
    judged = table[table["label"].isin(classes)]
    if len(judged) == 0:
        return [f"no test cell has a known value of {label}: nothing is said of any"]
    places = {name: number for number, name in enumerate(classes)}
    counts_CC = np.zeros((len(classes), len(classes)), np.int64)
    pairs = (judged["label"].map(places).to_numpy(), judged["predicted"].map(places).to_numpy())
    np.add.at(counts_CC, pairs, 1)
    report: dict[str, Any] = facts_of(model) | {
        **provenance(),
        "pretrained": model.record.identity.task["pretrained"],
        "finetune": _asked(model),
        "label": label,
        "num_cells": len(judged),
        "left_out": len(table) - len(judged),
        **classified.scores(counts_CC),
        "majority_class": classified.majority(counts_CC),
        "by_class": classified.per_class(counts_CC, tuple(classes)),
    }
    with whole_file(folder / REPORT) as partial_file:
        partial_file.write_text(json.dumps(report, indent=1) + "\n")
    figures.save_confusion(counts_CC, classes, label, folder / PICTURE)
    return _lines(report, folder)


def _asked(model: Pretrained) -> dict[str, Any]:
    """The settings that say how it was fine-tuned, as plain JSON."""
    tune, config = model.config.finetune, model.config
    return {
        "steps": model.record.step,
        "global_batch_size": config.train.global_batch_size,
        "lr": config.optim.lr,
        "frozen_layers": tune.frozen_layers,
        "lora_rank": tune.lora_rank,
        "lora_alpha": tune.lora_alpha,
        "pooling": tune.pooling.value,
    }


def _lines(report: dict[str, Any], folder: Path) -> list[str]:
    majority = report["majority_class"]
    return [
        f"test: {report['num_cells']:,} cells, accuracy {report['accuracy']:.2%}, macro F1 "
        f"{report['macro_f1']:.4f} (the commonest class alone: {majority['accuracy']:.2%}, "
        f"{majority['macro_f1']:.4f})",
        *(
            f"  {name}: F1 {each['f1']:.3f} ({each['cells']:,} cells)"
            for name, each in report["by_class"].items()
        ),
        f"written: {folder}/{{{PREDICTIONS},{REPORT},{PICTURE}}}",
    ]
