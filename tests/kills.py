"""Kills runs at random instants, again and again, and looks whether anything was lost.

    python -m tests.kills --kills 200 [--ranks 2] [--asynchronous]

One process imports what a run needs and forks every start from there: what is killed is the whole
process group of launch/pretrain.py's ranks, a second after it was started and not ten. After every
kill the newest checkpoint must be readable and none that was committed may be gone. In the end the
run is let through, and its weights, moments and random states must be, byte for byte, those of a
run that nothing disturbed. Prints in which phase the kills fell.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from geneformer_mcore.checkpoint import folder as checkpoints

SETTINGS = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=2",
    "data.span_cells=16",
    "data.pad_multiple=8",
    "train.precision=fp32",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.validate_every_steps=0",
    "metrics.log_every_steps=1",
    "checkpoint.save_every_steps=2",
    "checkpoint.keep_last=3",
)
LONGEST_WAIT_S = 2.0
IN_START = 0.1
"""Share of the kills that may fall before the first step."""


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
    print("nothing lost, and the final state is that of the undisturbed run, byte for byte")
    return 0


def soak(folder: Path, kills: int, ranks: int, steps: int, more: Sequence[str]) -> Counter[str]:
    """{phase: kills that fell into it}. Raises AssertionError if anything was lost.

    steps: of the run; if it comes to its end before so many kills fell, it begins again
    """
    store = folder / "store"
    _make_store(store)
    settings = [f"data.store={store}", "data.seq_length=32", f"train.steps={steps}"]
    settings += [*SETTINGS, *more]
    undisturbed = folder / "undisturbed"
    start(undisturbed, ranks, settings).wait()
    expected = final_state(undisturbed)
    rng = random.Random(time.time_ns())
    fell: Counter[str] = Counter()
    lives = 0
    while fell.total() < kills:
        run = folder / f"disturbed_{lives}"
        ended = False
        while fell.total() < kills and not ended:
            before = checkpoints.steps(run / "checkpoints")
            job = start(run, ranks, settings)
            if rng.random() > IN_START:
                job.wait_for_a_step(run, after=before[-1] if before else 0)
            ended = job.wait(rng.uniform(0, LONGEST_WAIT_S))
            if not ended:
                job.kill()
                fell[phase_of(run)] += 1
            check(run, before)
        start(run, ranks, settings).wait()
        assert final_state(run) == expected, "the run ended in another state"
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


def phase_of(run: Path) -> str:
    """What a run was at when it was killed: save (a staging folder is there), train, or start."""
    root = run / "checkpoints"
    if root.is_dir() and any(root.glob(".*_step_*")):
        return "save"
    metrics = run / "metrics.jsonl"
    age_s = time.time() - metrics.stat().st_mtime if metrics.exists() else 1e9
    return "train" if age_s < 0.5 else "start"


def check(run: Path, before: Sequence[int]) -> None:
    """The newest checkpoint is readable, and at least as new as the newest before."""
    root = run / "checkpoints"
    steps = checkpoints.steps(root)
    for step in steps:
        checkpoints.verify(checkpoints.step_folder(root, step))
    assert not before or (steps and steps[-1] >= before[-1]), (before, steps)


def final_state(run: Path) -> dict[str, str]:
    """{file of the last checkpoint: its SHA-256}, of all that the next step would depend on."""
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 0
    root = run / "checkpoints"
    last = checkpoints.step_folder(root, checkpoints.steps(root)[-1])
    files = json.loads((last / checkpoints.MANIFEST).read_text())["files"]
    return {
        name: entry["sha256"]
        for name, entry in files.items()
        if name.endswith((".distcp", ".npz", "common.pt"))
    }


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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
    said = os.open(f"{run}_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(said, stream)
    import launch.pretrain as pretrain

    sys.argv = ["pretrain.py", f"run.dir={run}", *settings]
    try:
        return pretrain.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    from geneformer_mcore.train import data, loop, setup  # noqa: F401  imported once, for all forks

    sys.exit(main())
