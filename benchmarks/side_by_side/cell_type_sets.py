"""Which files a model may be pretrained on to be judged on another, and what came of it.

labelled file x training files  ->  how many cells are the same?  ->  files that hold none  ->  used
run folder, classify's folder   ->  plain JSON
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.errors import DataError
from geneformer_mcore.inference import data_leakage
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.inference.data_leakage import TrainingCells
from geneformer_mcore.metrics.provenance import provenance
from geneformer_mcore.report import results
from geneformer_mcore.tokenizer.corpus import InputOptions
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

SEQ_LENGTH = 512
"""Tokens by which cells are compared: several times what is looked at."""

NVIDIA = {
    "data": "Elmentaite 2020, 22,500 cells, 31 cell types",
    "rows": [
        {"features": "PCA(10)", "macro_f1": 0.561, "accuracy": 0.775},
        {"features": "about 100 steps", "macro_f1": 0.079, "accuracy": 0.399},
        {"features": "10M", "macro_f1": 0.702, "accuracy": 0.839},
        {"features": "106M", "macro_f1": 0.843, "accuracy": 0.905},
    ],
}
"""Of the model card of geneformer-10M/106M-240530: random forest, 5-fold, 115,430 steps of 2,048
cells."""


@dataclass(frozen=True)
class TrainingSet:
    """For one labelled file: the files used, and {file: cells that it shares} of those left out."""

    labelled: Path
    used: tuple[Path, ...]
    shared: dict[Path, int]


def training_sets(
    train: list[Path], labelled: list[Path], vocabulary_path: Path
) -> list[TrainingSet]:
    """One per labelled file. DataError where no file is left to train on."""
    vocabulary = Vocabulary.load(vocabulary_path)
    found = []
    for each in labelled:
        common = {path: _num_common(each, path, vocabulary) for path in train}
        used = tuple(path for path, number in common.items() if not number)
        if not used:
            raise DataError(
                f"{each}: every one of the {len(train)} training files holds cells of it, so none "
                "is left to train on. Remedy: give another file to --train."
            )
        found.append(TrainingSet(each, used, {path: n for path, n in common.items() if n}))
    return found


def _num_common(labelled: Path, train: Path, vocabulary: Vocabulary) -> int:
    options = InputOptions(allow_low_overlap=True, allow_no_overlap=True)
    judged = CountedCells(str(labelled), vocabulary, SEQ_LENGTH, options)
    learned = CountedCells(str(train), vocabulary, SEQ_LENGTH, options)
    has_gene_V = np.zeros(vocabulary.size, bool)
    has_gene_V[judged.genes.token_of_column] = True
    try:
        training = TrainingCells(str(train), learned, 0, len(learned), SEQ_LENGTH)
        return int(data_leakage.find(judged, has_gene_V, training).same_N.sum())
    finally:
        judged.close()
        learned.close()


def lines(sets: list[TrainingSet]) -> list[str]:
    """What is trained on for each labelled file, and what is not."""
    return [
        f"{each.labelled.name}: pretraining on {', '.join(path.name for path in each.used)}"
        + "".join(
            f"; not on {path.name}, which holds {number:,} of its cells"
            for path, number in each.shared.items()
        )
        for each in sets
    ]


def found(each: TrainingSet, run: Path, types: Path) -> dict[str, Any]:
    """What came of one labelled file, as plain JSON without the folds and confusions."""
    classified = json.loads((types / "results.json").read_text())
    for scheme in classified["schemes"]:
        for row in scheme["rows"]:
            row.pop("confusion")
    kept = ("input", "label", "donor", "num_cells", "num_genes", "left_out", "overlap", "models")
    return {
        **{name: classified[name] for name in (*kept, "embedding", "seed", "resamples")},
        "schemes": classified["schemes"],
        "notes": classified["notes"],
        "trained_on": [path.name for path in each.used],
        "not_trained_on": {path.name: number for path, number in each.shared.items()},
        "pretraining": _pretraining(run),
    }


def _pretraining(run: Path) -> dict[str, Any]:
    loaded = results.load(run)
    train, data, model = (loaded.config[name] for name in ("train", "data", "model"))
    return {
        "steps": loaded.step,
        "cells_per_step": train["global_batch_size"],
        "seq_length": data["seq_length"],
        "num_layers": model["num_layers"],
        "hidden_size": model["hidden_size"],
        "val_loss": loaded.validation.last,
        "baselines": loaded.baselines,
        "wall_s": loaded.wall_s,
    }


def content(found: list[dict[str, Any]]) -> dict[str, Any]:
    """All of it, with machine, versions and commit."""
    return {"sets": found, "nvidia": NVIDIA, **provenance()}
