"""Damages checkpoints at random places, one at a time: each is seen, and the one before is taken.

    python -m tests.soak.checkpoint_damage [--damages 100]

Each kind of file once: tests/distributed/test_damage.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from geneformer_mcore.checkpoint import folder as checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.test_damage import DAMAGES, assert_passed_over, flip_a_bit, save_twice


def main() -> int:
    """Prints what was damaged; damage that was read over is an AssertionError."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=100)
    damages = parser.parse_args().damages
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "saved", "checkpoints")
        run_ranks(save_twice, 2, str(saved))
        hit = damage(saved, Path(folder, "damaged"), damages)
    print(f"{damages} damages: {dict(hit)}")
    return 0


def damage(saved: Path, root: Path, damages: int) -> Counter[str]:
    """{name of a file: how often it was hit}. Every other damage is a flipped bit."""
    rng = np.random.default_rng(7)
    newest = checkpoints.step_folder(saved, 2)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    hit: Counter[str] = Counter()
    for number in range(damages):
        shutil.copytree(saved, root)
        name = files[rng.integers(len(files))].relative_to(newest)
        kind = DAMAGES[number // 2 % len(DAMAGES)] if number % 2 else flip_a_bit
        assert_passed_over(root, str(name), kind, rng)
        hit[name.name] += 1
        shutil.rmtree(root)
    return hit


if __name__ == "__main__":
    sys.exit(main())
