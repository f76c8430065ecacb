#!/usr/bin/env python
"""Compare how well cell types are predicted from a model's embeddings and from PCA of the counts.

python launch/classify.py --checkpoint RUN --input labelled.h5ad --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore.backends import ignore_known_warnings, require, use_writable_caches
from geneformer_mcore.errors import ConfigError, GeneformerError
from geneformer_mcore.exit_codes import FINISHED, report_error, run
from geneformer_mcore.inference import options

if TYPE_CHECKING:
    from geneformer_mcore.celltypes.classify import ClassifyRequest

OPTIONS = {"checkpoints": "--checkpoint"}
"""Options that are not called as their parameters (see exit_codes.run)."""

EXAMPLE = """examples:
  python launch/classify.py --checkpoint runs/lung --untrained --input blood.h5ad --out blood_types
  python launch/classify.py --checkpoint 10m=runs/10m --checkpoint 106m=runs/106m \\
      --input gut.h5ad --label cell_type --donor donor_id --out gut_types
  python launch/classify.py --obsm X_geneformer --input embedded.h5ad --out types

Every method sees the same cells in the same folds: 5, stratified by label, and one per donor where
obs names two or more. Cells that a model was trained on are found by their content, whatever they
are called, and refused. The folder gets results.json, table.md, predictions.csv, and pictures.

exit codes: 0 finished   2 wrong input   1 internal error
"""


def main() -> int:
    """Classify, write the folder, print the table."""
    arguments = _arguments()
    ignore_known_warnings()
    try:
        _classify(arguments)
    except GeneformerError as error:
        return report_error(error)
    return FINISHED


def _classify(arguments: argparse.Namespace) -> None:
    for name in ("scanpy", "sklearn"):
        require(name)
    use_writable_caches()
    from geneformer_mcore.celltypes import classify, tables
    from geneformer_mcore.io.files import check_free, whole_folder

    request = _request(arguments)
    check_free(arguments.out)
    found = classify.classify(request)
    print("\n".join(tables.lines(found)), flush=True)
    # Figures are last, and the tables are kept, so that an error of a figure loses no result.
    with whole_folder(arguments.out, keeps=True) as partial:
        names = tables.save(found, partial)
        if not arguments.no_plots:
            from geneformer_mcore.celltypes import plots

            names += plots.save(found, partial, request.seed)
    print(f"{arguments.out}: {', '.join(names)}")


def _request(arguments: argparse.Namespace) -> ClassifyRequest:
    from geneformer_mcore.celltypes.classify import ClassifyRequest
    from geneformer_mcore.inference.embed import Choices

    return options.build(
        ClassifyRequest,
        arguments,
        source=arguments.input,
        checkpoints=_named(arguments.checkpoint),
        choices=options.build(Choices, arguments),
        options=options.input_options(arguments),
    )


def _named(given: list[str]) -> dict[str, Path]:
    """{name: folder} of NAME=FOLDER, or of a folder alone, which is named by itself. An existing
    path is a folder even with a `=` in its name."""
    found: dict[str, Path] = {}
    for text in given:
        name, folder = "", text
        if not Path(text).exists():
            name, _, folder = text.partition("=") if "=" in text else ("", "", text)
        name = name or Path(folder).resolve().name
        if name in found:
            raise ConfigError(
                f"two checkpoints are called {name}. Remedy: --checkpoint NAME={folder}."
            )
        found[name] = Path(folder)
    return found


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, EXAMPLE)
    add = parser.add_argument
    add("--input", required=True, metavar="CELLS", help="h5ad or zarr with counts, labels in obs")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    add(
        "--checkpoint",
        action="append",
        default=[],
        metavar="[NAME=]RUN",
        help="a run's folder, or one of its step folders; may be repeated",
    )
    add(
        "--untrained",
        action="store_true",
        help="also a model of the first checkpoint's shape with random weights",
    )
    add(
        "--obsm",
        action="append",
        default=[],
        metavar="NAME",
        help="embeddings that the file holds already; may be repeated",
    )
    add("--label", default="", metavar="COLUMN", help="of obs (default: cell_type or alike)")
    add(
        "--donor",
        default="",
        metavar="COLUMN",
        help="of obs (default: donor_id or alike, if it names two); none: do not leave donors out",
    )
    add("--layer", default="last", help="of the model; see launch/embed.py (default: last)")
    options.add(parser, "--pooling", "--tokens-per-batch")
    add("--seed", type=int, default=0, help="of folds, forests, random weights (default: 0)")
    add(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="draws for the 95 %% intervals (default: 1000; 0: none)",
    )
    add("--training-store", type=Path, help="of the training, where it has moved")
    add("--allow-overlap", action="store_true", help="cells may be those of the training")
    options.add(parser, "--vocabulary", *options.COUNTS)
    add("--no-plots", action="store_true", help="numbers only")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, **OPTIONS)
