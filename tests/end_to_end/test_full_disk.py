"""A disk that is full, or read-only, ends a run with one message, and costs no checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from tests import small_disk
from tests.end_to_end import forked
from tests.final_state import FinalState, final_state
from tests.marks import soak

STEPS = 12
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


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> FinalState:
    """The final state of a run with room enough."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert forked.start(run, settings(store)).wait() == [0]
    return final_state(run)


def settings(store: Path, *more: str) -> list[str]:
    return [f"data.store={store}", *MORE, *more]


def outcome(run: Path) -> dict:
    return json.loads((run / "outcome.json").read_text())


def newest(run: Path) -> int:
    """The step of the newest checkpoint, which verifies, as all others do; 0 if there is none."""
    folder, damaged = checkpoints.newest_good(run / "checkpoints")
    assert damaged == []
    return int(folder.name.removeprefix("step_")) if folder else 0


def assert_refused(start: forked.Start, run: Path, *parts: str, ranks: int = 1) -> None:
    """It ends with exit code 2, here and in outcome.json, and one message that holds `parts`."""
    assert start.wait() == [2] * ranks, start.printed
    printed = start.printed
    assert "Traceback" not in printed
    (told,) = (line for line in printed.splitlines() if line.startswith("error: "))
    for part in (*parts, "Remedy: ", "start the same command again"):
        assert part in told
    found = outcome(run)
    assert (found["outcome"], found["exit_code"]) == ("refused", 2)
    assert found["reason"] == told.removeprefix("error: ")


def assert_goes_on(run: Path, store: Path, undisturbed: FinalState, ranks: int = 1) -> None:
    """The next start ends the run as if nothing had happened."""
    stood_at = newest(run)
    start = forked.start(run, settings(store), ranks)
    assert start.wait() == [0] * ranks, start.printed
    assert "Traceback" not in start.printed
    assert not stood_at or f"(step {stood_at}," in start.printed
    # Two ranks draw other dropout, and add up in another order.
    assert ranks > 1 or final_state(run) == undisturbed
    assert not list((run / "checkpoints").glob(".*"))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted({*steps}) == list(range(1, STEPS + 1))


def filled(rank: int, place: str, call: int, disk: Path) -> None:
    """Trouble: the disk is full from there on."""
    if rank == 0:
        forked.before(place, call, partial(small_disk.fill, disk))


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
    place, told = where
    # Only checkpoints lie on the disk: lines of metrics.jsonl would be refused first.
    elsewhere = disk.with_name("elsewhere")
    elsewhere.mkdir()
    run.symlink_to(elsewhere)
    (disk / "checkpoints").mkdir()
    (run / "checkpoints").symlink_to(disk / "checkpoints")
    start = forked.start(run, settings(store, *more), ranks, filled, (place, 2, disk))
    parts = ("the checkpoint of step 6 cannot be written", "No space left on device", told)
    assert_refused(start, run, *parts, "the newest checkpoint, step 3, stays", ranks=ranks)
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
    trouble = ("geneformer_mcore.training.trainer:train_step", 5, disk)
    start = forked.start(run, settings(store, "train.steps=1000"), 1, filled, trouble)
    assert_refused(start, run, str(run / name), "No space left on device (0 of 8,388,608 bytes")
    assert newest(run) == outcome(run)["step"] // 3 * 3 >= 3
    (disk / "filler").unlink()
    again = f"train.steps={outcome(run)['step'] + 1}"
    start = forked.start(run, settings(store, again))
    assert start.wait() == [0], start.printed


def test_a_disk_full_of_everything(disk: Path, store: Path, undisturbed: FinalState) -> None:
    run = disk / "run"
    start = forked.start(
        run, settings(store), 2, filled, ("geneformer_mcore.training.trainer:train_step", 5, disk)
    )
    assert_refused(start, run, "No space left on device", ranks=2)
    assert newest(run) == 3
    # Started again, it is told before it has cost anything.
    assert_refused(forked.start(run, settings(store)), run, "No space left on device (0 of ")
    assert newest(run) == 3
    (disk / "filler").unlink()
    assert_goes_on(run, store, undisturbed, 2)


@pytest.mark.parametrize("name", [soak("_describe"), "Sinks"])
def test_a_disk_full_at_the_start(
    disk: Path, store: Path, undisturbed: FinalState, name: str
) -> None:
    run = disk / "run"
    place = f"geneformer_mcore.training.setup:{name}"
    start = forked.start(run, settings(store), 1, filled, (place, 1, disk))
    assert_refused(start, run, "No space left on device (0 of ")
    (disk / "filler").unlink()
    assert_goes_on(run, store, undisturbed)


def test_how_a_run_ended_is_told_on_a_full_disk(
    disk: Path, store: Path, undisturbed: FinalState
) -> None:
    run = disk / "run"
    last = ("geneformer_mcore.distributed.groups:stop", 1, disk)
    start = forked.start(run, settings(store), 1, filled, last)
    assert start.wait() == [0], start.printed
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
    start = forked.start(run, settings(store), 1, filled, trouble, disk / "printed")
    assert start.wait() == [0], start.printed
    assert final_state(run) == undisturbed
    assert "the console cannot be written (No space left" in (run / "log.txt").read_text()


def test_a_disk_that_is_read_only(disk: Path, store: Path, undisturbed: FinalState) -> None:
    run = disk / "run"
    short = settings(store, "train.max_minutes=1e-9")
    assert forked.start(run, short).wait() == [75]
    before = outcome(run)
    small_disk.make_read_only(disk)
    start = forked.start(run, settings(store))
    assert start.wait() == [2]
    (told,) = start.printed.splitlines()
    assert told.startswith(f"error: run.dir must be a folder that can be written, and {run}")
    assert "Read-only file system" in told
    assert outcome(run) == before
    small_disk.make_read_only(disk, False)
    assert_goes_on(run, store, undisturbed)


def covered(rank: int, call: int, folder: Path) -> None:
    """Trouble: the folder becomes read-only, but for what is open already."""
    if rank == 0:
        do = partial(small_disk.cover_read_only, folder)
        forked.before("geneformer_mcore.training.trainer:train_step", call, do)


@pytest.mark.parametrize("ranks", [soak(1), 2])
def test_checkpoints_that_become_read_only(
    disk: Path, store: Path, undisturbed: FinalState, ranks: int
) -> None:
    run = disk / "run"
    trouble = (5, run / "checkpoints")
    start = forked.start(run, settings(store), ranks, covered, trouble)
    parts = ("the checkpoint of step 6 cannot be written", "Read-only file system")
    assert_refused(start, run, *parts, "the newest checkpoint, step 3, stays", ranks=ranks)
    small_disk.uncover(run / "checkpoints")
    assert_goes_on(run, store, undisturbed, ranks)


def test_a_run_folder_that_becomes_read_only(
    disk: Path, store: Path, undisturbed: FinalState
) -> None:
    run = disk / "run"
    start = forked.start(run, settings(store), 1, covered, (5, run))
    assert start.wait() == [2], start.printed
    assert "Traceback" not in start.printed
    assert "error: the checkpoint of step 6 cannot be written" in start.printed
    assert "outcome.json still says 'running': " in start.printed
    assert outcome(run)["exit_code"] == 1
    small_disk.uncover(run)
    assert_goes_on(run, store, undisturbed)
