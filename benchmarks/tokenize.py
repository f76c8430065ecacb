#!/usr/bin/env python
"""Rate of turning counts into tokens on one core, compared with other tokenisers.

    python benchmarks/tokenize.py                              made-up cells
    python benchmarks/tokenize.py --medians m.json a.h5ad ...  cells drawn from these

All get the same CSR blocks of raw counts in memory (float32, 512 rows) and give lists of uint16
tokens. Every cell's list is compared with the exact one: stable float64 order, ties by token id.
The other ways are written afresh, after the published ones (harness/peers/tokenisers.py). Rates are
the median of several rounds in which all take turns, in seconds of CPU time: one thread each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # Before numpy and numba are there to see it.
    for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[_threads] = "1"

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.harness import common
from benchmarks.harness.common import SEQ_LENGTH
from benchmarks.harness.loader_cells import Cells, count_block, draw
from benchmarks.harness.peers.tokenisers import BioNeMoTokeniser, HFTokeniser, blocks, exact_tokens
from geneformer_mcore.exit_codes import run
from geneformer_mcore.tokenizer.rank_encoder import RankedCells, RankEncoder

OURS, BY_ROWS, LEAN = "ours", "HF style, a scipy row per cell", "HF style, lean numpy"
STABLE, BIONEMO = "HF style, lean numpy, stable sort", "BioNeMo style, a look-up per gene"
BAR = 7.0

Tokens = list[np.ndarray] | RankedCells
Tokeniser = Callable[[sparse.csr_matrix], Tokens]
"""Each gives tokens in the form that is natural to it."""


def main() -> int:
    """Measure, compare every cell, print the rates; 1 if one of our lists is not exact."""
    arguments = _arguments()
    common.refuse(common.too_small(arguments, cells=1, runs=1), [arguments.json])
    cells, few = draw(arguments.files, arguments.medians, arguments.cells, seed=0)
    rows = measure(cells, few, arguments.runs)
    rate = {row["name"]: row["cells_per_s"] for row in rows}
    goals = [
        common.goal(f"{OURS} / {name}", rate[OURS] / rate[name], BAR) for name in (BY_ROWS, LEAN)
    ]
    for row in rows:
        differ = f"{row['cells_that_differ']:,} cells differ from exact"
        print(f"{row['name']}: {row['cells_per_s']:,.0f} cells/s, {differ}")
    print(*map(common.goal_text, goals), sep="\n")
    content = {
        "rows": rows,
        "goals": goals,
        "cells": len(cells),
        "nonzeros_per_cell": cells.counts.nnz / len(cells),
        "genes": len(cells.gene_ids),
        "data": [path.name for path in arguments.files] or "made up",
        "runs": arguments.runs,
    }
    common.save_results(arguments.json, content)
    return int(rows[0]["cells_that_differ"] > 0)


def tokenisers(cells: Cells) -> dict[str, Tokeniser]:
    """All contestants, ready to work, ours first."""
    vocabulary, token_of_column = cells.vocabulary, cells.token_of_column
    medians, tokens = vocabulary.medians_of_token, vocabulary.token_ids
    encoder = RankEncoder(vocabulary, SEQ_LENGTH)
    hf = HFTokeniser(token_of_column, medians, SEQ_LENGTH)
    stable = HFTokeniser(token_of_column, medians, SEQ_LENGTH, stable=True)
    of_genes = {gene: float(medians[token]) for gene, token in tokens.items()}
    bionemo = BioNeMoTokeniser(cells.gene_ids, tokens, of_genes, SEQ_LENGTH)

    def ours(counts: sparse.csr_matrix) -> RankedCells:
        # Widening the counts, which a reader does otherwise, is part of the time.
        return encoder.encode(count_block(counts), token_of_column)

    ways = (ours, hf.by_rows, hf.lean, stable.lean, bionemo.encode)
    return dict(zip((OURS, BY_ROWS, LEAN, STABLE, BIONEMO), ways, strict=True))


def measure(cells: Cells, few: Cells, runs: int) -> list[dict[str, Any]]:
    """Every contestant's row, from `runs` rounds in which each has one turn."""
    contestants = tokenisers(cells)
    medians, parts = cells.vocabulary.medians_of_token, blocks(cells.counts)
    exact = exact_tokens(cells.counts, cells.token_of_column, medians, SEQ_LENGTH)
    differ = {}
    for name, encode in contestants.items():
        encode(few.counts)
        found = [tokens for part in parts for tokens in _as_list(encode(part))]
        differ[name] = num_different(found, exact)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, encode in contestants.items():
            began = time.process_time()
            for part in parts:
                encode(part)
            seconds[name].append(time.process_time() - began)
    return [
        {
            "name": name,
            "cells_per_s": len(cells) / statistics.median(times),
            "us_per_cell": statistics.median(times) / len(cells) * 1e6,
            "cells_that_differ": differ[name],
            "runs": [len(cells) / each for each in times],
        }
        for name, times in seconds.items()
    ]


def _as_list(tokens: Tokens) -> list[np.ndarray]:
    if isinstance(tokens, RankedCells):
        return np.split(tokens.tokens_T, tokens.offsets[1:-1])
    return tokens


def num_different(found: list[np.ndarray], exact: list[np.ndarray]) -> int:
    return sum(not np.array_equal(*pair) for pair in zip(found, exact, strict=True))


def _arguments() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE.h5ad", help="default: made-up cells")
    add("--cells", type=int, default=8192, help="drawn with replacement (default: 8192)")
    add("--runs", type=int, default=5, help="rounds (default: 5)")
    add("--medians", type=Path, help="{gene id: median} of the vocabulary of these files")
    add("--json", type=Path, metavar="OUT", help="write the rows here too")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
