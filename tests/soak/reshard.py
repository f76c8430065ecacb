"""Checkpoints of every layout under every other: all pairs, of which test_reshard.py has some.

    python -m tests.soak.reshard [--most N]

Prints a line per pair of layouts, and ends with 1 if anything was lost between any two.
"""

from __future__ import annotations

import os

# Before torch is imported, also by the process that ranks are forked from: see tests/conftest.py.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path

from geneformer_mcore.backends import ignore_known_warnings

PLAIN = ("tp1 pp1 dp1", "tp2 pp1 dp1", "tp1 pp2 dp1", "tp1 pp1 dp2", "tp2 pp2 dp1", "tp1 pp2 dp2")
PAIRS = [
    *product(PLAIN, PLAIN),
    ("pp2 interleaved", "pp2 interleaved"),
    ("pp2 interleaved", "tp1 pp1 dp1"),
    ("tp1 pp1 dp2", "pp2 interleaved"),
    ("pp2 dp2 overlap", "pp2 dp2 overlap"),
    ("pp2 dp2 overlap", "tp1 pp1 dp1"),
    ("tp2 pp2 dp1", "pp2 dp2 overlap"),
    ("dp2 overlap", "tp2 pp1 dp1"),
    ("packed", "dp4 packed"),
    ("dp4 packed", "tp2 pp2 sequence packed"),
    ("tp2 pp2 sequence packed", "packed"),
    ("packed", "tp1 pp1 dp1"),
]
OF_TWO_LAYERS = [*product(PLAIN, PLAIN)]
OF_BF16 = [("tp1 pp2 dp1", "tp1 pp2 dp1"), ("tp1 pp1 dp2", "tp1 pp1 dp2")]


def main() -> int:
    """The matrix with four layers, with two, and in bf16; the exit code."""
    from tests.distributed.resharding import BF16, GENTLE, TWO_LAYERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, help="the first N pairs of each matrix only")
    most = parser.parse_args().most
    matrices = (
        ("four layers", PAIRS[:most], GENTLE),
        ("two layers", OF_TWO_LAYERS[:most], (*GENTLE, *TWO_LAYERS)),
        ("bf16", OF_BF16[:most], BF16),
    )
    lost = [line for each in matrices for line in matrix(*each)]
    print(f"{sum(len(pairs) for _, pairs, _ in matrices)} pairs, {len(lost)} with losses")
    for line in lost:
        print(line)
    return 1 if lost else 0


def matrix(title: str, pairs: list[tuple[str, str]], settings: tuple[str, ...]) -> list[str]:
    """What was lost, a line per pair that lost anything."""
    from tests.distributed import resharding

    lost = []
    with tempfile.TemporaryDirectory() as folder:
        of_pairs = resharding.lost(Path(folder), pairs, settings, steps=(3, 5))
        for (saver, loader), found in of_pairs:
            line = f"{title}: {saver} -> {loader}: {'; '.join(found) or 'the same'}"
            print(line, flush=True)
            lost += [line] if found else []
    return lost


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ignore_known_warnings()
        sys.exit(main())
