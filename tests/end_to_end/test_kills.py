"""SIGKILL in each phase of a run, at an exact point: nothing is lost, and the same start goes on.

Random instants, many of them: tests/soak/kills.py.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from tests.end_to_end import forked
from tests.final_state import final_state

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


def settings(store: Path, *more: str) -> list[str]:
    return [f"data.store={store}", *MORE, *more]


def killed(rank: int, *reached: Reached) -> None:
    """Trouble: SIGKILL where the last of `reached` is, once the others were."""
    (place, call), *within = reached
    if within:
        forked.before(place, call, lambda: killed(rank, *within))
    else:
        forked.before(place, call, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """The final state of a run that nothing killed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert forked.start(run, settings(store)).wait() == [0]
    return final_state(run)


@pytest.mark.parametrize(
    ("kills", "more"),
    [(KILLS, ()), (ASYNCHRONOUS, ("checkpoint.asynchronous=true",))],
    ids=["synchronous", "asynchronous"],
)
def test_killed_in_each_phase_it_ends_as_if_it_had_not_been(
    store: Path,
    tmp_path: Path,
    undisturbed: object,
    kills: list[Kill],
    more: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    for reached, left in kills:
        start = forked.start(run, settings(store, *more), 1, killed, reached)
        assert start.wait() == [-signal.SIGKILL], (reached, start.printed)
        assert_whole(run, left)
    last = forked.start(run, settings(store, *more))
    assert last.wait() == [0], last.printed
    assert_whole(run, [6, 8])
    assert not list((run / "checkpoints").glob(".*"))
    assert final_state(run) == undisturbed


def test_two_ranks_are_killed_at_once(store: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert forked.start(whole, settings(store), 2).wait() == [0, 0]
    codes = forked.start(run, settings(store), 2, killed, ((STEP, 5),)).wait()
    assert -signal.SIGKILL in codes
    assert 0 not in codes
    assert_whole(run, [2, 4])
    last = forked.start(run, settings(store), 2)
    assert last.wait() == [0, 0], last.printed
    assert final_state(run) == final_state(whole)


def assert_whole(run: Path, left: list[int]) -> None:
    """There are checkpoints of the steps `left`, and all are readable."""
    root = run / "checkpoints"
    assert checkpoints.steps(root) == left
    for step in left:
        checkpoints.verify(checkpoints.step_folder(root, step))
