"""Files and lines of a run: one clean curve after a restart, and the provenance of numbers."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.metrics import provenance
from geneformer_mcore.metrics.sinks import Sinks, drop_later_steps, duration


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def open_sinks(run: Path) -> Callable[..., tuple[Sinks, io.StringIO]]:
    def make(**changes: Any) -> tuple[Sinks, io.StringIO]:
        console = io.StringIO()
        settings = {"total_steps": 100, "tty": False, "stream": console} | changes
        return Sinks(run, **settings), console

    return make


def training(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step, "loss": 5.0 + 1 / step, "grad_norm": 1.0, "lr": 1e-3, "mfu": None,
        "cells_seen": 8 * step, "tokens_seen": 800 * step, "step_s": 2.0,
        "cells_per_s": 1234.5, "tokens_per_s": 98765.4, "data_wait_fraction": 0.25,
        "tflops_padded_equivalent": 0.02, "tflops_executed": 0.01,
    } | changes  # fmt: skip


def validation(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "val_loss": loss, "val_loss_cell_mean": loss + 0.1}


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_records_are_in_metrics_jsonl_at_once(open_sinks, run) -> None:
    sinks, _ = open_sinks()
    sinks.write(training(10))
    sinks.write(validation(10, 5.5))
    # Before close: a killed run has them too.
    assert lines_of(run) == [training(10), validation(10, 5.5)]
    sinks.close()


def test_numbers_json_does_not_know_become_null(open_sinks, run) -> None:
    sinks, _ = open_sinks()
    sinks.write(training(1, loss=float("nan"), grad_norm=float("inf")))
    sinks.close()
    assert lines_of(run) == [training(1, loss=None, grad_norm=None)]


def test_dropping_without_a_file_makes_none(tmp_path) -> None:
    drop_later_steps(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_restart_leaves_one_curve(open_sinks, run) -> None:
    """In metrics.jsonl and in TensorBoard."""
    sinks, _ = open_sinks(config_text="train:\n  steps: 100")
    for step in (10, 20, 30):
        sinks.write(training(step))
    sinks.close()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # as a kill leaves it
    sinks, _ = open_sinks(resume_step=20)
    sinks.write(training(30, loss=1.0))
    sinks.write(validation(30, 4.0))
    sinks.close()
    assert lines_of(run) == [
        training(10), training(20), training(30, loss=1.0), validation(30, 4.0)
    ]  # fmt: skip
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(10, pytest.approx(5.1)), (20, pytest.approx(5.05)), (30, 1.0)]
    assert [event.value for event in events.Scalars("val/loss")] == [4.0]
    scalars = set(events.Tags()["scalars"])
    assert {"train/grad_norm", "train/lr", "perf/cells_per_s", "perf/step_s"} <= scalars
    assert "perf/mfu" not in scalars, "an unknown number is not drawn as zero"
    assert "config/text_summary" in events.Tags()["tensors"]


def test_lines_of_a_plain_console(open_sinks) -> None:
    now = [0.0]
    sinks, console = open_sinks(clock=lambda: now[0])
    now[0] = 60.0
    sinks.write(training(20))
    sinks.write(validation(20, 5.25))
    sinks.close()
    assert console.getvalue().splitlines() == [
        "step  20/100  loss 5.0500  1,234.5 cells/s  98,765 tokens/s  ETA 4:00",
        "step  20/100  validation loss 5.2500",
    ]


def test_the_eta_after_a_restart_counts_this_start_only(open_sinks) -> None:
    now = [0.0]
    sinks, console = open_sinks(clock=lambda: now[0], resume_step=50)
    now[0] = 10.0
    sinks.write(training(60))
    sinks.close()
    assert console.getvalue().rstrip().endswith("ETA 0:40")


def test_a_terminal_line_is_rewritten_and_messages_stay(open_sinks) -> None:
    sinks, console = open_sinks(tty=True)
    sinks.write(training(10))
    sinks.message("saved a checkpoint")
    sinks.write(training(20))
    sinks.close()
    shown = [line.split("\x1b[K")[-1] for line in console.getvalue().split("\n")]
    assert [line.split("  1,234")[0] for line in shown if line] == [
        "saved a checkpoint",
        "step  20/100  loss 5.0500",
    ]


def test_the_log_has_every_printed_line_with_the_time(open_sinks, run) -> None:
    sinks, _ = open_sinks(tty=True)
    sinks.message("one\ntwo")
    sinks.write(training(10))
    sinks.close()
    lines = (run / "log.txt").read_text().splitlines()
    assert [line.partition(" ")[2].split("  ")[0] for line in lines] == ["one", "two", "step"]
    assert all(line[:2] == "20" and "T" in line.partition(" ")[0] for line in lines)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_settings(run) -> None:
    run.write_text("a file in the way")
    with pytest.raises(ConfigError, match=r"run\.dir must be .*run.*bytes are free"):
        Sinks(run, total_steps=1)


def test_a_console_that_is_gone_is_skipped(run) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as console:
        sinks = Sinks(run, 100, tty=False, stream=console)
        sinks.message("one")
        sinks.write(training(10))
        sinks.close()
    lines = (run / "log.txt").read_text().splitlines()
    assert [line.split(" ")[1] for line in lines] == ["the", "one", "step"]
    assert "the console cannot be written (Broken pipe)" in lines[0]


def test_a_full_disk_is_reported_once(open_sinks, run) -> None:
    run.mkdir()
    (run / "log.txt").symlink_to("/dev/full")
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


def test_provenance_names_machine_versions_and_commit() -> None:
    """And neither a path nor a host."""
    found = provenance.provenance()
    assert set(found) == {"machine", "versions", "commit"}
    assert "cores" in found["machine"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["megatron-core"] == "0.16.1"
    assert platform.node() not in json.dumps(found)
    assert str(provenance.PROJECT) not in json.dumps(found)


def test_the_commit_shows_changes(monkeypatch) -> None:
    answers = {"rev-parse": "0123456789ab", "status": " M setup.py"}
    monkeypatch.setattr(provenance, "_git", lambda *arguments: answers[arguments[0]])
    assert provenance.commit() == "0123456789ab+changes"
    answers["status"] = ""
    assert provenance.commit() == "0123456789ab"


def test_without_git_the_commit_is_unknown(monkeypatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance.commit() == "unknown"
