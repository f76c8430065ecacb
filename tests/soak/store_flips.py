"""Flips bits of a store at random places, one at a time: each is seen, or changes nothing.

    python -m tests.soak.store_flips [--flips 200]

One of each kind of file, at a fixed place: tests/unit/test_store_damage.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.layout import list_files
from tests.unit.test_store_damage import is_seen_flipped, write_some_cells

LEAST_SEEN = 0.9
"""Share of the flips; others fell where nothing is read."""


def main() -> int:
    """Prints how many were seen; a flip that was read over is an AssertionError."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=200)
    flips = parser.parse_args().flips
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder, "sound")
        write_some_cells(sound)
        copy = Path(shutil.copytree(sound, Path(folder, "copy")))
        seen = flip(copy, sound, flips)
        assert check_store(copy) == []
    print(f"{flips} bits flipped: {dict(seen)}")
    assert seen["seen"] >= LEAST_SEEN * flips
    return 0


def flip(copy: Path, sound: Path, flips: int) -> Counter[str]:
    """In turn: any byte of the store, any file of it, so that small ones have their share."""
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
    return seen


if __name__ == "__main__":
    sys.exit(main())
