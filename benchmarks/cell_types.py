#!/usr/bin/env python
"""The card's cell-type benchmark from counts to table: store, pretraining, embeddings, classifiers.

    python benchmarks/cell_types.py --train a.h5ad b.h5ad --labelled x.h5ad y.h5ad --out DIR

For each labelled file a small model is pretrained on those --train files that hold none of its
cells (by their content, whatever their name), on two CPU ranks, and judged by launch/classify.py
next to PCA of the counts and the same model untrained. Labelled files for which the same files are
left share one model. What is done already is not done again: start the same command once more after
a kill. Folders are named by a hash of what they are made of, so another command in the same DIR
(other files, settings, steps, seed) starts from the beginning.

The files of the published figures: --train pbmc3k_raw.h5ad heart_san_1k.h5ad lca_lung_1k.h5ad
marrow_cd34_palantir.h5ad --labelled heart_san_1k.h5ad pbmc3k_labelled.h5ad
--medians gc30m_gene_medians.json --json benchmarks/results/cell_types.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from functools import partial
from typing import Any

from benchmarks.harness import common
from benchmarks.harness.cell_types import NVIDIA, facts, folder_name, result_of, training_sets
from benchmarks.harness.common import ROOT, parser_of, refuse, save_results
from benchmarks.harness.pages import CELL_TYPE_HEAD, cell_type_notes, cell_type_rows, markdown
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import FINISHED, run
from geneformer_mcore.io.files import file_digest

CONFIG = "configs/cell_types.yaml"
step = partial(common.step, OMP_NUM_THREADS="1")
"""Ranks share the cores by themselves; torchrun would remark on it."""


def main() -> int:
    """Pretrain, classify, and print the tables."""
    arguments = _arguments()
    ignore_known_warnings()
    train, labelled = _files(arguments.train), _files(arguments.labelled)
    _files([each for each in (arguments.config, arguments.vocabulary, arguments.medians) if each])
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
    print("", markdown(CELL_TYPE_HEAD, cell_type_rows(content)), sep="\n")
    print("", *cell_type_notes(content), f"{result}: all figures", sep="\n")
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
    """The folder of launch/classify.py."""
    how = [arguments.seed, arguments.resamples]
    return folder_name(f"types_{labelled.stem}", folder.name, facts([labelled]), *how)


def _vocabulary(arguments: argparse.Namespace, out: Path) -> list[str]:
    """Options of build_store.py for the vocabulary: none, unless one is given."""
    if arguments.vocabulary is not None:
        return ["--vocabulary", str(arguments.vocabulary.resolve())]
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
    add("--vocabulary", type=Path, metavar="FILE", help="default: that of the training files")
    add("--medians", type=Path, metavar="FILE", help="Geneformer's gene medians, to make one of")
    add("--seed", type=int, default=0, help="of folds and classifiers")
    add("--resamples", type=int, default=1000, help="draws for the intervals (default: 1000)")
    add("--json", type=Path, metavar="FILE", help="default: DIR/cell_types.json")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
