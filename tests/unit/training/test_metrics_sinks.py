"""Files and lines of a run: one clean curve after a restart, and the provenance of numbers."""

from __future__ import annotations

import io
import itertools
import json
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
def written(run: Path) -> Callable[..., str]:
    def write(*records: dict[str, Any] | str, **changes: Any) -> str:
        """The console of sinks that are opened, get records and messages, and are closed."""
        settings = {"total_steps": 100, "tty": False, "stream": io.StringIO()} | changes
        sinks = Sinks(run, **settings)
        try:
            for each in records:
                sinks.message(each) if isinstance(each, str) else sinks.write(each)
        finally:
            sinks.close()
        return getattr(settings["stream"], "getvalue", str)()

    return write


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


def test_records_are_in_metrics_jsonl_at_once(run) -> None:
    """Before close: a killed run has them too."""
    sinks = Sinks(run, 100, tty=False, stream=io.StringIO())
    sinks.write(training(10, loss=float("nan"), grad_norm=float("inf")))
    sinks.write(validation(10, 5.5))
    expected = [training(10, loss=None, grad_norm=None), validation(10, 5.5)]
    assert lines_of(run) == expected, "numbers that JSON does not know are null"
    sinks.close()


def test_dropping_without_a_file_makes_none(tmp_path) -> None:
    drop_later_steps(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []


def test_a_restart_leaves_one_curve(written, run) -> None:
    """In metrics.jsonl and in TensorBoard."""
    written(*map(training, (10, 20, 30)), config_text="train:\n  steps: 100")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # as a kill leaves it
    later = training(30, loss=1.0), validation(30, 4.0)
    written(*later, resume_step=20)
    assert lines_of(run) == [training(10), training(20), *later]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(10, pytest.approx(5.1)), (20, pytest.approx(5.05)), (30, 1.0)]
    assert [event.value for event in events.Scalars("val/loss")] == [4.0]
    scalars = set(events.Tags()["scalars"])
    assert {"train/grad_norm", "train/lr", "perf/cells_per_s", "perf/step_s"} <= scalars
    assert "perf/mfu" not in scalars, "an unknown number is not drawn as zero"
    assert "config/text_summary" in events.Tags()["tensors"]


def test_lines_of_a_plain_console(written) -> None:
    """The ETA counts this start only."""
    times = itertools.chain([0.0], itertools.repeat(60.0))
    shown = written(training(20), validation(20, 5.25), clock=lambda: next(times))
    assert shown.splitlines() == [
        "step  20/100  loss 5.0500  1,234.5 cells/s  98,765 tokens/s  ETA 4:00",
        "step  20/100  validation loss 5.2500",
    ]
    times = itertools.chain([0.0], itertools.repeat(10.0))
    shown = written(training(60), clock=lambda: next(times), resume_step=50)
    assert shown.rstrip().endswith("ETA 0:40")


def test_a_terminal_line_is_rewritten_and_messages_stay(written, run) -> None:
    """And the log has every printed line with the time."""
    shown = written(training(10), "one\ntwo", training(20), tty=True)
    kept = [line.split("\x1b[K")[-1] for line in shown.split("\n")]
    assert [line.split("  1,234")[0] for line in kept if line] == [
        "one", "two", "step  20/100  loss 5.0500"
    ]  # fmt: skip
    lines = [line.partition(" ") for line in (run / "log.txt").read_text().splitlines()]
    assert [line.split("  ")[0] for _, _, line in lines] == ["step", "one", "two", "step"]
    assert all(time[:2] == "20" and "T" in time for time, _, _ in lines)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_settings(run) -> None:
    run.write_text("a file in the way")
    with pytest.raises(ConfigError, match=r"run\.dir must be .*run.*bytes are free"):
        Sinks(run, total_steps=1)


def test_a_full_disk_is_reported_once(run) -> None:
    run.mkdir()
    (run / "log.txt").symlink_to("/dev/full")
    sinks = Sinks(run, 100, tty=False, stream=io.StringIO())
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


def test_the_commit_shows_changes_and_is_unknown_without_git(monkeypatch) -> None:
    answers = {"rev-parse": "0123456789ab", "status": " M setup.py"}
    with monkeypatch.context() as patched:
        patched.setattr(provenance, "_git", lambda *arguments: answers[arguments[0]])
        assert provenance.commit() == "0123456789ab+changes"
        answers["status"] = ""
        assert provenance.commit() == "0123456789ab"

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance.commit() == "unknown"
