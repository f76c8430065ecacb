#!/usr/bin/env python
"""Rate of deleting genes from cells, compared with one forward per variant padded to 2,048 tokens.

    python benchmarks/perturb.py CELLS.h5ad --medians gc30m_gene_medians.json

The job: 100 cells drawn at random and the 200 genes detected in most of them, each deleted from
every cell that has it; the shape of the 10M model, random weights, fp32 on a CPU, one thread. Cell
by cell in turns: ours on some genes through the code of launch/perturb.py; on fewer of the same a
padded forward each, with the logits of all positions, as Geneformer's own code computes them, and
without. Results are compared; times are wall-clock and CPU seconds, next to the operations.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import common
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.exit_codes import run
from geneformer_mcore.model.flops import ModelShape, Workload, forward_flops

if TYPE_CHECKING:
    from benchmarks.harness.padded_variants import Ways

OURS, WHOLE = "packed, original once", "padded, a forward per variant"
STATES = "padded, a forward per variant, without the head"
BAR = 5.0
CLOCKS = {"wall clock": "variants_per_s", "CPU seconds": "variants_per_cpu_s"}
NUM_CELLS, NUM_GENES, SEED = 100, 200, 0


@dataclass
class Side:
    """Per turn: wall-clock and CPU seconds, variants, and the mean tokens of one."""

    name: str
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    variants: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def flops(self, shape: ModelShape, seq_length: int) -> float:
        """Floating-point operations per variant: of ours with a share of the original's forward, of
        the others of a forward of seq_length tokens."""
        if self.name != OURS:
            head = seq_length if self.name == WHOLE else 0
            return float(forward_flops(shape, Workload(seq_length, seq_length**2, head)))
        total = 0
        for length, variants in zip(self.tokens, self.variants, strict=True):
            original = forward_flops(shape, Workload(length + 1, (length + 1) ** 2, 0))
            total += original + variants * forward_flops(shape, Workload(length, length**2, 0))
        return total / sum(self.variants)

    def as_json(self, shape: ModelShape, seq_length: int) -> dict[str, Any]:
        """Every number; rates are over all turns."""
        return asdict(self) | {
            "variants_per_s": sum(self.variants) / sum(self.wall_s),
            "variants_per_cpu_s": sum(self.variants) / sum(self.cpu_s),
            "flops_per_variant": self.flops(shape, seq_length),
        }


def main() -> int:
    """Measure, compare, print and keep the numbers; 1 if they disagree."""
    arguments = _arguments()
    lows = [(f"--{name}", getattr(arguments, name), 1) for name in ("turns", "sample", "padded")]
    problems = common.too_small(*lows)
    if arguments.padded > arguments.sample:
        problems.append("--padded must not exceed --sample: they are some of the same variants.")
    common.refuse(problems, [arguments.json])
    ignore_known_warnings()
    import torch

    from benchmarks.harness.padded_variants import prepared
    from geneformer_mcore.tokenizer.vocabulary import Vocabulary

    vocabulary = Vocabulary.from_medians(json.loads(arguments.medians.read_text()))
    job = (arguments.cells, vocabulary, common.CONFIGS["10m"], NUM_CELLS, NUM_GENES, SEED)
    with prepared(*job) as ways:
        sides, apart = measure(ways, arguments)
        about = {
            "cells": NUM_CELLS,
            "genes": NUM_GENES,
            "variants_of_the_job": ways.job.total,
            "mean_tokens": ways.mean_tokens,
            "mean_tokens_measured": float(np.average(sides[0].tokens, weights=sides[0].variants)),
            "threads": torch.get_num_threads(),
            "sampled": {"cells": arguments.turns, "genes": arguments.sample},
            "largest_difference": apart,
            "data": arguments.cells.name,
        }
        content = in_json(sides, about, ways.shape, ways.config.data.seq_length)
    print(*content["reading"], f"shifts differ by {apart:.1e} at most", sep="\n")
    common.save_results(arguments.json, content)
    return 0 if apart < 1e-5 else 1


def in_json(
    sides: list[Side], about: dict[str, Any], shape: ModelShape, seq_length: int
) -> dict[str, Any]:
    """The measurements, the goals by both clocks, and how to read them."""
    rows = [side.as_json(shape, seq_length) for side in sides]
    goals = [
        common.goal(f"{OURS} / {row['name']}, {clock}", rows[0][rate] / row[rate], BAR)
        for row in rows[1:]
        for clock, rate in CLOCKS.items()
    ]
    ours, *others = (row["flops_per_variant"] for row in rows)
    times = ", ".join(f"{other / ours:.2f} x" for other in others)
    mine, whole = about["mean_tokens_measured"], about["mean_tokens"]
    kind, favours = ("shorter", "ours") if mine < whole else ("longer", "the others")
    reading = [
        *map(common.goal_text, goals),
        f"operations of the measured variants, counted by model/flops.py: {times}",
        f"the measured cells are {kind} than those of the job ({mine:,.0f} against {whole:,.0f} "
        f"tokens per variant), which favours {favours}",
    ]
    return {"rows": rows, "goals": goals, "reading": reading, **about}


def measure(ways: Ways, arguments: argparse.Namespace) -> tuple[list[Side], float]:
    """All sides, ours first, and the largest difference between the shifts that they find."""
    rng = np.random.default_rng(SEED)
    apart, sides = 0.0, [Side(OURS), Side(WHOLE), Side(STATES)]
    for number, cell in enumerate(rng.permutation(len(ways.job.cells))[: arguments.turns + 1]):
        present = np.flatnonzero(ways.has_NP[cell])
        genes = np.sort(rng.choice(present, min(arguments.sample, len(present)), replace=False))
        few = genes[rng.permutation(len(genes))[: arguments.padded]]
        if number == 0:  # Not measured: the first call compiles and reserves.
            genes, few = genes[:4], genes[:1]
        given, tokens = ways.given(int(cell), few), ways.tokens_of(int(cell))
        with _timed(sides[0], len(genes), tokens):
            found = ways.packed(int(cell), genes)
        for side, with_head in zip(sides[1:], (True, False), strict=True):
            with _timed(side, len(few), tokens):
                expected = ways.one_by_one(*given, with_head)
            apart = max(apart, float(np.abs(found[np.searchsorted(genes, few)] - expected).max()))
        if number == 0:
            sides = [Side(side.name) for side in sides]
    return sides, apart


@contextmanager
def _timed(side: Side, variants: int, tokens: int) -> Iterator[None]:
    """Add the time of the block to a side."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    side.wall_s.append(time.perf_counter() - wall_s)
    side.cpu_s.append(time.process_time() - cpu_s)
    side.variants.append(variants)
    side.tokens.append(tokens)


def _arguments() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("cells", type=Path, metavar="CELLS.h5ad")
    add("--medians", type=Path, required=True, help="{gene id: median} of the vocabulary")
    add("--turns", type=int, default=12, metavar="CELLS", help="cells measured (default: 12)")
    add("--sample", type=int, default=24, help="variants of each by ours (default: 24)")
    add("--padded", type=int, default=3, help="of these, padded ones too (default: 3)")
    add("--json", type=Path, metavar="OUT", help="keep the numbers here")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
