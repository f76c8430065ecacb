#!/usr/bin/env python
"""The card's cell-type benchmark from counts to table: store, pretraining, embeddings, classifiers.

    python benchmarks/cell_types.py --train a.h5ad b.h5ad --labelled x.h5ad y.h5ad --out DIR

For each labelled file a small model is pretrained on those --train files that hold none of its
cells (by their content), on two CPU ranks, and evaluated by launch/classify.py next to PCA of the
counts and the same model untrained. Folders in DIR are named by a hash of what they are made of:
the same command resumes, another one starts from the beginning.

The published figures: --train pbmc3k_raw.h5ad heart_san_1k.h5ad lca_lung_1k.h5ad
marrow_cd34_palantir.h5ad --labelled heart_san_1k.h5ad pbmc3k_labelled.h5ad
--medians gc30m_gene_medians.json --json benchmarks/results/cell_types.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from benchmarks.harness import common
from benchmarks.harness.common import ROOT, parser_of, refuse, save_results
from benchmarks.harness.pages import cell_types_of
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import FINISHED, run
from geneformer_mcore.io.files import checksum_of, file_digest
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
CONFIG = "configs/cell_types.yaml"
step = partial(common.step, OMP_NUM_THREADS="1")
"""Ranks share the cores by themselves; torchrun would remark on it."""


def main() -> int:
    arguments = _arguments()
    ignore_known_warnings()
    train, labelled = _files(arguments.train), _files(arguments.labelled)
    _files([each for each in (arguments.config, arguments.medians) if each])
    out: Path = arguments.out
    result: Path = arguments.json or out / "cell_types.json"
    refuse([], [out / "run", result])
    options = _vocabulary(arguments, out)
    checked = options or ["--vocabulary", str(_own_vocabulary(train, out))]
    sets = training_sets(train, labelled, Path(checked[1]))
    print(*sets, sep="\n", flush=True)
    found: list[dict[str, Any]] = []
    for each in sets:
        folder = out / _model(each.used, options, arguments)
        _pretrain(each.used, folder, options, arguments)
        types = out / _types(each.labelled, folder, arguments)
        _classify(each.labelled, folder, types, arguments)
        found.append(result_of(each, folder / "run", types))
    content = {"sets": found, "nvidia": NVIDIA}
    save_results(result, content)
    print("", cell_types_of(content), f"{result}: all figures", sep="\n")
    return FINISHED


def _files(paths: list[Path]) -> list[Path]:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"no such file: {', '.join(missing)}. Remedy: check the path.")
    return [path.resolve() for path in paths]


def _model(files: tuple[Path, ...], options: list[str], arguments: argparse.Namespace) -> str:
    """The folder of a store and of the run on it."""
    vocabulary = [file_digest(Path(path)) for path in options[1:]]
    how = [file_digest(arguments.config), arguments.settings, arguments.steps, arguments.ranks]
    return folder_name("model", facts(files), vocabulary, *how)


def _types(labelled: Path, folder: Path, arguments: argparse.Namespace) -> str:
    how = [arguments.seed, arguments.resamples]
    return folder_name(f"types_{labelled.stem}", folder.name, facts([labelled]), *how)


def _vocabulary(arguments: argparse.Namespace, out: Path) -> list[str]:
    """Options of build_store.py for the vocabulary: none, unless one is given."""
    if arguments.medians is None:
        return []
    path = (out / f"{folder_name('vocabulary', facts([arguments.medians]))}.json").resolve()
    if not path.exists():
        medians = arguments.medians.resolve()
        step("data_prep/import_dictionary.py", "--medians", medians, "--out", path)
    return ["--vocabulary", str(path)]


def _own_vocabulary(train: list[Path], out: Path) -> Path:
    """Of all files: only for comparing cells. A model's own is of the files it is trained on."""
    path = (out / f"{folder_name('genes', facts(train))}.json").resolve()
    if not path.exists():
        step("data_prep/build_vocabulary.py", "--out", path, *train)
    return path


def _pretrain(
    files: tuple[Path, ...], folder: Path, options: list[str], arguments: argparse.Namespace
) -> None:
    folder = folder.resolve()
    store = folder / "store"
    if not store.exists():
        step("data_prep/build_store.py", "--out", store, *options, *files)
    ranks = [f"--nproc_per_node={arguments.ranks}", "--rdzv-backend=loopback", "--max-restarts=0"]
    settings = [f"data.store={store}", f"run.dir={folder / 'run'}", *arguments.settings]
    if arguments.steps is not None:
        settings.append(f"train.steps={arguments.steps}")
    pretrain = ["launch/pretrain.py", "--config", arguments.config.resolve(), *settings]
    step("-m", "torch.distributed.run", *ranks, *pretrain)


def _classify(labelled: Path, folder: Path, types: Path, arguments: argparse.Namespace) -> None:
    if types.exists():
        return
    step(
        "launch/classify.py",
        *("--checkpoint", f"pretrained={(folder / 'run').resolve()}", "--untrained"),
        *("--input", labelled, "--out", types.resolve()),
        *("--seed", str(arguments.seed), "--resamples", str(arguments.resamples)),
    )


# Training sets, names of folders, results


def folder_name(start: str, *made_of: object) -> str:
    """`start`_<hash of plain values>: the same for the same ones, in this order."""
    return f"{start}_{checksum_of(made_of)[:12]}"


def facts(files: Iterable[Path]) -> list[list[object]]:
    """Path, bytes, time of the last change of each file. To hash the content of large files would
    take as long as to read them."""
    found = [(str(path.resolve()), path.stat()) for path in files]
    return [[name, there.st_size, there.st_mtime_ns] for name, there in found]


class TrainingSet(NamedTuple):
    """For one labelled file: the files used, and {file: cells that it shares} of those left out."""

    labelled: Path
    used: tuple[Path, ...]
    shared: dict[Path, int]

    def __str__(self) -> str:
        parts = [
            f"not on {path.name}, which holds {n:,} of its cells" for path, n in self.shared.items()
        ]
        used = ", ".join(path.name for path in self.used)
        return "; ".join([f"{self.labelled.name}: pretraining on {used}", *parts])


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
    from geneformer_mcore.tokenizer.genes import InputOptions

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
    loaded = results.load(run)
    train, data, model = (loaded.config[name] for name in ("train", "data", "model"))
    return {
        **classified,
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


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--train", type=Path, nargs="+", required=True, metavar="FILE", help="h5ad files of counts")
    add("--labelled", type=Path, nargs="+", required=True, metavar="FILE", help="to be judged on")
    add("--out", type=Path, required=True, metavar="DIR", help="for stores, runs and results")
    add("--steps", type=int, help="of pretraining (default: the configuration's)")
    add("--config", type=Path, default=ROOT / CONFIG, help=f"default: {CONFIG}")
    add("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="of the run")
    add("--ranks", type=int, default=2, help="of torchrun (default: 2)")
    add("--medians", type=Path, metavar="FILE", help="Geneformer's gene medians, to make one of")
    add("--seed", type=int, default=0, help="of folds and classifiers")
    add("--resamples", type=int, default=1000, help="draws for the intervals (default: 1000)")
    add("--json", type=Path, metavar="FILE", help="default: DIR/cell_types.json")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
