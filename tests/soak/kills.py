"""Kill runs at random instants, again and again, and check that nothing was lost.

    python -m tests.soak.kills --kills 200 [--ranks 2] [--asynchronous]

Starts are forked from a warm process (tests/end_to_end/forked.py): all ranks of launch/pretrain.py
are killed, half a second after they were started and not ten. After every kill the latest
checkpoint must be readable and none that was committed may be gone. In the end the run is let
through, and its weights, moments and random states must be, byte for byte, those of a run that
nothing disturbed. Prints in which phase the kills fell. A kill in each phase, at an exact point:
tests/end_to_end/run/test_kills.py.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from geneformer_mcore.checkpoint import folder as checkpoints
from tests.end_to_end.forked import Run, Start
from tests.support.final_state import explain
from tests.support.small_store import write_small_store

SETTINGS = (
    "train.validate_every_steps=0",
    "data.seq_length=32",
    "data.pad_multiple=8",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "metrics.log_every_steps=1",
    "checkpoint.save_every_steps=2",
    "checkpoint.keep_last=3",
)
LONGEST_WAIT_S = {"start": 2.0, "step": 0.5}
"""Between what is waited for, a start or its first step, and the kill: some steps and saves."""
IN_START = 0.1
"""Share of the kills that may fall before the first step."""
ENOUGH = 20
"""Kills of which three in ten must fall inside a save."""


def main() -> int:
    """Ends with 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--asynchronous", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        more = [f"train.steps={arguments.steps}"]
        more += ["checkpoint.asynchronous=true"] if arguments.asynchronous else []
        fell = soak(Path(folder), arguments.kills, arguments.ranks, more)
    inside = fell["save"] / arguments.kills
    print(f"{arguments.kills} kills, by phase: {dict(fell)}; {inside:.0%} inside a save")
    assert inside >= 0.3 or arguments.kills < ENOUGH, "too few kills fell into a save"
    print("nothing lost, and the final state is that of the undisturbed run, byte for byte")
    return 0


def soak(folder: Path, kills: int, ranks: int, more: Sequence[str]) -> Counter[str]:
    """{phase: kills that fell into it}; an AssertionError if anything was lost. A run that comes
    to its end before so many kills fell begins again."""
    store = folder / "store"
    draw = random.Random(0)
    cells = [[0, *draw.sample(range(5, 105), draw.randint(8, 31))] for _ in range(200)]
    write_small_store(store, cells, num_genes=100, seq_length=32)
    undisturbed = Run(folder / "undisturbed", (*SETTINGS, f"data.store={store}", *more))
    undisturbed.check(ranks=ranks)
    expected = undisturbed.state()
    fell: Counter[str] = Counter()
    lives = 0
    while fell.total() < kills:
        run = undisturbed.at(folder / f"disturbed_{lives}")
        while fell.total() < kills and (phase := killed(run, ranks)):
            fell[phase] += 1
        run.check(ranks=ranks)
        assert run.state() == expected, "\n".join(explain(run.state(), expected))
        lives += 1
    return fell


def killed(run: Run, ranks: int) -> str:
    """Starts a run and kills it: the phase it was in, or "" if it had come to its end."""
    before = checkpoints.steps(run.folder / "checkpoints")
    began = time.time()
    job = run.start(ranks=ranks)
    since = "start" if random.random() < IN_START else "step"
    if since == "step":
        wait_for_a_step(job, run, began, after=before[-1] if before else 0)
    if job.is_running(random.uniform(0, LONGEST_WAIT_S[since])):
        job.kill()
        phase = phase_of(run.folder, began)
    else:
        assert set(job.wait()) == {0}, job.printed
        phase = ""
    check(run.folder, before)
    return phase


def wait_for_a_step(job: Start, run: Run, began: float, after: int) -> None:
    """Until this start has made a step later than `after`, or ended."""
    metrics = run.folder / "metrics.jsonl"
    while job.is_running(0.02):
        assert time.time() < began + 120
        is_new = metrics.exists() and metrics.stat().st_mtime > began
        if is_new and max((each["step"] for each in run.records()), default=0) > after:
            return


def phase_of(run: Path, began: float) -> str:
    """The phase in which a run was killed: save (a folder in the making, or being removed, that is
    younger than this start), train, or start."""
    root = run / "checkpoints"
    unfinished = root.glob(".*_step_*") if root.is_dir() else ()
    if any(path.stat().st_mtime > began for path in unfinished):
        return "save"
    metrics = run / "metrics.jsonl"
    age_s = time.time() - metrics.stat().st_mtime if metrics.exists() else 1e9
    return "train" if age_s < 0.5 else "start"


def check(run: Path, before: Sequence[int]) -> None:
    """All checkpoints are readable, and the newest is at least as new as any that was committed."""
    root = run / "checkpoints"
    steps = checkpoints.steps(root)
    for step in steps:
        checkpoints.verify(checkpoints.step_folder(root, step))
    logged = [int(line.rsplit("_", 1)[1]) for line in _log(run) if "saved " in line]
    committed = max([*before, *logged], default=0)
    assert max(steps, default=0) >= committed, (committed, steps)


def _log(run: Path) -> list[str]:
    """Whole lines of log.txt."""
    path = run / "log.txt"
    return path.read_text().split("\n")[:-1] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
