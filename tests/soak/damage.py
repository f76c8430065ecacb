"""Damage a store or checkpoints at random places, one at a time: each is detected or harmless.

    python -m tests.soak.damage store [--times 200]          a flipped bit: seen, or nothing changes
    python -m tests.soak.damage checkpoint [--times 100]     seen, and the one before is taken

One of each kind, at a fixed place: tests/unit/store/test_damage.py and
tests/distributed/training/test_damage.py.
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
from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.layout import list_files
from tests.distributed.ranks import run_ranks
from tests.distributed.training.test_damage import (
    DAMAGES,
    assert_passed_over,
    flip_a_bit,
    save_twice,
)
from tests.unit.store.test_damage import is_seen_flipped, write_some_cells

LEAST_SEEN = 0.9
"""Share of the flips in a store; others fell where nothing is read."""


def main() -> int:
    """Prints what was damaged; damage that was read over is an AssertionError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["store", "checkpoint"])
    parser.add_argument("--times", type=int, default=100)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.what == "store":
            seen = flip_bits_of_a_store(Path(folder), chosen.times)
            print(f"{chosen.times} bits flipped: {dict(seen)}")
            assert seen["seen"] >= LEAST_SEEN * chosen.times
        else:
            print(f"{chosen.times} damages: {dict(damage_checkpoints(Path(folder), chosen.times))}")
    return 0


def flip_bits_of_a_store(folder: Path, flips: int) -> Counter[str]:
    """In turn: any byte of the store, any file of it, so that small ones have their share."""
    sound, copy = folder / "sound", folder / "copy"
    write_some_cells(sound)
    shutil.copytree(sound, copy)
    rng = np.random.default_rng(3)
    files = [copy / "manifest.json", *list_files(copy).values()]
    files = [file for file in files if file.stat().st_size]
    sizes = np.array([file.stat().st_size for file in files], float)
    seen: Counter[str] = Counter()
    for number in range(flips):
        place = rng.choice(len(files), p=sizes / sizes.sum() if number % 2 else None)
        byte, bit = int(rng.integers(sizes[place])), int(rng.integers(8))
        is_seen = is_seen_flipped(copy, sound, files[place], byte, bit)
        seen["seen" if is_seen else "harmless"] += 1
    assert check_store(copy) == []
    return seen


def damage_checkpoints(folder: Path, damages: int) -> Counter[str]:
    """{name of a file: how often it was hit}. Every other damage is a flipped bit."""
    saved, root = folder / "saved" / "checkpoints", folder / "damaged"
    run_ranks(save_twice, 2, str(saved))
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
