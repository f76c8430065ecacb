"""A signal at any time ends a run in order: what it is at is finished, saved, and 75 returned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geneformer_mcore.checkpoint import folder as checkpoints
from tests.end_to_end import forked
from tests.final_state import FinalState, final_state
from tests.marks import soak

STEPS = 8
MORE = (
    f"train.steps={STEPS}",
    "train.validate_every_steps=4",
    "train.validate_batches=2",
    "metrics.log_every_steps=1",
    "checkpoint.save_every_steps=3",
)
TERM, USR1, INT, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP
ASYNCHRONOUS = ("checkpoint.asynchronous=true",)
BETWEEN_S = 0.05
"""Between two signals: as one, they would be handled at once."""

CELLS = "geneformer_mcore.training.datasets:open_cells"
MEETING = "geneformer_mcore.distributed.groups:start"
BUILDING = "geneformer_mcore.training.setup:_meter"
RESTORING = "geneformer_mcore.checkpoint.state:load"
LOGS = "geneformer_mcore.training.setup:_announce"
STEP = "geneformer_mcore.training.trainer:train_step"
VALIDATION = "geneformer_mcore.training.step:run_schedule"
WRITING = "geneformer_mcore.checkpoint.state:Snapshot.write"
COMMIT = "geneformer_mcore.checkpoint.folder:commit"
RETAIN = "geneformer_mcore.checkpoint.folder:retain"
END = "geneformer_mcore.distributed.groups:stop"
OUTCOME = "geneformer_mcore.training.run_folder:RunFolder.close"


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> FinalState:
    """The final state of a run that no signal reached."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert forked.start(run, settings(store)).wait() == [0]
    return final_state(run)


def settings(store: Path, *more: str) -> list[str]:
    return [f"data.store={store}", *MORE, *more]


def outcome(run: Path) -> dict:
    return json.loads((run / "outcome.json").read_text())


Reached = tuple[str, int, tuple[signal.Signals, ...]]
"""(place, the how-many-th time, signals)."""


def signalled(rank: int, to: int, *reached: Reached) -> None:
    """Trouble: rank `to` is sent signals whenever it reaches one of the places."""

    def send(numbers: tuple[signal.Signals, ...]) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(BETWEEN_S)

    if rank == to:
        for place, call, numbers in reached:
            forked.before(place, call, lambda numbers=numbers: send(numbers))


def assert_interrupted(start: forked.Start, run: Path, name: str, *steps: int) -> None:
    """It ended with 75 at one of `steps`, there is a checkpoint of that, and it says by which
    signal."""
    codes = start.wait()
    assert set(codes) == {75}, start.printed
    assert "Traceback" not in start.printed
    found = outcome(run)
    step = found["step"]
    assert step in steps
    where = f"saved at step {step} of {STEPS}" if step else "no step was made"
    assert (found["outcome"], found["exit_code"]) == ("interrupted", 75)
    assert found["reason"].startswith(f"{name}; {where}")
    newest, damaged = checkpoints.newest_good(run / "checkpoints")
    assert damaged == []
    assert newest == (checkpoints.step_folder(run / "checkpoints", step) if step else None)
    assert not list((run / "checkpoints").glob(".*"))


def assert_goes_on(run: Path, store: Path, undisturbed: FinalState | None, ranks: int = 1) -> None:
    start = forked.start(run, settings(store), ranks)
    assert start.wait() == [0] * ranks, start.printed
    if ranks == 1:
        assert final_state(run) == undisturbed


@pytest.mark.parametrize("place", [CELLS, soak(MEETING), LOGS])
def test_before_the_first_step_there_is_nothing_to_save(
    store: Path, tmp_path: Path, undisturbed: FinalState, place: str
) -> None:
    run = tmp_path / "run"
    start = forked.start(run, settings(store), 1, signalled, (0, (place, 1, (TERM, USR1))))
    assert_interrupted(start, run, "signal SIGUSR1", 0)
    assert_goes_on(run, store, undisturbed)


def test_while_it_imports(
    store: Path, tmp_path: Path, undisturbed: FinalState, repository: Path
) -> None:
    """As a user starts it; the outcome is cleared before what takes seconds to import."""
    run = tmp_path / "run"
    script = str(repository / "launch" / "pretrain.py")
    arguments = [f"run.dir={run}", *forked.SETTINGS, *settings(store)]
    process = subprocess.Popen(
        [sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (run / "outcome.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(TERM)
    time.sleep(BETWEEN_S)
    process.send_signal(HUP)
    said, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (75, b"")
    assert b"interrupted by signal SIGHUP; no step was made" in said
    assert outcome(run)["exit_code"] == 75
    assert_goes_on(run, store, undisturbed)


def test_while_it_restores(store: Path, tmp_path: Path, undisturbed: FinalState) -> None:
    run = tmp_path / "run"
    at_step_4 = (0, (STEP, 4, (TERM,)))
    start = forked.start(run, settings(store), 1, signalled, at_step_4)
    assert_interrupted(start, run, "signal SIGTERM", 4)
    start = forked.start(run, settings(store), 1, signalled, (0, (RESTORING, 1, (USR1, TERM))))
    assert_interrupted(start, run, "signal SIGTERM", 4)
    assert outcome(run)["restart"] == 1
    assert_goes_on(run, store, undisturbed)


@pytest.mark.parametrize(
    ("place", "more"),
    [
        (WRITING, ()),
        soak(COMMIT, ()),
        soak(RETAIN, ()),
        soak(WRITING, ASYNCHRONOUS),
        (COMMIT, ASYNCHRONOUS),
    ],
)
def test_during_a_save(
    store: Path, tmp_path: Path, undisturbed: FinalState, place: str, more: tuple[str, ...]
) -> None:
    """That of step 3. Written beside training, it may be finished some steps later, and the step
    of that time is saved as well."""
    run = tmp_path / "run"
    reached = (place, 1, (TERM, USR1))
    start = forked.start(run, settings(store, *more), 1, signalled, (0, reached))
    assert_interrupted(start, run, "signal SIGUSR1", *(range(3, STEPS) if more else [3]))
    assert_goes_on(run, store, undisturbed)


@pytest.mark.parametrize("place", [soak(WRITING), soak(COMMIT), RETAIN, OUTCOME])
def test_a_second_signal_during_the_last_save(
    store: Path, tmp_path: Path, undisturbed: FinalState, place: str
) -> None:
    run = tmp_path / "run"
    reached = ((STEP, 2, (TERM,)), (place, 1, (USR1, INT, TERM)))
    start = forked.start(run, settings(store), 1, signalled, (0, *reached))
    assert_interrupted(start, run, "signal SIGTERM", 2)
    assert_goes_on(run, store, undisturbed)


def test_during_a_validation(store: Path, tmp_path: Path, undisturbed: FinalState) -> None:
    """It is finished, and its loss is kept."""
    run = tmp_path / "run"
    start = forked.start(run, settings(store), 1, signalled, (0, (VALIDATION, 2, (TERM, USR1))))
    assert_interrupted(start, run, "signal SIGUSR1", 4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [4]
    assert_goes_on(run, store, undisturbed)


@pytest.mark.parametrize(
    ("place", "to"),
    [soak(STEP, 0), soak(BUILDING, 1), (STEP, 1), soak(VALIDATION, 1), (WRITING, 1)],
)
def test_one_of_two_ranks_is_enough(store: Path, tmp_path: Path, place: str, to: int) -> None:
    """The other one waits for it in a collective, or goes on, and stops at the same step."""
    run = tmp_path / "run"
    start = forked.start(run, settings(store), 2, signalled, (to, (place, 1, (USR1, TERM))))
    step = {BUILDING: 0, STEP: 1, VALIDATION: 4, WRITING: 3}[place]
    name = "another rank was asked to stop" if to else "signal SIGTERM"
    assert_interrupted(start, run, name, step)
    assert_goes_on(run, store, None, ranks=2)


def test_after_the_last_step_it_is_finished(
    store: Path, tmp_path: Path, undisturbed: FinalState
) -> None:
    run = tmp_path / "run"
    start = forked.start(run, settings(store), 1, signalled, (0, (END, 1, (TERM,))))
    assert start.wait() == [0]
    assert outcome(run)["outcome"] == "finished"
    assert final_state(run) == undisturbed


LATE = """
import os, signal, sys
from geneformer_mcore.training.signals import Interruption

class Late:
    # Bound here: by then modules are empty.
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGTERM):
        kill(process, number)

interruption = Interruption()
sys.late = Late()
{over}
sys.exit(75)
"""


@pytest.mark.parametrize(("over", "code"), [("interruption.over()", 75), ("", -TERM)])
def test_a_signal_while_the_interpreter_ends(repository: Path, over: str, code: int) -> None:
    """Without `over` it would change the exit code, long after the outcome was written."""
    ended = subprocess.run(
        [sys.executable, "-c", LATE.format(over=over)], cwd=repository, check=False, timeout=60
    )
    assert ended.returncode == code
