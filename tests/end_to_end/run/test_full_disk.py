"""A disk that is full, or read-only, ends a run with one message, and costs no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end import forked
from tests.end_to_end.forked import newest, outcome, records
from tests.support import small_disk
from tests.support.final_state import FinalState, final_state
from tests.support.marks import soak

STEPS = 12
STEP = "geneformer_mcore.training.trainer:train_step"
MORE = (
    f"train.steps={STEPS}",
    "train.validate_every_steps=6",
    "metrics.log_every_steps=1",
    "checkpoint.save_every_steps=3",
    "checkpoint.keep_last=1",
    "checkpoint.keep_best=false",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk.mounted(tmp_path / "disk", "8m") as disk:
        yield disk


def settings(store: Path, *more: str) -> list[str]:
    return [f"data.store={store}", *MORE, *more]


def assert_refused(run: Path, printed: str, *parts: str) -> None:
    """It ended with exit code 2 in outcome.json, too, and with one message that holds `parts`."""
    (message,) = (line for line in printed.splitlines() if line.startswith("error: "))
    for part in (*parts, "Remedy: ", "start the same command again"):
        assert part in message
    found = outcome(run)
    assert (found["outcome"], found["exit_code"]) == ("refused", 2)
    assert found["reason"] == message.removeprefix("error: ")


def assert_goes_on(run: Path, store: Path, undisturbed: FinalState, ranks: int = 1) -> None:
    """The next start ends the run as if nothing had happened."""
    stood_at = newest(run)
    printed = forked.check(run, settings(store), ranks)
    assert not stood_at or f"(step {stood_at}," in printed
    # Two ranks draw other dropout, and add up in another order.
    assert ranks > 1 or final_state(run) == undisturbed
    assert not list((run / "checkpoints").glob(".*"))
    assert sorted({each["step"] for each in records(run)}) == list(range(1, STEPS + 1))


def filled(rank: int, place: str, call: int, disk: Path) -> None:
    """Trouble: the disk is full from there on."""
    if rank == 0:
        forked.before(place, call, partial(small_disk.fill, disk))


LOST = (
    "the checkpoint of step 6 cannot be written",
    "the newest checkpoint, step 3, stays",
)
ASYNCHRONOUS = ("checkpoint.asynchronous=true",)
BEFORE_IT = (
    "geneformer_mcore.training.trainer:_save",
    "it takes more than 1,048,576 bytes, 0 are free, 1,048,576 missing",
)
WITHIN_IT = ("geneformer_mcore.checkpoint.state:Snapshot.write", "")
IN_COMMIT = ("geneformer_mcore.checkpoint.folder:commit", "")


@pytest.mark.parametrize(
    ("where", "ranks", "more"),
    [
        (BEFORE_IT, 1, ()),
        soak(WITHIN_IT, 1, ()),
        (WITHIN_IT, 2, ASYNCHRONOUS),
        (IN_COMMIT, 1, ()),
        soak(IN_COMMIT, 1, ASYNCHRONOUS),
    ],
    ids=["no room for it", "in the middle", "beside two ranks", "at the end", "at its end beside"],
)
def test_a_disk_full_in_a_save(
    disk: Path,
    store: Path,
    undisturbed: FinalState,
    where: tuple[str, str],
    ranks: int,
    more: tuple[str, ...],
) -> None:
    run = disk / "run"
    place, text = where
    # Only checkpoints lie on the disk: lines of metrics.jsonl would be refused first.
    elsewhere = disk.with_name("elsewhere")
    elsewhere.mkdir()
    run.symlink_to(elsewhere)
    (disk / "checkpoints").mkdir()
    (run / "checkpoints").symlink_to(disk / "checkpoints")
    trouble = (place, 2, disk)
    printed = forked.check(run, settings(store, *more), ranks, filled, trouble, code=2)
    assert_refused(run, printed, *LOST, "No space left on device", text)
    assert newest(run) == 3
    (disk / "filler").unlink()
    assert_goes_on(run, store, undisturbed, ranks)


@pytest.mark.parametrize("name", ["metrics.jsonl", soak("log.txt"), soak("tensorboard")])
def test_a_disk_full_of_what_is_told(
    disk: Path, tmp_path: Path, store: Path, undisturbed: FinalState, name: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(disk / name)
    if name == "tensorboard":
        (disk / name).mkdir()
    # The last block of a file has room for some more lines: it fills up in the next few steps.
    asked, trouble = settings(store, "train.steps=1000"), (STEP, 5, disk)
    printed = forked.check(run, asked, 1, filled, trouble, code=2)
    assert_refused(run, printed, str(run / name), "No space left on device (0 of 8,388,608 bytes")
    assert newest(run) == outcome(run)["step"] // 3 * 3 >= 3
    (disk / "filler").unlink()
    forked.check(run, settings(store, f"train.steps={outcome(run)['step'] + 1}"))


def test_a_disk_full_of_everything(disk: Path, store: Path, undisturbed: FinalState) -> None:
    run = disk / "run"
    printed = forked.check(run, settings(store), 2, filled, (STEP, 5, disk), code=2)
    assert_refused(run, printed, "No space left on device")
    assert newest(run) == 3
    # Started again, it fails before it has cost anything.
    printed = forked.check(run, settings(store), code=2)
    assert_refused(run, printed, "No space left on device (0 of ")
    assert newest(run) == 3
    (disk / "filler").unlink()
    assert_goes_on(run, store, undisturbed, 2)


@pytest.mark.parametrize("name", [soak("_describe"), "Sinks"])
def test_a_disk_full_at_the_start(
    disk: Path, store: Path, undisturbed: FinalState, name: str
) -> None:
    run = disk / "run"
    place = f"geneformer_mcore.training.setup:{name}"
    printed = forked.check(run, settings(store), 1, filled, (place, 1, disk), code=2)
    assert_refused(run, printed, "No space left on device (0 of ")
    (disk / "filler").unlink()
    assert_goes_on(run, store, undisturbed)


def test_how_a_run_ended_is_told_on_a_full_disk(
    disk: Path, store: Path, undisturbed: FinalState
) -> None:
    run = disk / "run"
    last = ("geneformer_mcore.distributed.groups:stop", 1, disk)
    forked.check(run, settings(store), 1, filled, last)
    assert outcome(run)["outcome"] == "finished"
    assert final_state(run) == undisturbed


def test_what_a_killed_save_left_behind_makes_room(
    disk: Path, store: Path, undisturbed: FinalState
) -> None:
    run = disk / "run"
    left_behind = run / "checkpoints" / ".staging_step_0000000003"
    left_behind.mkdir(parents=True)
    small_disk.fill(disk).rename(left_behind / "half of it")
    assert_goes_on(run, store, undisturbed)


def test_a_full_disk_of_the_console_changes_nothing(
    disk: Path, store: Path, undisturbed: FinalState, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trouble = ("geneformer_mcore.training.setup:_announce", 1, disk)
    forked.check(run, settings(store), 1, filled, trouble, printed=disk / "printed")
    assert final_state(run) == undisturbed
    assert "the console cannot be written (No space left" in (run / "log.txt").read_text()


def test_a_disk_that_is_read_only(disk: Path, store: Path, undisturbed: FinalState) -> None:
    run = disk / "run"
    forked.check(run, settings(store, "train.max_minutes=1e-9"), code=75)
    before = outcome(run)
    small_disk.make_read_only(disk)
    (message,) = forked.check(run, settings(store), code=2).splitlines()
    assert message.startswith(f"error: run.dir must be a folder that can be written, and {run}")
    assert "Read-only file system" in message
    assert outcome(run) == before
    small_disk.make_read_only(disk, False)
    assert_goes_on(run, store, undisturbed)


def covered(rank: int, call: int, folder: Path) -> None:
    """Trouble: the folder becomes read-only, but for what is open already."""
    if rank == 0:
        do = partial(small_disk.cover_read_only, folder)
        forked.before(STEP, call, do)


@pytest.mark.parametrize("ranks", [soak(1), 2])
def test_checkpoints_that_become_read_only(
    disk: Path, store: Path, undisturbed: FinalState, ranks: int
) -> None:
    run = disk / "run"
    trouble = (5, run / "checkpoints")
    printed = forked.check(run, settings(store), ranks, covered, trouble, code=2)
    assert_refused(run, printed, *LOST, "Read-only file system")
    small_disk.uncover(run / "checkpoints")
    assert_goes_on(run, store, undisturbed, ranks)


def test_a_run_folder_that_becomes_read_only(
    disk: Path, store: Path, undisturbed: FinalState
) -> None:
    run = disk / "run"
    printed = forked.check(run, settings(store), 1, covered, (5, run), code=2)
    assert "error: the checkpoint of step 6 cannot be written" in printed
    assert "outcome.json still says 'running': " in printed
    assert outcome(run)["exit_code"] == 1
    small_disk.uncover(run)
    assert_goes_on(run, store, undisturbed)
