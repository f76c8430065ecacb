#!/usr/bin/env python
"""The card's cell-type benchmark from counts to table: store, pretraining, embeddings, classifiers.

    python benchmarks/cell_types.py --train a.h5ad b.h5ad --labelled x.h5ad y.h5ad --out DIR

For each labelled file a small model is pretrained on those --train files that hold none of its
cells (by their content, whatever they are called), on two CPU ranks, and judged by
launch/classify.py beside PCA of the counts and the same model untrained. Labelled files for which
the same files are left share one model. What is done already is not done again: start the same
command once more after a kill. Folders are named by a hash of what they are made of, so another
command in the same DIR (other files, settings, steps, seed) begins anew.

The files of the published figures: --train pbmc3k_raw.h5ad heart_san_1k.h5ad lca_lung_1k.h5ad
marrow_cd34_palantir.h5ad --labelled heart_san_1k.h5ad pbmc3k_labelled.h5ad
--medians gc30m_gene_medians.json --json benchmarks/results/cell_types.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where tokenize.py hides Python's own: the project.
    sys.path.remove(sys.path[0])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import os
import subprocess
from typing import Any

from benchmarks.side_by_side import cell_type_folders
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import FINISHED, run
from geneformer_mcore.io.files import check_place, whole_file

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/cell_types.yaml"


def main() -> int:
    """Pretrains, classifies, and prints the tables."""
    arguments = _arguments()
    ignore_known_warnings()
    train, labelled = _files(arguments.train), _files(arguments.labelled)
    _files([each for each in (arguments.config, arguments.vocabulary, arguments.medians) if each])
    # Only now what takes seconds to import.
    from benchmarks.side_by_side import cell_type_pages, cell_type_sets

    out: Path = arguments.out
    result: Path = arguments.json or out / "cell_types.json"
    _check_places(out, result)
    options = _vocabulary(arguments, out)
    checked = options or ["--vocabulary", str(_own_vocabulary(train, out))]
    sets = cell_type_sets.training_sets(train, labelled, Path(checked[1]))
    for line in cell_type_sets.lines(sets):
        print(line, flush=True)
    found: list[dict[str, Any]] = []
    for each in sets:
        folder = out / _model(each.used, options, arguments)
        _pretrain(each.used, folder, options, arguments)
        types = out / _types(each.labelled, folder, arguments)
        _classify(each.labelled, folder, types, arguments)
        found.append(cell_type_sets.found(each, folder / "run", types))
    content = cell_type_sets.content(found)
    with whole_file(result) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
    print("", *cell_type_pages.lines(content), f"{result}: all figures", sep="\n")
    return FINISHED


def _files(paths: list[Path]) -> list[Path]:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"no such file: {', '.join(missing)}. Remedy: check the path.")
    return [path.resolve() for path in paths]


def _model(files: tuple[Path, ...], options: list[str], arguments: argparse.Namespace) -> str:
    """The folder of a store and of the run on it."""
    vocabulary = [cell_type_folders.content(Path(path)) for path in options[1:]]
    config = cell_type_folders.content(arguments.config)
    how = [config, arguments.settings, arguments.steps, arguments.ranks]
    return cell_type_folders.name("model", cell_type_folders.facts(files), vocabulary, *how)


def _types(labelled: Path, folder: Path, arguments: argparse.Namespace) -> str:
    """The folder of launch/classify.py."""
    how = [arguments.seed, arguments.resamples]
    facts = cell_type_folders.facts([labelled])
    return cell_type_folders.name(f"types_{labelled.stem}", folder.name, facts, *how)


def _check_places(out: Path, result: Path) -> None:
    check_place(out / "run")
    check_place(result)


def _vocabulary(arguments: argparse.Namespace, out: Path) -> list[str]:
    """What build_store.py is told of the vocabulary: nothing, unless one is given."""
    if arguments.vocabulary is not None:
        return ["--vocabulary", str(arguments.vocabulary.resolve())]
    if arguments.medians is None:
        return []
    made_of = cell_type_folders.facts([arguments.medians])
    path = out / f"{cell_type_folders.name('vocabulary', made_of)}.json"
    if not path.exists():
        step(
            "data_prep/import_dictionary.py",
            *("--medians", arguments.medians.resolve()),
            *("--out", path.resolve()),
        )
    return ["--vocabulary", str(path.resolve())]


def _own_vocabulary(train: list[Path], out: Path) -> Path:
    """Of all files: only for comparing cells. A model's own is of the files it is trained on."""
    name = cell_type_folders.name("genes", cell_type_folders.facts(train))
    path = (out / f"{name}.json").resolve()
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


def step(*command: str | Path) -> None:
    """Runs one of the project's commands. Raises DataError if it fails: it has said why."""
    words = [str(word) for word in command]
    print(f"\n$ python {' '.join(words)}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment)
    if ended.returncode:
        raise DataError(f"{words[0]} ended with {ended.returncode}; what it said stands above.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
