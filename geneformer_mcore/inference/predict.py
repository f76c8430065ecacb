"""Prediction of cell classes by a fine-tuned model.

fine-tuned run + cells -> encoder, classifier, on all ranks -> probabilities [cells, classes]
    -> likeliest class and its probability   -> columns of obs in a copy of the h5ad file
    -> compared with labels of a test split  -> CSV, scores as JSON, confusion matrix as PNG
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from geneformer_mcore.checkpoint.record import RECORD
from geneformer_mcore.config.sections import Precision
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.inference import encoder, pretrained
from geneformer_mcore.inference.cells import (
    Cells,
    StoredCells,
    coverage_lines,
    facts_of_cells,
    open_cells,
)
from geneformer_mcore.inference.embed import (
    check_annotated,
    check_target,
    facts_of,
    has_values,
    write_annotated,
)
from geneformer_mcore.inference.encoder import CellFunction
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.anndata_out import Beside, as_key
from geneformer_mcore.io.files import together, whole_file, write_json
from geneformer_mcore.io.schema import as_type
from geneformer_mcore.metrics import classified
from geneformer_mcore.metrics.provenance import provenance
from geneformer_mcore.model import classifier, forward_only
from geneformer_mcore.report import figures
from geneformer_mcore.store.ingest.labels import as_text
from geneformer_mcore.tokenizer.genes import InputOptions

TEST_FOLDER = "test"
PREDICTIONS, REPORT, PICTURE = "predictions.csv", "report.json", "confusion.png"
"""Files of a finished run, in TEST_FOLDER."""


@dataclass(frozen=True)
class PredictRequest:
    """Arguments of launch/finetune.py --predict. source: an h5ad file, an Experiment or a token
    store;  output: an h5ad file."""

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
    """Predict on all ranks and write from the first one. Returns the lines to print there.

    Raises a GeneformerError for the user's mistakes, those in the output path before any work.
    """
    check_target(request.output, (".h5ad",), request.overwrite, request.source)
    model = pretrained.find(request.checkpoint, request.vocabulary, request.layout)
    label, classes = classes_of(model)
    started_s, seq_length = time.monotonic(), model.config.data.seq_length
    opened = open_cells(request.source, model.vocabulary, seq_length, request.options)
    with closing(opened) as cells:
        check_annotated(cells)
        precision, tokens = request.precision, request.tokens_per_batch
        found_NC = probabilities(model, cells, is_first, precision, tokens)
        if found_NC is None:
            return []
        added = _annotations(model, found_NC, label, classes, facts_of_cells(cells))
        write_annotated(request.output, cells, added)
        coverage = coverage_lines(cells)
    has, seconds = has_values(found_NC), time.monotonic() - started_s
    counted = pd.Series(np.array(classes)[found_NC[has].argmax(axis=1)]).value_counts()
    return [
        *model.messages,
        f"{request.output}: {len(has):,} cells, {(~has).sum():,} without a known gene (no "
        f"class), {seconds:.1f} s",
        *coverage,
        *(f"  {name}: {count:,}" for name, count in counted.items()),
    ]


def classes_of(model: Pretrained) -> tuple[str, list[str]]:
    """(label, its classes in order) of a fine-tuned model. Raises CheckpointError for any other."""
    if not model.record.identity.task:
        raise CheckpointError(
            f"{model.folder} is of a pretrained model, which knows no classes. Remedy: name a run "
            "of launch/finetune.py."
        )
    return model.config.finetune.label, _task_of(model).classes


@dataclass(frozen=True)
class _Task:
    """What a fine-tuned model records of its task (see FineTuning.facts)."""

    pretrained: str
    classes: list[str]


def _task_of(model: Pretrained) -> _Task:
    remedy = "name a run of launch/finetune.py of this version"
    place = f"{model.folder / RECORD}, identity.task"
    return as_type(model.record.identity.task, _Task, place, remedy, CheckpointError)


def probabilities(
    model: Pretrained,
    cells: Cells,
    shows_progress: bool,
    precision: Precision | None = None,
    tokens_per_batch: int = 0,
) -> np.ndarray | None:
    """float32 [cells, classes] on rank 0, in the order of the cells, NaN for those without a known
    gene; None on other ranks."""
    num_classes = len(classes_of(model)[1])
    of_batches = partial(forward_only.through, finish=classifier.probabilities)
    with (
        encoder.started(model, precision, tokens_per_batch, num_classes=num_classes) as engine,
        encoder.progress_line("cells", shows_progress) as progress,
    ):
        work = CellFunction("predicting", num_classes, encoder.no_masking(engine), of_batches)
        return encoder.per_cell(engine, cells, work, np.float32, progress)


def _annotations(
    model: Pretrained,
    found_NC: np.ndarray,
    label: str,
    classes: list[str],
    of_cells: Mapping[str, Any],
) -> Beside:
    likeliest, probability = _likeliest(found_NC)
    name = as_key(f"predicted_{label}")
    facts = facts_of(model) | {"label": label, "classes": np.array(classes, dtype=object)}
    facts |= of_cells
    return Beside(
        {f"{name}_probabilities": found_NC},
        {
            name: pd.Categorical.from_codes(likeliest, classes),
            f"{name}_probability": probability,
        },
        {f"geneformer_{name}": facts},
    )


def _likeliest(found_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int64 class of each cell, -1 for none; its probability, NaN for none)."""
    has = has_values(found_NC)
    likeliest = np.where(has, np.nan_to_num(found_NC).argmax(axis=1), -1)
    return likeliest, np.where(has, found_NC.max(axis=1), np.nan)


def test(run_dir: Path, store: str, layout: Sequence[str], is_first: bool) -> list[str]:
    """Predict the test split of `store` with the latest checkpoint of a fine-tuning run, and write
    the results into the run directory, from the first rank. Returns the lines to print there."""
    model = pretrained.find(run_dir, Path(store) / "vocabulary.json", layout)
    label, classes = classes_of(model)
    seq_length = model.config.data.seq_length
    with closing(StoredCells(store, model.vocabulary, seq_length, "test")) as cells:
        if len(cells) == 0:
            return [f"{store} has no test cells, so nothing is said of any"]
        found_NC = probabilities(model, cells, is_first)
        if found_NC is None:
            return []
        start, stop = cells.store.rows("test")
        # As training reads them: pandas turns 3 into 3.0 where another value is missing.
        text_N = as_text(cells.store.labels(label)[label], store, label)[start:stop]
        likeliest, probability = _likeliest(found_NC)
        predicted = np.array(classes)[likeliest]
        columns = {"label": text_N, "predicted": predicted, "probability": probability}
        table = pd.DataFrame(columns, index=cells.obs().index)
    with together():
        return _report(run_dir / TEST_FOLDER, table, label, classes, model)


def _report(
    folder: Path, table: pd.DataFrame, label: str, classes: list[str], model: Pretrained
) -> list[str]:
    """Write predictions, scores and confusion matrix. Returns the lines to print."""
    with whole_file(folder / PREDICTIONS) as partial_path:
        table.to_csv(partial_path, index_label="cell_id")
    judged = table[table["label"].isin(classes)]
    if len(judged) == 0:
        return [f"no test cell has a known value of {label}: nothing is said of any"]
    counts = pd.crosstab(judged["label"], judged["predicted"])
    counts_CC = counts.reindex(index=classes, columns=classes, fill_value=0).to_numpy(np.int64)
    config, tune = model.config, model.config.finetune
    report: dict[str, Any] = facts_of(model) | {
        **provenance(),
        "pretrained": _task_of(model).pretrained,
        "finetune": {
            "steps": model.record.step,
            "global_batch_size": config.train.global_batch_size,
            "lr": config.optim.lr,
            "frozen_layers": tune.frozen_layers,
            "lora_rank": tune.lora_rank,
            "lora_alpha": tune.lora_alpha,
            "pooling": tune.pooling.value,
        },
        "label": label,
        "num_cells": len(judged),
        "left_out": len(table) - len(judged),
        **classified.scores(counts_CC),
        "majority_class": classified.majority(counts_CC),
        "by_class": classified.per_class(counts_CC, tuple(classes)),
    }
    write_json(folder / REPORT, report)
    figures.save_confusion(counts_CC, classes, label, folder / PICTURE)
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
