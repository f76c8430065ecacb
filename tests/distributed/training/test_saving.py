"""Saving: what is written is the state of the moment it was begun, or nothing and a message."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import manager, state
from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.checkpoint.safe_metadata import METADATA
from geneformer_mcore.config.sections import CheckpointConfig
from geneformer_mcore.errors import CheckpointError
from tests.distributed import toy
from tests.distributed.parity import PP2, TP2
from tests.distributed.ranks import in_turn, run_ranks

SMALL = "model.num_layers=2"


def saver_of(
    run: toy.Toy, root: str, said: list[str], **settings: Any
) -> manager.CheckpointManager:
    config = CheckpointConfig(**settings)
    return manager.CheckpointManager(Path(root), config, run.topology.rank, toy.CPU, said.append)


def record(step: int, val_loss: float | None = None) -> Record:
    return Record(step, 16 * step, {}, Identity("run: {}", {}, "", ""), {}, {}, {}, val_loss)


def error_of(saver: manager.CheckpointManager, run: toy.Toy, step: int) -> str:
    try:
        saver.begin(run.trainable, record(step))
    except (CheckpointError, manager.SaveDeadlineError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def files_of(root: str, step: int) -> dict[str, str]:
    manifest = checkpoints.step_folder(Path(root), step) / checkpoints.MANIFEST
    files = json.loads(manifest.read_text())["files"]
    # torch gives every description an id of its own.
    return {name: entry["sha256"] for name, entry in files.items() if name != METADATA}


def saved_while_training_goes_on(root: str, asynchronous: bool) -> list[str]:
    run = toy.make(SMALL, "model.hidden_dropout=0.1", PP2)
    said: list[str] = []
    saver = saver_of(run, root, said, asynchronous=asynchronous)
    run.steps(2)
    trained, write = threading.Event(), state.Snapshot.write

    def write_afterwards(snapshot: state.Snapshot) -> None:
        # A thread that is quicker than training would write the right bytes without a copy.
        assert trained.wait(100)
        write(snapshot)

    later = write_afterwards if asynchronous else write
    with mock.patch.object(state.Snapshot, "write", later):
        saver.begin(run.trainable, record(2))
        assert saver.is_going_on == asynchronous
        # No writer process can be killed, as there is none.
        assert not psutil.Process().children(recursive=True)
        run.steps(3)
        trained.set()
        saver.finish()
    assert not saver.is_going_on
    return said


def test_asynchronously_the_same_bytes_are_written(tmp_path: Path) -> None:
    roots = {asynchronous: str(tmp_path / str(asynchronous)) for asynchronous in (False, True)}
    calls = [(saved_while_training_goes_on, (root, how)) for how, root in roots.items()]
    messages = [[f"saved {checkpoints.step_folder(Path(root), 2)}"] for root in roots.values()]
    assert run_ranks(in_turn, 2, *calls) == [messages] * 2
    written = [files_of(root, 2) for root in roots.values()]
    assert written[0] == written[1]
    assert any(name.endswith(".npz") for name in written[0])


def writing_fails(root: str, how: str, rank: int) -> str:
    run = toy.make(SMALL)
    if how != "at once":
        assert not error_of(saver_of(run, root, []), run, 1)

    def write(_snapshot: state.Snapshot) -> None:
        if how == "hangs":
            time.sleep(100)
        raise OSError(5, "Input/output error", "a file")

    if run.topology.rank == rank:
        state.Snapshot.write = write  # type: ignore[method-assign]
    deadline = {"deadline_s": 2} if how == "hangs" else {}
    return error_of(saver_of(run, root, [], **deadline), run, 2)


@pytest.mark.parametrize(
    ("rank", "how", "left"),
    [
        (0, "fails", "the newest checkpoint, step 1, stays as it was"),
        (1, "fails", "the newest checkpoint, step 1, stays as it was"),
        (1, "at once", "there is none yet"),
    ],
)
def test_a_rank_that_cannot_write(tmp_path: Path, rank: int, how: str, left: str) -> None:
    """A disk that is full, or read-only: tests/end_to_end/run/test_full_disk.py."""
    for told in run_ranks(writing_fails, 2, str(tmp_path), how, rank):
        assert told.startswith("CheckpointError: the checkpoint of step 2 cannot be written")
        assert "Input/output error (a file)" in told
        assert left in told
    good = None if how == "at once" else checkpoints.step_folder(tmp_path, 1)
    assert checkpoints.newest_good(tmp_path) == (good, [])
    assert not list(tmp_path.glob(".*_step_*"))


def test_a_disk_that_does_not_answer_ends_it_at_the_deadline(tmp_path: Path) -> None:
    began = time.monotonic()
    (told,) = run_ranks(writing_fails, 1, str(tmp_path), "hangs", 0)
    assert time.monotonic() - began < 30
    assert told.startswith("SaveDeadlineError: the checkpoint of step 2 was not written within 2 s")
    assert checkpoints.newest_good(tmp_path) == (checkpoints.step_folder(tmp_path, 1), [])


def saved_with_losses(root: str) -> list[int]:
    run = toy.make(SMALL)
    saver = saver_of(run, root, [], keep_last=1, keep_best=True)
    for step, loss in enumerate((5.0, 3.0, None, 4.0, None), 1):
        saver.begin(run.trainable, record(step, loss))
    return checkpoints.steps(Path(root))


def test_the_best_is_kept(tmp_path: Path) -> None:
    assert run_ranks(saved_with_losses, 1, str(tmp_path)) == [[2, 5]]


def sizes(folder: Path, *overrides: str) -> tuple[int, int]:
    """(bytes of this rank's tensors, bytes that preflight foretells of all)."""
    made = toy.make(*overrides)
    made.steps(1)
    snapshot = state.Snapshot(made.trainable, folder, made.topology.rank, training_goes_on=False)
    return snapshot.num_bytes, manager.bytes_of_tensors(made.config, toy.VOCABULARY)


def test_the_size_is_foretold(tmp_path: Path) -> None:
    given = (("train.precision=fp32",), ("train.precision=bf16", TP2))
    by_rank = run_ranks(in_turn, 2, *((sizes, (tmp_path, *each)) for each in given))
    for found in zip(*by_rank, strict=True):
        assert sum(ours for ours, _ in found) == found[0][1]
