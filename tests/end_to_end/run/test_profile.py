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
from tests.end_to_end import forked
from tests.support.final_state import FinalState, final_state
from tests.support.marks import soak

STEPS = 8
MORE = (
    f"train.steps={STEPS}",
    "train.validate_every_steps=4",
    "metrics.log_every_steps=1",
    "checkpoint.save_every_steps=4",
)
TRACE = "profile/trace_step_0000000004_to_0000000006.json"


def settings(store: Path, profile_steps: int) -> list[str]:
    return [f"data.store={store}", *MORE, f"train.profile_steps={profile_steps}"]


def names_in(trace: Path) -> Counter[str]:
    """How often each operator or part of a step was recorded."""
    events = json.loads(trace.read_text())["traceEvents"]
    return Counter(event["name"] for event in events if event.get("ph") == "X")


def test_the_trace_names_our_parts_of_the_steps_asked_for(
    store: Path, tmp_path: Path, undisturbed: FinalState
) -> None:
    run = tmp_path / "run"
    printed = forked.check(run, settings(store, 3))
    assert f"profile of 3 step(s): {run / TRACE}" in printed
    assert [path.name for path in (run / "profile").iterdir()] == [Path(TRACE).name]
    names = names_in(run / TRACE)
    for part in ("wait for cells", "forward and backward", "gradient norm", "update"):
        assert names[part] == 3
    assert any("LinearWithGradAccumulation" in name for name in names), "Megatron's operators"
    assert any("scaled_dot_product" in name for name in names)
    assert final_state(run) == undisturbed
    assert not (undisturbed.run / "profile").exists()
    assert WARM_UP_STEPS == 3


@pytest.mark.soak
def test_rank_0_writes_it(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    forked.check(run, settings(store, 3), 2)
    assert [path.name for path in (run / "profile").iterdir()] == [Path(TRACE).name]


def interrupted(_rank: int, number: signal.Signals) -> None:
    """Trouble: a signal inside the window, which begins with step 4."""
    do = partial(os.kill, os.getpid(), number)
    forked.before("geneformer_mcore.training.trainer:train_step", 5, do)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), soak(signal.SIGKILL, -9)])
def test_an_end_inside_the_window_costs_the_trace_alone(
    store: Path, tmp_path: Path, undisturbed: FinalState, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    forked.check(run, settings(store, 3), 1, interrupted, (number,), code=code)
    assert not (run / "profile").exists()
    # Another value is no other run.
    forked.check(run, settings(store, 0))
    assert final_state(run) == undisturbed


def failing(_rank: int, how: str) -> None:
    """Trouble: the trace cannot be written, or an error of ours falls into the window."""
    if how == "error":

        def fail() -> None:
            raise ValueError("a bad cell")

        forked.before("geneformer_mcore.training.trainer:train_step", 5, fail)
        return
    from torch.profiler import profile

    def cut_short(_self: profile, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    profile.export_chrome_trace = cut_short  # type: ignore[method-assign, assignment]


def test_an_error_inside_the_window_is_told_as_it_is(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    forked.check(run, settings(store, 3), 1, failing, ("error",), code=1)
    assert "ValueError: a bad cell" in forked.outcome(run)["reason"]


def test_a_trace_that_cannot_be_written_ends_no_run(
    store: Path, tmp_path: Path, undisturbed: FinalState
) -> None:
    run = tmp_path / "run"
    printed = forked.check(run, settings(store, 3), 1, failing, ("disk",))
    assert "the profile cannot be written into" in printed
    assert not list((run / "profile").iterdir())
    assert final_state(run) == undisturbed
