"""Kills runs at random instants, again and again, and looks whether anything was lost.

    python -m tests.soak.kills --kills 200 [--ranks 2] [--asynchronous]

One process imports what a run needs and forks every start from there: what is killed is the whole
process group of launch/pretrain.py's ranks, half a second after it was started and not ten. After
every kill the newest checkpoint must be readable and none that was committed may be gone. In the
end the run is let through, and its weights, moments and random states must be, byte for byte, those
of a run that nothing disturbed. Prints in which phase the kills fell. A kill in each phase, at an
exact point: tests/end_to_end/test_kills.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from geneformer_mcore.checkpoint import folder as checkpoints
from tests.end_to_end.forked import SETTINGS
from tests.final_state import explain, final_state

MORE_SETTINGS = (
    "data.seq_length=32",
    "data.pad_multiple=8",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.validate_every_steps=0",
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--asynchronous", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        more = ["checkpoint.asynchronous=true"] if arguments.asynchronous else []
        fell = soak(Path(folder), arguments.kills, arguments.ranks, arguments.steps, more)
    inside = fell["save"] / arguments.kills
    print(f"{arguments.kills} kills, by phase: {dict(fell)}; {inside:.0%} inside a save")
    assert inside >= 0.3 or arguments.kills < ENOUGH, "too few kills fell into a save"
    print("nothing lost, and the final state is that of the undisturbed run, byte for byte")
    return 0


def soak(folder: Path, kills: int, ranks: int, steps: int, more: Sequence[str]) -> Counter[str]:
    """{phase: kills that fell into it}. Raises AssertionError if anything was lost.

    steps: of the run; if it comes to its end before so many kills fell, it begins again
    """
    store = folder / "store"
    _make_store(store)
    settings = [*SETTINGS, *MORE_SETTINGS, f"data.store={store}", f"train.steps={steps}", *more]
    undisturbed = folder / "undisturbed"
    assert start(undisturbed, ranks, settings).wait()
    expected = final_state(undisturbed)
    rng = random.Random(time.time_ns())
    fell: Counter[str] = Counter()
    lives = 0
    while fell.total() < kills:
        run = folder / f"disturbed_{lives}"
        ended = False
        while fell.total() < kills and not ended:
            before = checkpoints.steps(run / "checkpoints")
            began = time.time()
            job = start(run, ranks, settings)
            since = "start" if rng.random() < IN_START else "step"
            if since == "step":
                job.wait_for_a_step(run, after=before[-1] if before else 0)
            ended = job.wait(rng.uniform(0, LONGEST_WAIT_S[since]))
            if not ended:
                job.kill()
                fell[phase_of(run, began)] += 1
            check(run, before)
        assert start(run, ranks, settings).wait()
        ended_as = final_state(run)
        assert ended_as == expected, "\n".join(explain(ended_as, expected))
        lives += 1
    return fell


def _make_store(path: Path) -> None:
    """In a process of its own: one in which TileDB was used cannot be forked any more."""
    process = os.fork()
    if process == 0:
        from tests.small_store import write_small_store

        draw = random.Random(0)
        cells = [[0, *draw.sample(range(5, 105), draw.randint(8, 31))] for _ in range(200)]
        write_small_store(path, cells, num_genes=100, seq_length=32)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0


def phase_of(run: Path, began: float) -> str:
    """What a run was at when it was killed: save (a folder in the making, or being removed, that is
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


class Job:
    """The ranks of a start, in one process group."""

    def __init__(self, processes: list[int]) -> None:
        self._processes = processes
        self._group = processes[0]

    def wait(self, timeout_s: float = 120.0) -> bool:
        """Whether all ranks ended, with exit code 0, within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._processes and time.monotonic() < deadline:
            ended, status = os.waitpid(-self._group, os.WNOHANG)
            if ended:
                assert status == 0, f"a rank ended with status {status}"
                self._processes.remove(ended)
            else:
                time.sleep(0.002)
        return not self._processes

    def wait_for_a_step(self, run: Path, after: int) -> None:
        """Until this start has made a step later than `after`, or ended."""
        metrics, began = run / "metrics.jsonl", time.time()
        while not self.wait(0.02):
            assert time.time() < began + 120
            if metrics.exists() and metrics.stat().st_mtime > began:
                steps = [_step_of(line) for line in metrics.read_text().splitlines()]
                if max(steps, default=0) > after:
                    return

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        os.killpg(self._group, signal.SIGKILL)
        while self._processes:
            self._processes.remove(os.waitpid(-self._group, 0)[0])


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except ValueError:  # half a line, being written
        return 0


def start(run: Path, ranks: int, settings: Sequence[str]) -> Job:
    """Starts launch/pretrain.py on `ranks` ranks, forked from here."""
    # Below the ports that the system gives out by itself, to gloo among others.
    port = random.randrange(12_000, 30_000)
    processes: list[int] = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            os.setpgid(0, processes[0] if processes else 0)
            os._exit(_rank(run, rank, ranks, port, settings))
        os.setpgid(process, processes[0] if processes else process)
        processes.append(process)
    return Job(processes)


def _rank(run: Path, rank: int, ranks: int, port: int, settings: Sequence[str]) -> int:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in where.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(f"{run}_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    import launch.pretrain as pretrain
    from geneformer_mcore.training import setup

    # The device's peak is for MFU alone, and takes most of a second to measure.
    setup.measured_peak = lambda *_: 1e12  # type: ignore[assignment]
    sys.argv = ["pretrain.py", f"run.dir={run}", *settings]
    try:
        return pretrain.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    import tests.distributed.preload  # noqa: F401  imported once, for all forks

    sys.exit(main())
