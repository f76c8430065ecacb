"""train.profile_steps: a trace that viewers can open, and a run that it does not touch."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from geneformer_mcore.training.profiler import WARM_UP_STEPS
from tests.end_to_end.forked import Run, before
from tests.support.marks import soak

STEPS = 8
MORE = (
    f"train.steps={STEPS}",
    "train.validate_every_steps=4",
    "metrics.log_every_steps=1",
    "checkpoint.save_every_steps=4",
)
TRACE = "profile/trace_step_0000000004_to_0000000006.json"


THREE = "train.profile_steps=3"
STEP = "geneformer_mcore.training.trainer:train_step"


def test_the_trace_names_our_parts_of_the_steps_asked_for(run: Run, undisturbed: Run) -> None:
    printed = run.check(THREE)
    assert f"profile of 3 step(s): {run.folder / TRACE}" in printed
    assert [path.name for path in (run.folder / "profile").iterdir()] == [Path(TRACE).name]
    events = json.loads((run.folder / TRACE).read_text())["traceEvents"]
    names = Counter(event["name"] for event in events if event.get("ph") == "X")
    for part in ("wait for cells", "forward and backward", "gradient norm", "update"):
        assert names[part] == 3
    assert any("LinearWithGradAccumulation" in name for name in names), "Megatron's operators"
    assert any("scaled_dot_product" in name for name in names)
    assert run.state() == undisturbed.state()
    assert not (undisturbed.folder / "profile").exists()
    assert WARM_UP_STEPS == 3


@pytest.mark.soak
def test_rank_0_writes_it(run: Run) -> None:
    run.check(THREE, ranks=2)
    assert [path.name for path in (run.folder / "profile").iterdir()] == [Path(TRACE).name]


def interrupted(_rank: int, number: signal.Signals) -> None:
    """Trouble: a signal inside the window, which begins with step 4."""
    before(STEP, 5, partial(os.kill, os.getpid(), number))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), soak(signal.SIGKILL, -9)])
def test_an_end_inside_the_window_costs_the_trace_alone(
    run: Run, undisturbed: Run, number: signal.Signals, code: int
) -> None:
    run.check(THREE, trouble=(interrupted, number), code=code)
    assert not (run.folder / "profile").exists()
    # Another value is no other run.
    run.check("train.profile_steps=0")
    assert run.state() == undisturbed.state()


def failing(_rank: int) -> None:
    """Trouble: an error of ours falls into the window."""

    def fail() -> None:
        raise ValueError("a bad cell")

    before(STEP, 5, fail)


def test_an_error_inside_the_window_is_reported_as_it_is(run: Run) -> None:
    run.check(THREE, trouble=(failing,), code=1)
    assert "ValueError: a bad cell" in run.outcome()["reason"]


def unwritable(_rank: int) -> None:
    """Trouble: the trace cannot be written whole."""
    from torch.profiler import profile

    def cut_short(_self: profile, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    profile.export_chrome_trace = cut_short  # type: ignore[method-assign, assignment]


def test_a_trace_that_cannot_be_written_ends_no_run(run: Run, undisturbed: Run) -> None:
    assert "the profile cannot be written into" in run.check(THREE, trouble=(unwritable,))
    assert not list((run.folder / "profile").iterdir())
    assert run.state() == undisturbed.state()
