"""SIGKILL in each phase of a run, at an exact point: nothing is lost, and the same start goes on.

Random instants, many of them: tests/soak/kills.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from tests.distributed.ranks import context
from tests.end_to_end.forked import Run, before
from tests.soak import kill_points

MORE = (
    "train.steps=8",
    "train.validate_every_steps=0",
    "metrics.log_every_steps=1",
    "checkpoint.save_every_steps=2",
    "checkpoint.keep_last=2",
)
CELLS = "geneformer_mcore.training.datasets:open_cells"
RESTORING = "geneformer_mcore.checkpoint.state:load"
STEP = "geneformer_mcore.training.trainer:train_step"
WRITING = "geneformer_mcore.checkpoint.state:Snapshot.write"
SEALING = "geneformer_mcore.checkpoint.folder:write_sealed"
POINTING = "geneformer_mcore.checkpoint.folder:_point"
REMOVING = "geneformer_mcore.checkpoint.folder:remove"
UNLINK = "os:unlink"

Reached = tuple[str, int]
"""(place, the how-many-th call of it from now on)."""
Kill = tuple[tuple[Reached, ...], list[int]]
"""(places that are reached one within the other, steps that have a checkpoint then)."""

KILLS: list[Kill] = [
    (((CELLS, 1),), []),
    (((STEP, 3),), [2]),
    (((RESTORING, 1),), [2]),
    (((SEALING, 1),), [2]),
    (((POINTING, 1),), [2, 4]),
    (((REMOVING, 1), (UNLINK, 2)), [4, 6]),
]
"""Of one start after the other, each of which meets what the ones before have left."""
ASYNCHRONOUS: list[Kill] = [
    (((WRITING, 1),), []),
    (((SEALING, 1),), []),
    (((POINTING, 1),), [2]),
    (((REMOVING, 1), (UNLINK, 2)), [4, 6]),
]
"""The same of asynchronous saves: they are killed in their thread."""


def killed(rank: int, *reached: Reached) -> None:
    """Trouble: SIGKILL where the last of `reached` is, once the others were."""
    (place, call), *within = reached
    if within:
        before(place, call, lambda: killed(rank, *within))
    else:
        before(place, call, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(
    ("kills", "more"),
    [(KILLS, ()), (ASYNCHRONOUS, ("checkpoint.asynchronous=true",))],
    ids=["synchronous", "asynchronous"],
)
def test_killed_in_each_phase_it_ends_as_if_it_had_not_been(
    run: Run, undisturbed: Run, kills: list[Kill], more: tuple[str, ...]
) -> None:
    for reached, left in kills:
        run.check(*more, trouble=(killed, *reached), code=-signal.SIGKILL)
        assert_whole(run, left)
    run.check(*more)
    assert_whole(run, [6, 8])
    assert not list((run.folder / "checkpoints").glob(".*"))
    assert run.state() == undisturbed.state()


def test_two_ranks_are_killed_at_once(run: Run, tmp_path: Path) -> None:
    whole = run.at(tmp_path / "whole")
    whole.check(ranks=2)
    codes = run.start(ranks=2, trouble=(killed, (STEP, 5))).wait()
    assert -signal.SIGKILL in codes
    assert 0 not in codes
    assert_whole(run, [2, 4])
    run.check(ranks=2)
    assert run.state() == whole.state()


def assert_whole(run: Run, left: list[int]) -> None:
    """There are checkpoints of the steps `left`, and all are readable."""
    root = run.folder / "checkpoints"
    assert checkpoints.steps(root) == left
    for step in left:
        checkpoints.verify(checkpoints.step_folder(root, step))


BEFORE, AFTER = "step 1 is the newest", "step 2 is the newest"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_save_killed_at_a_system_call_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own, forked from one that has no threads: it forks every save. All
    system calls: tests/soak/kill_points.py."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_kill_saves, args=(tmp_path, sender), daemon=True)
    process.start()
    sender.close()
    failure, left = receiver.recv()
    process.join()
    assert failure == ""
    assert left == {
        "the first": BEFORE,
        "of the manifest": BEFORE,
        "of its name": BEFORE,
        "after its name": AFTER,
        "of the pointer": AFTER,
        "the last": AFTER,
    }


def _kill_saves(folder: Path, sender: Any) -> None:
    left: dict[str, str] = {}
    try:
        good = kill_points.saved_once(folder)
        calls = kill_points.calls_of_a_save(good)
        for name, number in _chosen(calls).items():
            left[name] = kill_points.killed_at(good, calls, number)
        sender.send(("", left))
    except BaseException:
        sender.send((f"{traceback.format_exc()}\nafter {left}", left))


def _chosen(calls: list[str]) -> dict[str, int]:
    """The numbers of the calls by which a checkpoint comes to be."""

    def first(*words: str) -> int:
        return next(i for i, call in enumerate(calls, 1) if all(word in call for word in words))

    named = first("rename", '/.staging_step_0000000002", ')
    return {
        "the first": 1,
        "of the manifest": first("rename", "manifest.json"),
        "of its name": named,
        "after its name": named + 1,
        "of the pointer": first("rename", "latest"),
        "the last": len(calls),
    }
