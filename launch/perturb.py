#!/usr/bin/env python
"""Delete or overexpress genes in cells, and measure the displacement of their embeddings.

torchrun [--nproc_per_node=N] launch/perturb.py --checkpoint RUN --input a.h5ad --table b.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.exit_codes import report_on_first_rank, run
from geneformer_mcore.inference import options

if TYPE_CHECKING:
    from geneformer_mcore.perturbation.request import PerturbRequest

OPTIONS = {"moved": "--most-moved", "top=-1": "--all-genes"}
"""Options that are not called as their parameters (see exit_codes.run)."""

EXAMPLE = """examples:
  python launch/perturb.py --checkpoint runs/lung --input a.h5ad --genes GATA4 TBX5 \\
      --max-cells 200 --table shifts.csv
  torchrun --nproc_per_node=2 launch/perturb.py --checkpoint runs/lung --input a.h5ad --top 500 \\
      --start cell_type=fibroblast --goal cell_type=myofibroblast \\
      --table shifts.csv --output shifts.h5ad --plot shifts.png

A row of the table is a gene or group: its mean shift (1 - cosine of the cells' vectors before and
after), p and q against random genes that are as common and stand as high, and, with --goal, whether
the cells moved toward it.

exit codes (torchrun turns all but 0 into 1): 0 finished   2 wrong input   1 internal error
"""


def main() -> int:
    """Perturb, and print on the first rank what was written."""
    arguments = _arguments()
    ignore_known_warnings()
    from geneformer_mcore.perturbation import request

    return report_on_first_rank(lambda is_first: request.run(_request(arguments), is_first))


def _request(arguments: argparse.Namespace) -> PerturbRequest:
    from geneformer_mcore.inference.embed import Choices
    from geneformer_mcore.perturbation.question import ALL_GENES, Question
    from geneformer_mcore.perturbation.request import PerturbRequest

    # The layout may follow the genes, whose names have no "=".
    words = [word for text in arguments.genes for word in text.split(",")]
    question = options.build(
        Question,
        arguments,
        genes=[word for word in words if "=" not in word],
        top=ALL_GENES if arguments.all_genes else arguments.top,
        moved=arguments.most_moved if arguments.gene_effects else 0,
    )
    return options.build(
        PerturbRequest,
        arguments,
        source=arguments.input,
        question=question,
        choices=options.build(Choices, arguments),
        options=options.input_options(arguments),
        layout=[*arguments.layout, *(word for word in words if "=" in word)],
    )


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, EXAMPLE)
    add = parser.add_argument
    options.add(parser, "--checkpoint")
    add("--input", required=True, metavar="CELLS", help="h5ad or zarr of counts, SOMA Experiment")
    _add_question(parser)
    add("--table", type=Path, metavar="FILE", help="a row per gene or group: .csv or .tsv")
    add("--output", type=Path, metavar="FILE", help="cells x genes or groups: .h5ad")
    add("--plot", type=Path, metavar="FILE", help="bars, or p over shift: .png")
    add("--gene-effects", type=Path, metavar="FILE", help="which genes' states move: .csv or .tsv")
    add("--most-moved", type=int, default=50, metavar="N", help="of each in it (default: 50)")
    add("--layer", default="last", help="last (default), second-to-last, or N: behind N layers")
    options.add(parser, "--pooling", "--precision", "--tokens-per-batch", "--vocabulary")
    options.add(parser, *options.COUNTS, "--overwrite", "layout")
    return parser.parse_intermixed_args()


def _add_question(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--genes", nargs="+", default=[], metavar="GENE", help="Ensembl ids or symbols, one by one")
    add(
        "--groups",
        type=Path,
        metavar="FILE",
        help='all genes of a group at once: {"name": ["gene", ...]} as .json, or .gmt',
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--top", type=int, metavar="N", help="the N genes in most cells, one by one")
    some.add_argument("--all-genes", action="store_true", help="every gene in any of the cells")
    add("--mode", choices=("delete", "overexpress"), default="delete", help="default: delete")
    add(
        "--truncated",
        action="store_true",
        help="delete from the truncated cell, as Geneformer's own code does: no gene moves up "
        "(default: rank the cell again without the gene's count)",
    )
    add("--start", "--cells", default="", metavar="COLUMN=VALUE", help="only these cells, by obs")
    add("--goal", default="", metavar="COLUMN=VALUE", help="measure shifts toward these cells")
    add("--max-cells", type=int, default=0, metavar="N", help="at most, at random (default: all)")
    add(
        "--null",
        type=int,
        default=100,
        metavar="N",
        help="random genes to compare each with (default: 100; 0: no p); no p is below 1 / (N + 1)",
    )
    add("--seed", type=int, default=0, help="of the cells and random genes drawn (default: 0)")


if __name__ == "__main__":
    run(main, **OPTIONS)
