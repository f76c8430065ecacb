#!/usr/bin/env python
"""Embed cells with a trained model: AnnData in, AnnData with obsm["X_geneformer"] out.

torchrun [--nproc_per_node=N] launch/embed.py --checkpoint RUN --input a.h5ad --output b.h5ad
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.exit_codes import report_on_first_rank, run
from geneformer_mcore.inference import options

if TYPE_CHECKING:
    from geneformer_mcore.inference.embed import EmbedRequest

OPTIONS = {"source": "--input"}
"""Options that are not called as their parameters (see exit_codes.run)."""

EXAMPLE = """examples:
  python launch/embed.py --checkpoint runs/lung --input a.h5ad --output b.h5ad
  torchrun --nproc_per_node=2 launch/embed.py --checkpoint runs/lung --input stores/lung \\
      --output lung.npy --dtype float16 parallel.tensor=2
  python launch/embed.py --checkpoint runs/lung --gene-embeddings genes.csv

The output holds the whole input, obsm["X_geneformer"] (NaN for cells without a known gene, which
obs["geneformer_embedded"] marks) and uns["geneformer"]. Then: sc.pp.neighbors(adata,
use_rep="X_geneformer"). The facts about a .npy are in a .json of the same name.

exit codes (torchrun turns all but 0 into 1): 0 finished   2 wrong input   1 internal error
"""


def main() -> int:
    """Embed, and print on the first rank what was written."""
    arguments = _arguments()
    ignore_known_warnings()
    from geneformer_mcore.inference import embed

    return report_on_first_rank(lambda is_first: embed.run(_request(arguments), is_first))


def _request(arguments: argparse.Namespace) -> EmbedRequest:
    from geneformer_mcore.inference.embed import Choices, EmbedRequest

    return options.build(
        EmbedRequest,
        arguments,
        source=arguments.input or "",
        choices=options.build(Choices, arguments),
        options=options.input_options(arguments),
    )


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, EXAMPLE)
    add = parser.add_argument
    options.add(parser, "--checkpoint")
    add("--input", metavar="CELLS", help="h5ad or zarr of counts, SOMA Experiment or token store")
    add("--output", type=Path, metavar="FILE", help="b.h5ad or b.npy")
    add("--gene-embeddings", type=Path, metavar="FILE", help="genes as .csv, .tsv or .npy")
    add(
        "--layer",
        default="last",
        help="last (default; after the final norm), second-to-last, or N: the residual stream "
        "behind N layers, which is not normalised",
    )
    options.add(parser, "--pooling", "--precision", "--tokens-per-batch")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the result; bfloat16 is kept as float32 that is rounded to it",
    )
    options.add(parser, "--vocabulary", *options.COUNTS, "--overwrite", "layout")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main, **OPTIONS)
