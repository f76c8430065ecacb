#!/usr/bin/env python
"""How fast genes are deleted from cells, beside one forward per variant padded to 2,048 tokens.

    python benchmarks/perturb.py CELLS.h5ad --medians gc30m_gene_medians.json

The job: 100 cells drawn at random and the 200 genes that are detected in most of them, each deleted
from every cell that has it; the shape of the 10M model, random weights, fp32 on a CPU. All ways
work on random variants of that job, in turns, cell by cell: ours on some genes of a cell, through
the very code of launch/perturb.py (read, rank anew, embed the original once, pack, compare); the
others on fewer of the same, a padded forward of the same weights each, with its tokens and its
original given: once with the logits of all positions, as a masked language model's forward gives
them and Geneformer's own code computes them, once up to the states alone. What all find is
compared. One thread each, in wall-clock and in CPU seconds, and by the operations of either way
(model/flops.py), which no busy machine disturbs.
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
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.side_by_side.goals import Goal, ratio
from benchmarks.side_by_side.picture import text_table
from benchmarks.side_by_side.sizes import CONFIGS
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io.files import check_output, write_json
from geneformer_mcore.model.flops import ModelShape, Workload, forward_flops

if TYPE_CHECKING:
    from benchmarks.side_by_side.padded_variants import Padded
    from geneformer_mcore.perturb.displacements import Job

OURS, WHOLE = "packed, original once", "padded, a forward per variant"
STATES = "padded, a forward per variant, without the head"
BAR = 5.0
CLOCKS = {"wall clock": "wall_s", "CPU seconds": "cpu_s"}
NUM_CELLS, NUM_GENES, SEED = 100, 200, 0


@dataclass
class Side:
    """Per turn: wall-clock and CPU seconds, variants, and the mean tokens of one."""

    name: str
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    variants: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def rate(self, seconds: list[float]) -> float:
        """Variants per second over all turns."""
        return sum(self.variants) / sum(seconds)

    def flops(self, shape: ModelShape, seq_length: int) -> float:
        """Floating-point operations per variant: of ours with a share of the original's forward, of
        the others of a forward of seq_length tokens, as this way of them is."""
        head = seq_length if self.name == WHOLE else 0
        padded = forward_flops(shape, Workload(seq_length, seq_length**2, head))
        if self.name != OURS:
            return float(padded)
        found = 0
        for length, variants in zip(self.tokens, self.variants, strict=True):
            original = forward_flops(shape, Workload(length + 1, (length + 1) ** 2, 0))
            found += original + variants * forward_flops(shape, Workload(length, length**2, 0))
        return found / sum(self.variants)

    def as_json(self, shape: ModelShape, seq_length: int) -> dict[str, Any]:
        """Every number."""
        rates = {
            "variants_per_s": self.rate(self.wall_s),
            "variants_per_cpu_s": self.rate(self.cpu_s),
        }
        rates["flops_per_variant"] = self.flops(shape, seq_length)
        turns: dict[str, Any] = {"wall_s": self.wall_s, "cpu_s": self.cpu_s}
        turns |= {"variants": self.variants, "tokens": self.tokens}
        return {"name": self.name, **rates, **turns}


def main() -> int:
    """Measures, compares, prints and keeps the numbers; 1 if they disagree."""
    arguments = _arguments()
    check(arguments)
    ignore_known_warnings()
    from benchmarks.side_by_side import padded_variants
    from geneformer_mcore.metrics.provenance import provenance

    with padded_variants.prepared(
        arguments.cells, _vocabulary(arguments.medians), CONFIGS["10m"], NUM_CELLS, NUM_GENES, SEED
    ) as (job, padded):
        sides, apart = measure(job, padded, arguments)
        about = {
            "cells": NUM_CELLS,
            "genes": NUM_GENES,
            "variants_of_the_job": job.total,
            "mean_tokens": padded.mean_tokens,
            "mean_tokens_measured": float(np.average(sides[0].tokens, weights=sides[0].variants)),
            "threads": padded.threads,
        }
        shape, seq_length = padded_variants.size(job)
    measured = in_json(sides, about, shape, seq_length)
    print(table(sides))
    print(f"\n{_about(about, arguments, apart)}\n")
    print("\n".join(measured["reading"]))
    if arguments.json:
        content = {
            **measured,
            "sampled": {"cells": arguments.turns, "genes": arguments.sample},
            "largest_difference": apart,
            "data": arguments.cells.name,
        }
        write_json(arguments.json, content | provenance())
    return 0 if apart < 1e-5 else 1


def in_json(
    sides: list[Side], about: dict[str, Any], shape: ModelShape, seq_length: int
) -> dict[str, Any]:
    """What was measured, the goals by both clocks, and how they are to be read."""
    rows = [side.as_json(shape, seq_length) for side in sides]
    goals = [
        Goal(f"{OURS} / {side.name}, {clock}",
             ratio(sides[0].rate(getattr(sides[0], times)), side.rate(getattr(side, times))), BAR)
        for side in sides[1:]
        for clock, times in CLOCKS.items()
    ]  # fmt: skip
    reading = [*map(str, goals), _operations(rows), _lengths(about)]
    goals_json = [goal.as_json() for goal in goals]
    return {"rows": rows, "goals": goals_json, "reading": reading, **about}


def _operations(rows: list[dict[str, Any]]) -> str:
    ours, *others = (row["flops_per_variant"] for row in rows)
    times = ", ".join(f"{other / ours:.2f} x" for other in others)
    return f"operations of the measured variants, counted by model/flops.py: {times}"


def _lengths(about: dict[str, Any]) -> str:
    mine, whole = about["mean_tokens_measured"], about["mean_tokens"]
    kind, favours = ("shorter", "ours") if mine < whole else ("longer", "the others")
    return (
        f"the measured cells are {kind} than those of the job ({mine:,.0f} against {whole:,.0f} "
        f"tokens per variant), which favours {favours}"
    )


def measure(job: Job, padded: Padded, arguments: argparse.Namespace) -> tuple[list[Side], float]:
    """All sides, ours first, and the largest difference between the shifts that they find."""
    rng = np.random.default_rng(SEED)
    apart, sides = 0.0, [Side(OURS), Side(WHOLE), Side(STATES)]
    for number, cell in enumerate(rng.permutation(len(job.cells))[: arguments.turns + 1]):
        present = padded.present(int(cell))
        genes = np.sort(rng.choice(present, min(arguments.sample, len(present)), replace=False))
        few = genes[rng.permutation(len(genes))[: arguments.padded]]
        if number == 0:  # Not measured: the first call compiles and reserves.
            genes, few = genes[:4], genes[:1]
        given, tokens = padded.given(int(cell), few), padded.tokens_of(int(cell))
        with _timed(sides[0], len(genes), tokens):
            found = padded.packed(job, int(cell), genes)
        for side, with_head in zip(sides[1:], (True, False), strict=True):
            with _timed(side, len(few), tokens):
                expected = padded.one_by_one(given, with_head)
            apart = max(apart, float(np.abs(found[np.searchsorted(genes, few)] - expected).max()))
        if number == 0:
            sides = [Side(side.name) for side in sides]
        else:
            print(f"cell {number} of {arguments.turns}", file=sys.stderr, flush=True)
    return sides, apart


class _timed:
    """Adds the time of what is done inside to a side."""

    def __init__(self, side: Side, variants: int, tokens: int) -> None:
        self._side, self._variants, self._tokens = side, variants, tokens

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        self._side.wall_s.append(time.perf_counter() - self._began[0])
        self._side.cpu_s.append(time.process_time() - self._began[1])
        self._side.variants.append(self._variants)
        self._side.tokens.append(self._tokens)


def table(sides: list[Side]) -> str:
    """The sides as text."""
    return text_table(
        ["way", "variants", "variants/s", "variants per CPU second"],
        [
            [
                side.name,
                f"{sum(side.variants):,}",
                f"{side.rate(side.wall_s):.2f}",
                f"{side.rate(side.cpu_s):.2f}",
            ]
            for side in sides
        ],
    )


def _about(about: dict[str, Any], arguments: argparse.Namespace, apart: float) -> str:
    return (
        f"{about['cells']} cells x {about['genes']} genes: {about['variants_of_the_job']:,} "
        f"variants of {about['mean_tokens']:,.0f} tokens, of which {arguments.sample} at most "
        f"of each of {arguments.turns} cells ({about['mean_tokens_measured']:,.0f} tokens) were "
        f"measured, and {arguments.padded} of these padded; "
        f"{about['threads']} thread. Shifts differ by {apart:.1e} at most."
    )


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError that names every argument by which nothing can be measured."""
    lows = [(f"--{name}", getattr(arguments, name)) for name in ("turns", "sample", "padded")]
    problems = [f"{name} must be at least 1, and is {n}." for name, n in lows if n < 1]
    if arguments.padded > arguments.sample:
        problems.append("--padded must not exceed --sample: they are some of the same variants.")
    if problems:
        raise ConfigError("\n".join(problems))
    if arguments.json:
        check_output(arguments.json, overwrite=True)


def _vocabulary(path: Path) -> Any:
    from geneformer_mcore.tokenizer.vocabulary import Vocabulary

    return Vocabulary.from_medians(json.loads(path.read_text()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
