"""A signal at any time ends a run in order: what it is at is finished, saved, and 75 returned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.end_to_end.forked import Run, before
from tests.support.marks import soak

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
VALIDATION = "geneformer_mcore.data.loader:Feed.validation_step"
WRITING = "geneformer_mcore.checkpoint.state:Snapshot.write"
COMMIT = "geneformer_mcore.checkpoint.folder:commit"
RETAIN = "geneformer_mcore.checkpoint.folder:retain"
END = "geneformer_mcore.distributed.groups:stop"
OUTCOME = "geneformer_mcore.training.run_folder:RunFolder.close"


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
            before(place, call, lambda numbers=numbers: send(numbers))


def assert_interrupted(run: Run, name: str, *steps: int) -> None:
    """It ended at one of `steps`, which has a checkpoint, and the outcome names the signal."""
    found = run.outcome()
    step = found["step"]
    assert step in steps
    where = f"saved at step {step} of {STEPS}" if step else "no step was made"
    assert (found["outcome"], found["exit_code"]) == ("interrupted", 75)
    assert found["reason"].startswith(f"{name}; {where}")
    assert run.newest() == step
    assert not list((run.folder / "checkpoints").glob(".*"))


def assert_goes_on(run: Run, undisturbed: Run) -> None:
    run.check()
    assert run.state() == undisturbed.state()


CASES = [
    # Before the first step there is nothing to save.
    ([(CELLS, 1, (TERM, USR1))], "TERM", [0], ()),
    soak([(MEETING, 1, (TERM, USR1))], "TERM", [0], ()),
    ([(LOGS, 1, (TERM, USR1))], "USR1", [0], ()),
    # The save of step 3. Written while it trains, it may be finished some steps later, and the
    # step of that time is saved as well.
    ([(WRITING, 1, (TERM, USR1))], "USR1", [3], ()),
    soak([(COMMIT, 1, (TERM, USR1))], "USR1", [3], ()),
    soak([(RETAIN, 1, (TERM, USR1))], "USR1", [3], ()),
    soak([(WRITING, 1, (TERM, USR1))], "USR1", range(3, STEPS), ASYNCHRONOUS),
    ([(COMMIT, 1, (TERM, USR1))], "USR1", range(3, STEPS), ASYNCHRONOUS),
    # A second signal during the last save.
    soak([(STEP, 2, (TERM,)), (WRITING, 1, (USR1, INT, TERM))], "TERM", [2], ()),
    soak([(STEP, 2, (TERM,)), (COMMIT, 1, (USR1, INT, TERM))], "TERM", [2], ()),
    ([(STEP, 2, (TERM,)), (RETAIN, 1, (USR1, INT, TERM))], "TERM", [2], ()),
    ([(STEP, 2, (TERM,)), (OUTCOME, 1, (USR1, INT, TERM))], "TERM", [2], ()),
    # A validation is finished.
    ([(VALIDATION, 2, (TERM, USR1))], "USR1", [4], ()),
]


@pytest.mark.parametrize(("reached", "name", "steps", "more"), CASES)
def test_a_signal_saves_and_the_run_goes_on(
    run: Run, undisturbed: Run, reached: list[Reached], name: str, steps: Sequence[int], more: tuple
) -> None:
    run.check(*more, trouble=(signalled, 0, *reached), code=75)
    assert_interrupted(run, f"signal SIG{name}", *steps)
    if reached[0][0] == VALIDATION:
        assert [line["step"] for line in run.records("val_loss")] == [4], "its loss is kept"
    assert_goes_on(run, undisturbed)


def test_while_it_imports(run: Run, undisturbed: Run, repository: Path) -> None:
    """As a user starts it; the outcome is cleared before what takes seconds to import."""
    command = [sys.executable, str(repository / "launch" / "pretrain.py"), *run.words()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (run.folder / "outcome.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(TERM)
    time.sleep(BETWEEN_S)
    process.send_signal(HUP)
    printed, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (75, b"")
    assert b"interrupted by signal SIGTERM; no step was made" in printed
    assert run.outcome()["exit_code"] == 75
    assert_goes_on(run, undisturbed)


def test_while_it_restores(run: Run, undisturbed: Run) -> None:
    for reached in ((STEP, 4, (TERM,)), (RESTORING, 1, (USR1, TERM))):
        run.check(trouble=(signalled, 0, reached), code=75)
        assert_interrupted(run, "signal SIGTERM", 4)
    assert run.outcome()["restart"] == 1
    assert_goes_on(run, undisturbed)


@pytest.mark.parametrize(
    ("place", "to", "step"),
    [soak(STEP, 0, 1), soak(BUILDING, 1, 0), (STEP, 1, 1), soak(VALIDATION, 1, 4), (WRITING, 1, 3)],
)
def test_one_of_two_ranks_is_enough(run: Run, place: str, to: int, step: int) -> None:
    """The other one waits for it in a collective, or goes on, and stops at the same step."""
    run.check(ranks=2, trouble=(signalled, to, (place, 1, (USR1, TERM))), code=75)
    assert_interrupted(run, "another rank was asked to stop" if to else "signal SIGTERM", step)
    run.check(ranks=2)


def test_after_the_last_step_it_is_finished(run: Run, undisturbed: Run) -> None:
    run.check(trouble=(signalled, 0, (END, 1, (TERM,))))
    assert run.outcome()["outcome"] == "finished"
    assert run.state() == undisturbed.state()


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
