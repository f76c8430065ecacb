#!/usr/bin/env python
"""Evaluate a trained model on held-out cells: masked-gene loss, accuracy, and baselines.

torchrun [--nproc_per_node=N] launch/evaluate.py --checkpoint RUN --store STORE [--split test]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.exit_codes import FINISHED, report_error, run
from geneformer_mcore.inference import options

if TYPE_CHECKING:
    from geneformer_mcore.inference.evaluate import Evaluation

OPTIONS = {"columns": "--by"}
"""Options that are not called as their parameters (see exit_codes.run)."""

EXAMPLE = """examples:
  python launch/evaluate.py --checkpoint runs/lung --store stores/lung --json evaluation.json
  torchrun --nproc_per_node=2 launch/evaluate.py --checkpoint runs/lung --store stores/lung \\
      --split validation --by tissue_general,assay --plot plots parallel.tensor=2

Which genes are masked depends on --seed and the cell alone, the model's own seed by default: the
validation split then shows the very genes that validation in training asked for.

exit codes (torchrun turns all but 0 into 1): 0 finished   2 wrong input   1 internal error
"""


def main() -> int:
    """Evaluate, and print the table on the first rank."""
    arguments = _arguments()
    ignore_known_warnings()
    is_first = int(os.environ.get("RANK", "0")) == 0
    try:
        found = _evaluate(arguments, is_first)
        if found is not None:
            _show(arguments, found)
    except GeneformerError as error:
        return report_error(error)
    return FINISHED


def _evaluate(arguments: argparse.Namespace, is_first: bool) -> Evaluation | None:
    from geneformer_mcore.inference import evaluate
    from geneformer_mcore.io.files import check_output

    if arguments.json is not None:
        check_output(arguments.json, overwrite=True)
    if arguments.plot is not None:
        check_output(arguments.plot / "loss.png", overwrite=True)
    fractions, columns = arguments.mask_fractions, arguments.by
    request = options.build(
        evaluate.EvaluateRequest,
        arguments,
        columns=None if columns is None else [c for c in columns.split(",") if c],
        mask_fractions=None if fractions is None else evaluate.parse_fractions(fractions),
        precision=options.precision_of(arguments),
    )
    return evaluate.evaluate(request, is_first)


def _show(arguments: argparse.Namespace, found: Evaluation) -> None:
    from geneformer_mcore.inference import evaluate
    from geneformer_mcore.io.files import together

    print("\n".join(evaluate.lines(found)))
    plots: list[Path] = []
    with together():
        if arguments.json is not None:
            evaluate.save_json(found, arguments.json)
        if arguments.plot is not None:
            plots = evaluate.save_plots(found, arguments.plot)
    for path in plots:
        print(f"plot: {path}")


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, EXAMPLE)
    add = parser.add_argument
    options.add(parser, "--checkpoint")
    add("--store", required=True, help="token store with the model's vocabulary")
    add("--split", choices=("train", "validation", "test"), default="test", help="default: test")
    add("--json", type=Path, metavar="OUT", help="also write all figures here")
    add("--plot", type=Path, metavar="DIR", help="also write bars as PNG into this folder")
    add("--by", metavar="COLUMNS", help="of obs, with commas (default: those of the card)")
    add("--mask-fractions", metavar="M,R,K", help="[MASK], random gene, unchanged (default: own)")
    add("--seed", type=int, help="of the masks (default: the model's)")
    options.add(parser, "--precision", "--tokens-per-batch", "--vocabulary", "layout")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main, **OPTIONS)
