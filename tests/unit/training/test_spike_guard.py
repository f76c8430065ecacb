"""Skipped updates, and when they end a run."""

from __future__ import annotations

import json
import math

import pytest

from geneformer_mcore.config.sections import NonFinite, Precision, TrainConfig
from geneformer_mcore.training.spike_guard import SpikeGuard, TooManySkippedUpdatesError

NAN, INF = math.nan, math.inf


def guard(**settings: object) -> SpikeGuard:
    return SpikeGuard(TrainConfig(**settings))  # type: ignore[arg-type]


LOSS, NORM = "the loss is not finite", "the gradient norm is not finite"


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [(6.0, 1.0, ""), (0.0, 0.0, ""),  # nothing predicted anywhere
     (NAN, 0.0, LOSS), (NAN, 1.0, LOSS), (INF, 1.0, LOSS), (6.0, NAN, NORM), (6.0, INF, NORM)],
)  # fmt: skip
def test_updates_that_are_not_finite_are_skipped(loss: float, norm: float, reason: str) -> None:
    assert guard().reason(loss, norm) == reason


def filled(sigma: float = 4.0, window: int = 10) -> SpikeGuard:
    """Losses 6 +- 0.1, norms 1 +- 0.1, both with a standard deviation of 0.1."""
    made = guard(spike_sigma=sigma, spike_window=window)
    for number in range(window):
        sign = -1 if number % 2 else 1
        assert made.reason(60.0, 1.0) == "", "no spike before the window is full"
        made.made(6 + sign * 0.1, 1 + sign * 0.1)
    return made


def test_a_spike_lies_far_above_the_recent_mean() -> None:
    made = filled()
    assert made.reason(6.39, 1.39) == ""
    assert "the loss is a spike, 4.1 standard deviations above" in made.reason(6.41, 1.0)
    assert "the gradient norm is a spike, 10.0 standard" in made.reason(6.0, 2.0)
    assert made.reason(1.0, 0.0) == "", "a low value is no spike"
    assert filled(sigma=0).reason(600.0, 100.0) == ""


def test_skipped_updates_do_not_move_the_window() -> None:
    made = filled()
    for _ in range(5):
        assert made.reason(9.0, 1.0)
        made.left_out("step 3", 6.0, 1.0)
    assert made.reason(6.0, 1.0) == ""
    assert (made.skipped, made.in_a_row) == (5, 5)
    made.made(6.0, 1.0)
    assert (made.skipped, made.in_a_row) == (5, 0)


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (6.0, INF)])
def test_the_policy_stop_ends_the_run_at_once(loss: float, norm: float) -> None:
    with pytest.raises(TooManySkippedUpdatesError, match=r"step 3\. train\.non_finite=skip would"):
        guard(non_finite=NonFinite.stop).left_out("step 3", loss, norm)
    guard(non_finite=NonFinite.stop).left_out("step 3", 6.0, 1.0)  # a spike


def test_an_overflow_of_a_scaled_gradient_is_no_reason_to_stop() -> None:
    made = guard(non_finite=NonFinite.stop, precision=Precision.fp16, max_skips=2)
    made.left_out("step 3", 6.0, INF)
    with pytest.raises(TooManySkippedUpdatesError, match="non_finite"):
        made.left_out("step 4", NAN, INF)
    made.made(6.0, 1.0)
    for norm in (INF, NAN):
        made.left_out("a", 6.0, norm)
    with pytest.raises(TooManySkippedUpdatesError, match="number 3 in a row"):
        made.left_out("c", 6.0, INF)


def test_skips_in_a_row_are_bounded() -> None:
    made = guard(non_finite=NonFinite.skip, max_skips=2)
    for _ in range(4):
        made.made(6.0, 1.0)
        for step in ("a", "b"):
            made.left_out(step, NAN, 1.0)
    message = r"c\. It is number 3 in a row.*max_skips is 2"
    with pytest.raises(TooManySkippedUpdatesError, match=message):
        made.left_out("c", NAN, 1.0)
    assert made.skipped == 9


def test_a_run_must_learn_something() -> None:
    made = guard(non_finite=NonFinite.skip)
    made.check_learned(0)
    made.left_out("step 1", NAN, 1.0)
    with pytest.raises(TooManySkippedUpdatesError, match="all 1 updates were left out"):
        made.check_learned(1)
    made.made(6.0, 1.0)
    made.check_learned(2)


def test_its_state_goes_through_json() -> None:
    made = filled()
    made.left_out("step 3", 6.0, 1.0)
    again = guard(spike_sigma=4.0, spike_window=10)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.state_dict() == made.state_dict()
    assert again.reason(6.41, 1.0) == made.reason(6.41, 1.0) != ""
    shorter = guard(spike_sigma=4.0, spike_window=8)
    shorter.load_state_dict(made.state_dict())
    assert shorter.state_dict()["recent"]["loss"] == made.state_dict()["recent"]["loss"][2:]
