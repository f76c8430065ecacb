"""A disk that is full, or read-only, ends a run with one message, and costs no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end.forked import Run, before
from tests.support import small_disk
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


@pytest.fixture
def on_disk(disk: Path, settings: tuple[str, ...]) -> Run:
    return Run(disk / "run", settings)


def assert_refused(run: Run, printed: str, *parts: str) -> None:
    """It ended with exit code 2 in outcome.json, too, and with one message that holds `parts`."""
    (message,) = (line for line in printed.splitlines() if line.startswith("error: "))
    for part in (*parts, "Remedy: ", "start the same command again"):
        assert part in message
    found = run.outcome()
    assert (found["outcome"], found["exit_code"]) == ("refused", 2)
    assert found["reason"] == message.removeprefix("error: ")


def assert_goes_on(run: Run, undisturbed: Run, ranks: int = 1) -> None:
    """The next start ends the run as if nothing had happened."""
    stood_at = run.newest()
    printed = run.check(ranks=ranks)
    assert not stood_at or f"(step {stood_at}," in printed
    # Two ranks draw other dropout, and add up in another order.
    assert ranks > 1 or run.state() == undisturbed.state()
    assert not list((run.folder / "checkpoints").glob(".*"))
    assert sorted({each["step"] for each in run.records()}) == list(range(1, STEPS + 1))


def filled(rank: int, place: str, call: int, disk: Path) -> None:
    """Trouble: the disk is full from there on."""
    if rank == 0:
        before(place, call, partial(small_disk.fill, disk))


LOST = ("the checkpoint of step 6 cannot be written", "the newest checkpoint, step 3, stays")
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
    ids=[
        "no room for it",
        "in the middle",
        "of two ranks",
        "at the end",
        "at its end, asynchronous",
    ],
)
def test_a_disk_full_in_a_save(
    disk: Path,
    on_disk: Run,
    undisturbed: Run,
    where: tuple[str, str],
    ranks: int,
    more: tuple[str, ...],
) -> None:
    run, (place, text) = on_disk, where
    # Only checkpoints lie on the disk: lines of metrics.jsonl would be refused first.
    elsewhere = disk.with_name("elsewhere")
    elsewhere.mkdir()
    run.folder.symlink_to(elsewhere)
    (disk / "checkpoints").mkdir()
    (run.folder / "checkpoints").symlink_to(disk / "checkpoints")
    printed = run.check(*more, ranks=ranks, trouble=(filled, place, 2, disk), code=2)
    assert_refused(run, printed, *LOST, "No space left on device", text)
    assert run.newest() == 3
    (disk / "filler").unlink()
    assert_goes_on(run, undisturbed, ranks)


@pytest.mark.parametrize("name", ["metrics.jsonl", soak("log.txt"), soak("tensorboard")])
def test_a_disk_full_of_what_is_logged(disk: Path, run: Run, name: str) -> None:
    run.folder.mkdir()
    (run.folder / name).symlink_to(disk / name)
    if name == "tensorboard":
        (disk / name).mkdir()
    # The last block of a file has room for some more lines: it fills up in the next few steps.
    printed = run.check("train.steps=1000", trouble=(filled, STEP, 5, disk), code=2)
    full = "No space left on device (0 of 8,388,608 bytes"
    assert_refused(run, printed, str(run.folder / name), full)
    step = run.outcome()["step"]
    assert run.newest() == step // 3 * 3 >= 3
    (disk / "filler").unlink()
    run.check(f"train.steps={step + 1}")


def test_a_disk_full_of_everything(disk: Path, on_disk: Run, undisturbed: Run) -> None:
    printed = on_disk.check(ranks=2, trouble=(filled, STEP, 5, disk), code=2)
    assert_refused(on_disk, printed, "No space left on device")
    assert on_disk.newest() == 3
    # Started again, it fails before it has cost anything.
    assert_refused(on_disk, on_disk.check(code=2), "No space left on device (0 of ")
    assert on_disk.newest() == 3
    (disk / "filler").unlink()
    assert_goes_on(on_disk, undisturbed, 2)


@pytest.mark.parametrize("name", [soak("_describe"), "Sinks"])
def test_a_disk_full_at_the_start(disk: Path, on_disk: Run, undisturbed: Run, name: str) -> None:
    place = f"geneformer_mcore.training.setup:{name}"
    printed = on_disk.check(trouble=(filled, place, 1, disk), code=2)
    assert_refused(on_disk, printed, "No space left on device (0 of ")
    (disk / "filler").unlink()
    assert_goes_on(on_disk, undisturbed)


def test_the_outcome_is_written_on_a_full_disk(disk: Path, on_disk: Run, undisturbed: Run) -> None:
    on_disk.check(trouble=(filled, "geneformer_mcore.distributed.groups:stop", 1, disk))
    assert on_disk.outcome()["outcome"] == "finished"
    assert on_disk.state() == undisturbed.state()


def test_what_a_killed_save_left_behind_makes_room(
    disk: Path, on_disk: Run, undisturbed: Run
) -> None:
    left_behind = on_disk.folder / "checkpoints" / ".staging_step_0000000003"
    left_behind.mkdir(parents=True)
    small_disk.fill(disk).rename(left_behind / "half of it")
    assert_goes_on(on_disk, undisturbed)


def test_a_full_disk_of_the_console_changes_nothing(disk: Path, run: Run, undisturbed: Run) -> None:
    trouble = (filled, "geneformer_mcore.training.setup:_announce", 1, disk)
    run.check(trouble=trouble, printed=disk / "printed")
    assert run.state() == undisturbed.state()
    log = (run.folder / "log.txt").read_text()
    assert "the console cannot be written (No space left" in log


def test_a_disk_that_is_read_only(disk: Path, on_disk: Run, undisturbed: Run) -> None:
    run = on_disk
    run.check("train.max_minutes=1e-9", code=75)
    earlier = run.outcome()
    small_disk.make_read_only(disk)
    (message,) = run.check(code=2).splitlines()
    rule = f"error: run.dir must be a folder that can be written, and {run.folder}"
    assert message.startswith(rule)
    assert "Read-only file system" in message
    assert run.outcome() == earlier
    small_disk.make_read_only(disk, False)
    assert_goes_on(run, undisturbed)


def covered(rank: int, folder: Path) -> None:
    """Trouble: at step 5 the folder becomes read-only, but for what is open already."""
    if rank == 0:
        before(STEP, 5, partial(small_disk.cover_read_only, folder))


@pytest.mark.parametrize("ranks", [soak(1), 2])
def test_checkpoints_that_become_read_only(on_disk: Run, undisturbed: Run, ranks: int) -> None:
    folder = on_disk.folder / "checkpoints"
    printed = on_disk.check(ranks=ranks, trouble=(covered, folder), code=2)
    assert_refused(on_disk, printed, *LOST, "Read-only file system")
    small_disk.uncover(folder)
    assert_goes_on(on_disk, undisturbed, ranks)


def test_a_run_folder_that_becomes_read_only(on_disk: Run, undisturbed: Run) -> None:
    printed = on_disk.check(trouble=(covered, on_disk.folder), code=2)
    assert "error: the checkpoint of step 6 cannot be written" in printed
    assert "outcome.json still says 'running': " in printed
    assert on_disk.outcome()["exit_code"] == 1
    small_disk.uncover(on_disk.folder)
    assert_goes_on(on_disk, undisturbed)
