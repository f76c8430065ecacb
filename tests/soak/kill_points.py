"""Kills a save at every system call by which it touches files, one after the other.

    python -m tests.soak.kill_points [--first 1] [--every 1]

A process that has a checkpoint of step 1 forks a child, which saves step 2 under strace; at the
n-th call that opens, writes, syncs, renames or removes something strace kills it (`inject`). Then
step 1 must be there and verify, step 2 must be whole or not there, and the next save must go
through and clear what was left. n goes up to the last call of the save. Needs strace. A few chosen
calls: tests/end_to_end/run/test_kills.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore

from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import manager
from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.config.sections import CheckpointConfig
from geneformer_mcore.distributed import device
from tests.distributed import toy

CALLS = (
    "openat,creat,write,pwrite64,writev,fsync,fdatasync,ftruncate,rename,renameat,renameat2,"
    "mkdir,mkdirat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,chmod,fchmod"
)
LEAST_CALLS = 100
"""A save makes more than twice as many: with fewer, strace has not seen it."""
_CALL = re.compile(r"\d+ +(\w+\(.*)")


def main() -> int:
    """Prints how many calls there are, and what was left at each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=1, help="call to begin with")
    parser.add_argument("--every", type=int, default=1, help="try each n-th call only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = saved_once(Path(folder))
        calls = calls_of_a_save(good)
        assert len(calls) > LEAST_CALLS, f"strace has seen {len(calls)} calls"
        tried = range(arguments.first, len(calls) + 1, arguments.every)
        left = Counter(killed_at(good, calls, number) for number in tried)
    print(f"{len(calls)} calls, {len(tried)} of them tried; afterwards: {dict(left)}")
    return 0


def saved_once(folder: Path) -> Path:
    """A new folder of checkpoints, with that of step 1."""
    ignore_known_warnings()
    good = folder / "good"
    assert run_to_end(save_in_child(good, 1)) == 0
    # As `check` does later: what is opened at its first use is open before calls are counted.
    checkpoints.newest_good(good)
    return good


def calls_of_a_save(good: Path) -> list[str]:
    """What a save of step 2 that nothing disturbs asks of the system, in order: name(arguments."""
    root, log = good.with_name("root"), good.with_name("calls")
    shutil.copytree(good, root)
    assert run_to_end(save_in_child(root, 2), ["-o", str(log)]) == 0
    shutil.rmtree(root)
    found = (_CALL.match(line) for line in log.read_text().splitlines())
    return [match[1] for match in found if match]


def killed_at(good: Path, calls: Sequence[str], number: int) -> str:
    """What was left by a save that was killed at that one of its `calls`, counted from 1."""
    root = good.with_name("root")
    shutil.copytree(good, root)
    # strace counts the calls of each name by themselves.
    names = [call.partition("(")[0] for call in calls[:number]]
    when = names.count(names[-1])
    inject = ["-e", f"inject={names[-1]}:signal=KILL:when={when}"]
    ended = run_to_end(save_in_child(root, 2), inject)
    assert ended == -signal.SIGKILL, f"{calls[number - 1]}: ended with {ended}"
    left = check(root)
    shutil.rmtree(root)
    return left


def check(root: Path) -> str:
    """What a start would find after a kill."""
    newest, messages = checkpoints.newest_good(root)
    assert newest is not None
    assert messages == []
    steps = checkpoints.steps(root)
    assert steps in ([1], [1, 2])
    checkpoints.verify(checkpoints.step_folder(root, 1))
    assert run_to_end(save_in_child(root, 2)) == 0
    assert checkpoints.steps(root) == [1, 2]
    assert not list(root.glob(".*_step_*"))
    checkpoints.verify(checkpoints.step_folder(root, 2))
    return f"step {steps[-1]} is the newest"


def save_in_child(root: Path, step: int) -> int:
    """A child that has stopped itself right before it saves `step`; continued, it saves."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            save(root, step)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return child


def save(root: Path, step: int) -> None:
    """Saves a toy run of one rank."""
    device.start(threads=1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    run = toy.make("model.num_layers=1")
    record = Record(step, 0, {}, Identity("run: {}", {}, "", ""), {}, {}, {})
    # strace counts calls per thread: here one thread makes them all, in the same order.
    manager._Caught.start = manager._Caught.run  # type: ignore[method-assign]
    saver = manager.CheckpointManager(
        root, CheckpointConfig(), 0, torch.device("cpu"), lambda line: None
    )
    os.kill(os.getpid(), signal.SIGSTOP)
    saver.begin(run.trainable, record)


def run_to_end(child: int, options: Sequence[str] = ()) -> int:
    """Lets a child go on, under strace if there are options of it; its exit code, or -signal."""
    tracer = None
    if options:
        tracer = subprocess.Popen(
            ["strace", "-f", "-p", str(child), "-e", f"trace={CALLS}", *options],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
    os.kill(child, signal.SIGCONT)
    if tracer is not None:
        tracer.communicate()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
