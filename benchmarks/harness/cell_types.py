"""Training sets of cell_types.py, names of its folders, and its results as plain JSON.

labelled file x training files  ->  cells in common?  ->  files that hold none of them are used
training files, vocabulary, configuration, settings, steps, ranks  ->  OUT/model_<hash>
that, the labelled file, seed, resamples                           ->  OUT/types_<stem>_<hash>

So another command in the same OUT finds nothing of the old one, and the same one finds all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import checksum_of
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

SEQ_LENGTH = 512
"""Tokens by which cells are compared: several times what is looked at."""

CARD = [("PCA(10)", 0.561, 0.775), ("about 100 steps", 0.079, 0.399)]
CARD += [("10M", 0.702, 0.839), ("106M", 0.843, 0.905)]
NVIDIA = {
    "data": "Elmentaite 2020, 22,500 cells, 31 cell types",
    "rows": [dict(zip(("features", "macro_f1", "accuracy"), row, strict=True)) for row in CARD],
}
"""Of the model card of geneformer-10M/106M-240530: random forest, 5-fold, 115,430 steps of 2,048
cells."""


def folder_name(start: str, *made_of: object) -> str:
    """`start`_<hash of plain values>: the same for the same ones, in this order."""
    return f"{start}_{checksum_of(made_of)[:12]}"


def facts(files: Iterable[Path]) -> list[list[object]]:
    """Path, bytes, time of the last change of each file. To hash the content of large files would
    take as long as to read them."""
    found = [(str(path.resolve()), path.stat()) for path in files]
    return [[name, there.st_size, there.st_mtime_ns] for name, there in found]


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
    from geneformer_mcore.tokenizer.corpus import InputOptions

    options = InputOptions(allow_low_overlap=True, allow_no_overlap=True)
    given = (vocabulary, SEQ_LENGTH, options)
    with (
        closing(CountedCells(str(labelled), *given)) as judged,
        closing(CountedCells(str(train), *given)) as learned,
    ):
        has_gene_V = np.zeros(vocabulary.size, bool)
        has_gene_V[judged.genes.token_of_column] = True
        cells = (str(train), learned, 0, len(learned), SEQ_LENGTH)
        training = data_leakage.TrainingCells(*cells)
        return int(data_leakage.find(judged, has_gene_V, training).same_N.sum())


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
