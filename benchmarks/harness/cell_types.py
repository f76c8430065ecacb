"""Training sets of cell_types.py, names of its folders, and its results as plain JSON.

labelled file x training files  ->  cells in common?  ->  files that hold none of them are used
training files, vocabulary, configuration, settings, steps, ranks  ->  OUT/model_<hash>
that, the labelled file, seed, resamples                           ->  OUT/types_<stem>_<hash>

So another command in the same OUT finds nothing of the old one, and the same one finds all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import DataError
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


def folder_name(start: str, *made_of: object) -> str:
    """`start`_<hash of plain values>: the same for the same ones, in this order."""
    text = json.dumps(made_of, sort_keys=True)
    return f"{start}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def facts(files: Iterable[Path]) -> list[list[object]]:
    """Path, bytes, time of the last change of each file. To hash the content of large files would
    take as long as to read them."""
    found = [(path.resolve(), path.resolve().stat()) for path in files]
    return [[str(path), there.st_size, there.st_mtime_ns] for path, there in found]


def content_hash(path: Path) -> str:
    """Hash of a small file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class TrainingSet:
    """For one labelled file: the files used, and {file: cells that it shares} of those left out."""

    labelled: Path
    used: tuple[Path, ...]
    shared: dict[Path, int]

    def __str__(self) -> str:
        left_out = "".join(
            f"; not on {path.name}, which holds {number:,} of its cells"
            for path, number in self.shared.items()
        )
        used = ", ".join(path.name for path in self.used)
        return f"{self.labelled.name}: pretraining on {used}{left_out}"


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
    import numpy as np

    from geneformer_mcore.inference import data_leakage
    from geneformer_mcore.inference.cells import CountedCells
    from geneformer_mcore.inference.data_leakage import TrainingCells
    from geneformer_mcore.tokenizer.genes import InputOptions

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


def result_of(each: TrainingSet, run: Path, types: Path) -> dict[str, Any]:
    """The results of one labelled file, without the folds and confusions."""
    from geneformer_mcore.report import results

    classified = json.loads((types / "results.json").read_text())
    for scheme in classified["schemes"]:
        for row in scheme["rows"]:
            row.pop("confusion")
    names = (
        *("input", "label", "donor", "num_cells", "num_genes", "left_out", "overlap", "models"),
        *("embedding", "seed", "resamples", "schemes", "notes"),
    )
    loaded = results.load(run)
    train, data, model = (loaded.config[name] for name in ("train", "data", "model"))
    return {
        **{name: classified[name] for name in names},
        "trained_on": [path.name for path in each.used],
        "not_trained_on": {path.name: number for path, number in each.shared.items()},
        "pretraining": {
            "steps": loaded.step,
            "cells_per_step": train["global_batch_size"],
            "seq_length": data["seq_length"],
            "num_layers": model["num_layers"],
            "hidden_size": model["hidden_size"],
            "val_loss": loaded.validation.last,
            "baselines": loaded.baselines,
            "wall_s": loaded.wall_s,
        },
    }
