"""Saving: what is written is the state of the moment it was begun, or nothing and a message."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import manager, state
from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.checkpoint.safe_metadata import METADATA
from geneformer_mcore.config.sections import CheckpointConfig
from geneformer_mcore.errors import CheckpointError
from tests import small_disk
from tests.distributed import toy
from tests.distributed.ranks import in_turn, run_ranks

SMALL = ("model.num_layers=2",)


def saver_of(
    run: toy.Toy, root: str, said: list[str], **settings: Any
) -> manager.CheckpointManager:
    config = CheckpointConfig(**settings)
    return manager.CheckpointManager(Path(root), config, run.topology.rank, toy.CPU, said.append)


def record(step: int, val_loss: float | None = None) -> Record:
    return Record(step, 16 * step, {}, Identity("", {}, "", ""), {}, {}, {}, val_loss)


def files_of(root: str, step: int) -> dict[str, str]:
    manifest = checkpoints.step_folder(Path(root), step) / checkpoints.MANIFEST
    files = json.loads(manifest.read_text())["files"]
    # torch gives every description an id of its own.
    return {name: entry["sha256"] for name, entry in files.items() if name != METADATA}


def saved_while_training_goes_on(root: str, asynchronous: bool) -> list[str]:
    run = toy.make(*SMALL, "model.hidden_dropout=0.1", "parallel.pipeline=2")
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
    run = toy.make(*SMALL)
    said: list[str] = []
    saver = saver_of(run, root, said)
    saver.begin(run.trainable, record(1))
    if how == "hangs":
        saver = saver_of(run, root, said, deadline_s=2)
    if run.topology.rank == rank:

        def write(_snapshot: state.Snapshot) -> None:
            if how == "hangs":
                time.sleep(100)
            raise OSError(5, "Input/output error", "a file")

        state.Snapshot.write = write  # type: ignore[method-assign]
    try:
        saver.begin(run.trainable, record(2))
    except (CheckpointError, manager.SaveDeadlineError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_is_an_error_everywhere(tmp_path: Path, rank: int) -> None:
    root = str(tmp_path / "checkpoints")
    for told in run_ranks(writing_fails, 2, root, "fails", rank):
        assert told.startswith("CheckpointError: the checkpoint of step 2 cannot be written")
        assert "Input/output error (a file)" in told
        assert "the newest checkpoint, step 1, stays as it was" in told
    assert checkpoints.newest_good(Path(root)) == (checkpoints.step_folder(Path(root), 1), [])
    assert not list(Path(root).glob(".*_step_*"))


def test_a_disk_that_does_not_answer_ends_it_at_the_deadline(tmp_path: Path) -> None:
    root = str(tmp_path / "checkpoints")
    began = time.monotonic()
    (told,) = run_ranks(writing_fails, 1, root, "hangs", 0)
    assert time.monotonic() - began < 30
    assert told.startswith("SaveDeadlineError: the checkpoint of step 2 was not written within 2 s")
    assert checkpoints.newest_good(Path(root)) == (checkpoints.step_folder(Path(root), 1), [])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk.mounted(tmp_path / "disk") as disk:
        yield disk


def saved_until_it_fails(root: str) -> list[str]:
    run = toy.make(*SMALL)
    saver = saver_of(run, root, [], keep_last=100)
    told = []
    for step in range(1, 40):
        try:
            saver.begin(run.trainable, record(step))
        except CheckpointError as error:
            told.append(str(error))
            if len(told) == 2:
                return told
    raise AssertionError("the disk never got full")


def test_a_full_disk_is_one_message_that_says_how_much_is_missing(disk: Path) -> None:
    root = disk / "checkpoints"
    told_by_rank = run_ranks(saved_until_it_fails, 2, str(root))
    assert told_by_rank[0] == told_by_rank[1]
    for told in told_by_rank[0]:
        assert "No space left on device (it takes about " in told
        assert " missing" in told
        assert "stays as it was" in told
    newest, messages = checkpoints.newest_good(root)
    assert newest is not None
    assert messages == []
    assert not list(root.glob(".*_step_*"))


def test_a_folder_that_cannot_be_written_is_one_message(disk: Path) -> None:
    root = disk / "checkpoints"
    root.mkdir()
    small_disk.make_read_only(disk)
    for told in run_ranks(saved_once, 2, str(root)):
        assert "Read-only file system" in told
        assert "there is none yet" in told


def saved_once(root: str) -> str:
    run = toy.make(*SMALL)
    try:
        saver_of(run, root, []).begin(run.trainable, record(1))
    except CheckpointError as error:
        return str(error)
    return ""


def saved_with_losses(root: str) -> None:
    run = toy.make(*SMALL)
    saver = saver_of(run, root, [], keep_last=1, keep_best=True)
    for step, loss in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, None)):
        saver.begin(run.trainable, record(step, loss))


def test_the_best_is_kept(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    run_ranks(saved_with_losses, 1, str(root))
    assert checkpoints.steps(root) == [2, 5]


def no_process_of_its_own(root: str) -> int:
    import psutil

    run = toy.make(*SMALL)
    saver = saver_of(run, root, [], asynchronous=True)
    saver.begin(run.trainable, record(1))
    children = len(psutil.Process().children(recursive=True))
    saver.finish()
    return children


def test_no_writer_process_can_be_killed_as_there_is_none(tmp_path: Path) -> None:
    assert run_ranks(no_process_of_its_own, 1, str(tmp_path / "checkpoints")) == [0]
