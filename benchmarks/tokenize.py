#!/usr/bin/env python
"""How fast counts become tokens on one core, beside the ways of other tokenisers.

    python benchmarks/tokenize.py                              made-up cells
    python benchmarks/tokenize.py --medians m.json a.h5ad ...  cells drawn from these

All get the same CSR blocks of raw counts in memory (float32, 512 rows) and give lists of uint16
tokens. Every cell's list is compared with the exact one: stable float64 order, ties by token id.
The other ways are written afresh, after the published ones, in benchmarks/peers. Rates are the
median of several rounds in which all take turns, in seconds of CPU time: one thread each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where this very file hides Python's own `tokenize`: the project.
    sys.path.remove(sys.path[0])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    # Before numpy and numba are there to see it.
    for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[_threads] = "1"

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import sparse

from benchmarks.peers.bionemo_tokeniser import BioNeMoTokeniser
from benchmarks.peers.exact_tokens import exact_tokens
from benchmarks.peers.hf_tokeniser import HFTokeniser, blocks
from benchmarks.side_by_side.cells import Cells, draw
from benchmarks.side_by_side.goals import Goal, ratio
from benchmarks.side_by_side.picture import save_bars, text_table
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.files import check_output, write_json
from geneformer_mcore.tokenizer.rank_encoder import RankedCells, RankEncoder

SEQ_LENGTH = 2048
OURS, BY_ROWS, LEAN = "ours", "HF style, a scipy row per cell", "HF style, lean numpy"
STABLE, BIONEMO = "HF style, lean numpy, stable sort", "BioNeMo style, a look-up per gene"
BAR = 7.0

Tokens = list[np.ndarray] | RankedCells
Tokeniser = Callable[[sparse.csr_matrix], Tokens]
"""Each gives tokens in the form that is natural to it."""


@dataclass(frozen=True)
class Row:
    """One tokeniser: its median rate, and in how many cells its list is not the exact one."""

    name: str
    cells_per_s: float
    us_per_cell: float
    cells_that_differ: int
    runs: list[float]


def main() -> int:
    """Measures, compares every cell, prints the table; 1 if one of our lists is not exact."""
    arguments = _arguments()
    check(arguments)
    cells, few = draw(arguments.files, arguments.medians, arguments.cells, seed=0)
    rows = measure(cells, few, arguments.runs)
    goals = goals_of(rows)
    print(table(rows))
    print(f"\n{about(cells, arguments.runs)}\n")
    print("\n".join(map(str, goals)))
    _save(arguments, cells, rows, goals)
    ours = next(row for row in rows if row.name == OURS)
    return 1 if ours.cells_that_differ else 0


def tokenisers(cells: Cells) -> dict[str, Tokeniser]:
    """All contestants, ready to work."""
    vocabulary, token_of_column = cells.vocabulary, cells.token_of_column
    medians = vocabulary.medians_of_token
    encoder = RankEncoder(vocabulary, SEQ_LENGTH)
    hf = HFTokeniser(token_of_column, medians, SEQ_LENGTH)
    stable = HFTokeniser(token_of_column, medians, SEQ_LENGTH, stable=True)
    bionemo = BioNeMoTokeniser(
        cells.gene_ids,
        vocabulary.token_ids,
        {gene: float(medians[token]) for gene, token in vocabulary.token_ids.items()},
        SEQ_LENGTH,
    )

    def ours(counts: sparse.csr_matrix) -> RankedCells:
        # Widening the counts, which a reader does otherwise, is part of the time.
        block = CountBlock(
            counts.data.astype(np.float64),
            counts.indices.astype(np.int32, copy=False),
            counts.indptr.astype(np.int64),
        )
        return encoder.encode(block, token_of_column)

    return {
        OURS: ours,
        BY_ROWS: hf.by_rows,
        LEAN: hf.lean,
        STABLE: stable.lean,
        BIONEMO: bionemo.encode,
    }


def measure(cells: Cells, few: Cells, runs: int) -> list[Row]:
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
        Row(
            name,
            len(cells) / statistics.median(times),
            statistics.median(times) / len(cells) * 1e6,
            differ[name],
            [len(cells) / time for time in times],
        )
        for name, times in seconds.items()
    ]


def _as_list(tokens: Tokens) -> list[np.ndarray]:
    if isinstance(tokens, RankedCells):
        return np.split(tokens.tokens_T, tokens.offsets[1:-1])
    return tokens


def num_different(found: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> int:
    """Cells whose lists are not equal."""
    pairs = zip(found, exact, strict=True)
    return sum(not np.array_equal(one, other) for one, other in pairs)


def goals_of(rows: Sequence[Row]) -> list[Goal]:
    """Our rate over that of each HF-style tokeniser."""
    rate = {row.name: row.cells_per_s for row in rows}
    return [
        Goal(f"{OURS} / {name}", ratio(rate[OURS], rate[name]), BAR) for name in (BY_ROWS, LEAN)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    ours = next(row.cells_per_s for row in rows if row.name == OURS)
    return text_table(
        ["tokeniser, one core", "cells/s", "us/cell", "ours is", "cells that differ from exact"],
        [
            [
                row.name,
                f"{row.cells_per_s:,.0f}",
                f"{row.us_per_cell:.1f}",
                f"{ours / row.cells_per_s:.2f} x",
                f"{row.cells_that_differ:,}",
            ]
            for row in rows
        ],
    )


def about(cells: Cells, runs: int) -> str:
    """What the numbers are of."""
    return (
        f"{len(cells):,} cells x {len(cells.gene_ids):,} genes, "
        f"{cells.counts.nnz / len(cells):,.0f} non-zeros per cell, vocabulary "
        f"{cells.vocabulary.size:,}; median of {runs} rounds in turn, CPU seconds of one thread."
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError that names every argument by which nothing can be measured."""
    lows = (("--cells", arguments.cells, 1), ("--runs", arguments.runs, 1))
    problems = [f"{name} must be at least {low}, and is {n}." for name, n, low in lows if n < low]
    if problems:
        raise ConfigError("\n".join(problems))
    for path in (arguments.json, arguments.png):
        if path:
            check_output(path, overwrite=True)


def _save(arguments: argparse.Namespace, cells: Cells, rows: list[Row], goals: list[Goal]) -> None:
    from geneformer_mcore.metrics.provenance import provenance

    where = provenance()
    if arguments.json:
        content = {
            "rows": [asdict(row) for row in rows],
            "goals": [goal.as_json() for goal in goals],
            "cells": len(cells),
            "nonzeros_per_cell": cells.counts.nnz / len(cells),
            "genes": len(cells.gene_ids),
            "data": [path.name for path in arguments.files] or "made up",
            "runs": arguments.runs,
        }
        write_json(arguments.json, content | where)
    if arguments.png:
        bars = [(row.name, row.cells_per_s, row.name == OURS) for row in rows]
        footer = f"{where['machine']}; {len(cells):,} cells"
        save_bars(arguments.png, {"Tokenising, one core": bars}, "cells/s", footer)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE.h5ad", help="default: made-up cells")
    add("--cells", type=int, default=8192, help="drawn with replacement (default: 8192)")
    add("--runs", type=int, default=5, help="rounds (default: 5)")
    add("--medians", type=Path, help="{gene id: median} of the vocabulary; default: the cells'")
    add("--json", type=Path, metavar="OUT", help="write the rows here too")
    add("--png", type=Path, metavar="OUT", help="draw the rates here")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
