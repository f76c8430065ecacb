"""Kills a save at every system call by which it touches files, one after the other.

    python -m tests.kill_points [--every 1]

A process that has a checkpoint of step 1 forks a child, which saves step 2 under strace; at the
n-th call that opens, writes, syncs, renames or removes something strace kills it (`inject`). Then
step 1 must be there and verify, step 2 must be whole or not there, and the next save must go
through and clear what was left. n goes up to the last call of the save. Needs strace.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import saving
from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.config.sections import CheckpointConfig
from geneformer_mcore.parallel import device
from tests.distributed import toy

CALLS = (
    "openat,creat,write,pwrite64,writev,fsync,fdatasync,ftruncate,rename,renameat,renameat2,"
    "mkdir,mkdirat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,chmod,fchmod"
)


def main() -> int:
    """Prints how many calls there are, and what was left at each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="try each n-th call only")
    every = parser.parse_args().every
    ignore_known_warnings()
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder, "good")
        assert run_to_end(save_in_child(good, 1)) == 0
        left: Counter[str] = Counter()
        number = 1
        while True:
            root = Path(folder, "root")
            shutil.copytree(good, root)
            ended = run_to_end(save_in_child(root, 2), kill_at=number)
            left[check(root, was_killed=ended == -signal.SIGKILL)] += 1
            shutil.rmtree(root)
            if ended == 0:
                break
            assert ended == -signal.SIGKILL, ended
            number += every
    print(f"{number} calls, {left.total() - 1} of them tried; afterwards: {dict(left)}")
    return 0


def check(root: Path, was_killed: bool) -> str:
    """What a start would find."""
    newest, messages = checkpoints.newest_good(root)
    assert newest is not None
    assert messages == []
    steps = checkpoints.steps(root)
    assert steps in ([1], [1, 2])
    assert was_killed or steps == [1, 2]
    checkpoints.verify(checkpoints.step_folder(root, 1))
    assert run_to_end(save_in_child(root, 2)) == 0
    assert checkpoints.steps(root) == [1, 2]
    assert not list(root.glob(".*_step_*"))
    checkpoints.verify(checkpoints.step_folder(root, 2))
    return f"step {steps[-1]} is the newest"


def save_in_child(root: Path, step: int) -> int:
    """A child that has stopped itself right before it saves `step`; it saves once it goes on."""
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
    record = Record(step, 0, {}, Identity("", {}, "", ""), {}, {}, {})
    # strace counts calls per thread: here one thread makes them all, in the same order.
    saving._Caught.start = saving._Caught.run  # type: ignore[method-assign]
    saver = saving.Saver(root, CheckpointConfig(), 0, torch.device("cpu"), lambda line: None)
    os.kill(os.getpid(), signal.SIGSTOP)
    saver.begin(run.trainable, record)


def run_to_end(child: int, kill_at: int | None = None) -> int:
    """Lets a child go on, under strace if it is to be killed; its exit code, or -signal."""
    tracer = None
    if kill_at is not None:
        inject = f"inject={CALLS}:signal=KILL:when={kill_at}"
        tracer = subprocess.Popen(
            ["strace", "-f", "-p", str(child), "-e", f"trace={CALLS}", "-e", inject],
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
