#!/usr/bin/env python
"""Estimated steps on 8 to 128 GPUs, projected from measured steps of one H200.

    python benchmarks/scaling.py                                  the demo's cells, or made-up ones
    python benchmarks/scaling.py --cells a.h5ad b.h5ad --json out.json --svg out.svg

No cluster is needed, and nothing printed was measured on one. Measured are steps of one H200
(benchmarks/results/tflops_h200.json), the loader (loader.json), the lengths of the cells and their
packing on simulated ranks. Assumed is the rest: Assumptions in harness/scaling_model.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence

import numpy as np

from benchmarks.harness import scaling_model
from benchmarks.harness.common import RESULTS, ROOT, parser_of, refuse, save_results, too_small
from benchmarks.harness.made_up import MEAN_TOKENS, like_real
from benchmarks.harness.pages import markdown
from benchmarks.harness.scaling_model import GPUS_PER_NODE, NODES, SEQ_LENGTH, Assumptions, Inputs
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.tokenizer.genes import InputOptions

DEMO_STORE = ROOT / "build" / "demo" / "store"


def main() -> int:
    arguments = _arguments()
    refuse(too_small(arguments, steps=1), [arguments.json, arguments.svg])
    ignore_known_warnings()
    lengths, source = corpus(arguments.cells)
    steps, ranks = arguments.steps, [GPUS_PER_NODE * nodes for nodes in NODES]
    inputs = Inputs(
        scaling_model.curves(arguments.results),
        float(lengths.mean()),
        {number: scaling_model.balance(lengths, number, steps) for number in ranks},
        scaling_model.loader_rate(arguments.results, "ours_flat"),
        scaling_model.loader_rate(arguments.results, "ours_store"),
    )
    found = scaling_model.project(inputs, Assumptions())
    found["sources"] = sources(inputs, Assumptions(), len(lengths), source)
    print(markdown(*scaling_model.table(found)), found["sources"], sep="\n\n")
    save_results(arguments.json, found)
    if arguments.svg:
        scaling_model.save_picture(arguments.svg, found)
    return 0


def sources(inputs: Inputs, assumed: Assumptions, num_cells: int, cells: str) -> str:
    """The origin of every number, in a paragraph."""
    worst = max(each.packed for each in inputs.balances.values())
    return (
        "Estimates. Measured: steps of one H200 with AdamW on all parameters "
        f"({scaling_model.H200}); the loader on a CPU, {inputs.flat_cells_s:,.0f} cells/s from a "
        f"flat copy and {inputs.store_cells_s:,.0f} from the SOMA store per process (loader.json); "
        f"{num_cells:,} cells of {inputs.mean_tokens:,.0f} tokens on average, cut at 2,048 "
        f"({cells}), packed by the real code onto simulated ranks, the fullest of which has "
        f"{worst:.4f} x the mean at most. Assumed: packed steps take the time of as many tokens of "
        f"the measured cells; {assumed.nvlink_bytes_s / 1e9:g} GB/s per GPU within a node, "
        f"{assumed.ib_bytes_s / 1e9:g} GB/s between nodes, {assumed.latency_s * 1e6:g} us per hop, "
        f"fp32 gradients; {assumed.overlap:g} x {assumed.backward:g} of the compute can hide the "
        f"all-reduce, {assumed.least_exposed:.0%} of it never; {assumed.sustained:.0%} of the best "
        "speed over a long run; H100 and A100 by the larger ratio of memory bandwidth and FLOPs."
    )


def corpus(files: Sequence[Path]) -> tuple[np.ndarray, str]:
    """(int64 tokens of each cell, their source): the given cells, or the best there are. Raises
    DataError if there is none that can be read."""
    if files:
        lengths = np.concatenate([_of_counts(path) for path in files])
        source = ", ".join(path.name for path in files)
    elif DEMO_STORE.is_dir():
        with TokenStore.open(DEMO_STORE) as store:
            lengths, source = store.lengths(np.arange(len(store))), "the demo's store"
    else:
        lengths, source = like_real(MEAN_TOKENS, SEQ_LENGTH, 8192), "made up"
    if not len(lengths):
        raise DataError(f"{source} holds no cell: name one that does.")
    return np.minimum(lengths, SEQ_LENGTH), source


def _of_counts(path: Path) -> np.ndarray:
    """1 + expressed genes of each cell; an entry may be an explicit zero."""
    with InputOptions(allow_normalised=True).open(path) as counts:
        lengths = [np.empty(0, np.int64)]
        for block in counts.blocks():
            expressed = np.add.reduceat(np.append(block.data > 0, 0), block.indptr[:-1])
            lengths.append(1 + expressed * (np.diff(block.indptr) > 0))
    return np.concatenate(lengths)


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--cells", nargs="+", type=Path, default=[], metavar="FILE.h5ad", help="whose lengths")
    add("--steps", type=int, default=50, help="global batches that are packed (default: 50)")
    add("--results", type=Path, default=RESULTS, help="measurements")
    add("--json", type=Path, metavar="OUT", help="write the numbers here too")
    add("--svg", type=Path, metavar="OUT", help="draw cells/s against GPUs here (.svg, .png)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
