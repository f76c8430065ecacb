"""What is written where, and that a restart leaves one clean curve."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.metrics.sinks import Sinks, drop_later_steps, duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def open_sinks(tmp_path: Path) -> Callable[..., tuple[Sinks, io.StringIO]]:
    def make(**changes: Any) -> tuple[Sinks, io.StringIO]:
        console = io.StringIO()
        settings = {"total_steps": 100, "tty": False, "stream": console} | changes
        return Sinks(tmp_path / "run", **settings), console

    return make


def training(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5.0 + 1 / step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "cells_seen": 8 * step,
        "tokens_seen": 800 * step,
        "cells_per_s": 1234.5,
        "tokens_per_s": 98765.4,
        "tflops_padded_equivalent": 0.02,
        "tflops_executed": 0.01,
        "mfu": None,
        "data_wait_fraction": 0.25,
        "step_s": 2.0,
    } | changes


def lines_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]


def curves(tmp_path: Path) -> EventAccumulator:
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    return events.Reload()


def test_records_are_in_metrics_jsonl_at_once(open_sinks, tmp_path) -> None:
    sinks, _ = open_sinks()
    sinks.write(training(10))
    sinks.write({"step": 10, "val_loss": 5.5, "val_loss_cell_mean": 5.6})
    # Before close: a killed run has them too.
    assert lines_of(tmp_path) == [
        training(10),
        {"step": 10, "val_loss": 5.5, "val_loss_cell_mean": 5.6},
    ]
    sinks.close()


def test_numbers_json_does_not_know_become_null(open_sinks, tmp_path) -> None:
    sinks, _ = open_sinks()
    sinks.write(training(1, loss=float("nan"), grad_norm=float("inf")))
    sinks.close()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert lines_of(tmp_path)[0]["loss"] is None


def test_a_restart_drops_the_lines_it_does_again(open_sinks, tmp_path) -> None:
    sinks, _ = open_sinks()
    for step in (10, 20, 30):
        sinks.write(training(step))
    sinks.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # as a kill leaves it
    sinks, _ = open_sinks(resume_step=20)
    sinks.write(training(30, loss=1.0))
    sinks.close()
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [
        (10, 5.1),
        (20, 5.05),
        (30, 1.0),
    ]


def test_dropping_without_a_file_makes_none(tmp_path) -> None:
    drop_later_steps(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_shows_one_curve_after_a_restart(open_sinks, tmp_path) -> None:
    sinks, _ = open_sinks(config_text="train:\n  steps: 100")
    for step in (10, 20, 30):
        sinks.write(training(step))
    sinks.close()
    sinks, _ = open_sinks(resume_step=20)
    sinks.write(training(30, loss=1.0))
    sinks.write({"step": 30, "val_loss": 4.0, "val_loss_cell_mean": 4.5})
    sinks.close()
    events = curves(tmp_path)
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert len(events.Scalars("train/loss")) == 3
    assert losses == pytest.approx({10: 5.1, 20: 5.05, 30: 1.0})
    assert [event.value for event in events.Scalars("val/loss")] == [4.0]
    scalars = set(events.Tags()["scalars"])
    assert {"train/grad_norm", "train/lr", "perf/cells_per_s", "perf/step_s"} <= scalars
    assert "perf/mfu" not in scalars, "an unknown number is not drawn as zero"
    assert "config/text_summary" in events.Tags()["tensors"]


def test_lines_of_a_plain_console(open_sinks) -> None:
    clock = Clock()
    sinks, console = open_sinks(clock=clock)
    clock.now = 60.0
    sinks.write(training(20))
    sinks.write({"step": 20, "val_loss": 5.25, "val_loss_cell_mean": 5.3})
    sinks.close()
    assert console.getvalue().splitlines() == [
        "step  20/100  loss 5.0500  1,234.5 cells/s  98,765 tokens/s  ETA 4:00",
        "step  20/100  validation loss 5.2500",
    ]


def test_the_eta_after_a_restart_counts_this_start_only(open_sinks) -> None:
    clock = Clock()
    sinks, console = open_sinks(clock=clock, resume_step=50)
    clock.now = 10.0
    sinks.write(training(60))
    sinks.close()
    assert console.getvalue().rstrip().endswith("ETA 0:40")


def test_a_terminal_line_is_rewritten_and_messages_stay(open_sinks) -> None:
    sinks, console = open_sinks(tty=True)
    sinks.write(training(10))
    sinks.message("saved a checkpoint")
    sinks.write(training(20))
    sinks.close()
    assert _as_shown(console.getvalue()) == ["saved a checkpoint", "step  20/100  loss 5.0500"]


def _as_shown(written: str) -> list[str]:
    """What a terminal shows in the end, cut after the loss."""
    lines = [line.split("\x1b[K")[-1] for line in written.split("\n")]
    return [line.split("  1,234")[0] for line in lines if line]


def test_the_log_has_every_printed_line_with_the_time(open_sinks, tmp_path) -> None:
    sinks, _ = open_sinks(tty=True)
    sinks.message("one\ntwo")
    sinks.write(training(10))
    sinks.close()
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.partition(" ")[2].split("  ")[0] for line in lines] == ["one", "two", "step"]
    assert all(line[:2] == "20" and "T" in line.partition(" ")[0] for line in lines)


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(ConfigError, match=r"run\.dir must be .*run.*bytes are free"):
        Sinks(tmp_path / "run", total_steps=1)


def test_a_console_that_is_gone_is_left_out(tmp_path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as console:
        sinks = Sinks(tmp_path / "run", 100, tty=False, stream=console)
        sinks.message("one")
        sinks.write(training(10))
        sinks.close()
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split(" ")[1] for line in lines] == ["the", "one", "step"]
    assert "the console cannot be written (Broken pipe)" in lines[0]


def test_what_cannot_be_written_is_told_once(open_sinks, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").symlink_to("/dev/full")
    sinks, _ = open_sinks()
    with pytest.raises(ConfigError, match=r"log\.txt cannot: No space left on device \("):
        sinks.message("one")
    sinks.close()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(7, "0:07"), (59.6, "1:00"), (3600, "1:00:00"), (90_061, "1d 1:01:01")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
