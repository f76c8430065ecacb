"""Kills build_store.py at random instants, again and again: the store is that of a whole build.

    python -m tests.soak.ingest_kills [--kills 50]

A kill at each stage, at an exact instant: tests/end_to_end/commands/test_ingest.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from tests.end_to_end.commands.test_ingest import assert_clears, sound, start, write_inputs

EVENTS = ("unit", "store", "manifest", "published")
"""What is waited for before a kill: a few more units, or a step of the merge and of publishing."""
ENOUGH = 10
"""Kills of which three in ten must fall inside a build's work."""


def main() -> int:
    """Ends with 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        inputs, clean, disturbed = (Path(folder, name) for name in ("inputs", "clean", "disturbed"))
        for made in (inputs, clean, disturbed):
            made.mkdir()
        write_inputs(inputs, 2000, 2500)
        expected = finished(start(inputs, clean), clean)
        fell = killed(inputs, disturbed, kills, expected)
        assert finished(start(inputs, disturbed), disturbed) == expected
    print(f"{kills} kills, by stage: {dict(fell)}")
    inside = sum(fell[where] for where in ("units", "merge", "publish"))
    assert inside >= 0.3 * kills or kills < ENOUGH, "too few kills fell into a build's work"
    return 0


def killed(inputs: Path, folder: Path, kills: int, expected: str) -> Counter[str]:
    """{stage: kills that fell into it}."""
    rng = np.random.default_rng(time.time_ns())
    fell: Counter[str] = Counter()
    while fell.total() < kills:
        # Without workers a start takes half the time, and all is done in one process.
        process = start(inputs, folder, workers=1 + fell.total() % 2)
        # Every third build goes through, so that kills meet what earlier ones left, and an end.
        if fell.total() % 3 or rng.random() < 0.5:
            where = wait_for_event(folder, process, rng)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                fell[where] += 1
        errors = process.communicate()[1]
        if not (folder / "s").exists():
            assert process.returncode == -signal.SIGKILL, errors
            continue
        assert sound(folder / "s").content_hash == expected
        assert_clears(inputs, folder)
        shutil.rmtree(folder / "s")
    return fell


def finished(process: subprocess.Popen[str], folder: Path) -> str:
    """The content of the store of a build that is let through."""
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert os.listdir(folder) == ["s"]
    return sound(folder / "s").content_hash


def files_of_units(folder: Path) -> set[Path]:
    """Files of units, half written ones too, that are there now."""
    units = folder / ".s.staging" / "units"
    return {*units.glob("[!.]*"), *units.glob(".*.partial")}


def stage(folder: Path, before: set[Path]) -> str:
    """How far a build is that found the files `before`."""
    staging = folder / ".s.staging"
    if (folder / "s").exists():
        return "publish" if staging.exists() else "published"
    if (staging / "published").exists():
        return "publish"
    if (staging / "store").exists():
        return "merge"
    return "units" if files_of_units(folder) - before else "start"


def wait_for_event(folder: Path, process: subprocess.Popen[str], rng: np.random.Generator) -> str:
    """Waits for a random instant of a build, or its end; the stage it is in."""
    before, staging = files_of_units(folder), folder / ".s.staging"
    event = rng.choice(EVENTS, p=(0.6, 0.2, 0.1, 0.1))
    files = int(rng.integers(1, 37))
    reached = {
        # The last units may be there already: then it is a step later.
        "unit": lambda: (
            len(files_of_units(folder) - before) >= files or (staging / "store").exists()
        ),
        "store": lambda: (staging / "store").exists(),
        "manifest": lambda: (staging / "store" / "manifest.json").exists(),
        "published": lambda: (staging / "published").exists(),
    }[event]
    if rng.random() < 0.1:
        time.sleep(rng.uniform(0, 2))
    else:
        while process.poll() is None and not reached():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
    return stage(folder, before)


if __name__ == "__main__":
    sys.exit(main())
