"""Sinks of records and messages: console, log.txt, metrics.jsonl, TensorBoard. Rank 0 only.

                  .-> metrics.jsonl   one JSON object per line, flushed
    record ------ +-> tensorboard/    train/*, val/*, perf/*
                  '-> progress line --> console (rewritten in place on a terminal)
    message ------------------------'-> log.txt (every printed line, with the time)

After a restart from step k, later steps are removed from metrics.jsonl and hidden in TensorBoard.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.io.files import replacing, writing
from geneformer_mcore.io.schema import parse_json

_numbers = itertools.count()
_VERSION = "brain.Event:2"
"""Of the first record of a file."""


class EventFile:
    """A new event file in `folder`, written at once and not by a thread, as torch's SummaryWriter,
    whose thread would hide a full disk from the run. Raises OSError."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: steps of earlier files from there on are hidden."""
        folder.mkdir(parents=True, exist_ok=True)
        unique = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path = folder / f"events.out.tfevents.{unique}"
        self._file = self.path.open("wb")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version=_VERSION))
        self._add(Event(step=first_step, file_version=_VERSION))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._add(Event(step=step, summary=summary.scalar(tag, value)))

    def text(self, tag: str, text: str, step: int) -> None:
        shown: Summary = summary.text(tag, text)
        self._add(Event(step=step, summary=shown))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


TENSORBOARD_TAGS = {
    key: f"{group}/{key.removeprefix('val_')}"
    for group, keys in (
        ("train", ("loss", "grad_norm", "lr")),
        ("val", ("val_loss", "val_loss_cell_mean", "val_accuracy", "val_macro_f1")),
        ("perf", ("cells_per_s", "tokens_per_s", "tflops_padded_equivalent", "tflops_executed")),
        ("perf", ("mfu", "data_wait_fraction", "step_s")),
    )
    for key in keys
}
"""Key of a record -> name of the curve."""

CLEAR_LINE = "\r\x1b[K"


class Sinks:
    """Writes every record and message to all sinks. Raises ConfigError where a file cannot be
    written; a console that is gone is skipped.

    total_steps, resume_step   for the progress line
    config_text   config.yaml, shown in TensorBoard
    tty           whether the console rewrites lines; None asks it
    clock         seconds, for the ETA
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        resume_step: int = 0,
        config_text: str = "",
        tty: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self._start_step = resume_step
        self._stream = sys.stdout if stream is None else stream
        self._tty = self._stream.isatty() if tty is None else tty
        self._progress_shown = False
        self._clock = clock
        self._started = clock()
        self._failed = False
        self._paths = {name: run_dir / name for name in ("metrics.jsonl", "log.txt", "tensorboard")}
        with self._writing("metrics.jsonl") as path:
            run_dir.mkdir(parents=True, exist_ok=True)
            drop_later_steps(path, resume_step)
            self._metrics = path.open("a", encoding="utf-8")
        with self._writing("log.txt") as path:
            self._log = path.open("a", encoding="utf-8")
        with self._writing("tensorboard") as path:
            self._tensorboard = EventFile(path, resume_step + 1)
            self._tensorboard.text("config", f"```yaml\n{config_text}\n```", resume_step)
            self._tensorboard.flush()

    def write(self, record: dict[str, Any]) -> None:
        """A record of Meter, or of a validation: a dict with `step` and either `loss` or
        `val_loss`. Numbers that are not finite become null in metrics.jsonl."""
        clean = {key: _finite_or_none(value) for key, value in record.items()}
        with self._writing("metrics.jsonl"):
            self._metrics.write(json.dumps(clean) + "\n")
            self._metrics.flush()
        with self._writing("tensorboard"):
            for key, tag in TENSORBOARD_TAGS.items():
                if clean.get(key) is not None:
                    self._tensorboard.scalar(tag, clean[key], clean["step"])
            # A killed run must not lose its last minutes: records are seconds apart at least.
            self._tensorboard.flush()
        if "val_loss" in clean:
            self.message(self._validation_line(clean))
        else:
            self._progress(self._progress_line(clean))

    def message(self, text: str) -> None:
        """Prints `text` on a line of its own, and into log.txt."""
        # Step back over the progress line; the next record shows it again.
        self._show((CLEAR_LINE if self._progress_shown else "") + f"{text}\n")
        self._progress_shown = False
        self._to_log(text)

    def close(self) -> None:
        if self._progress_shown:
            self._show("\n")
            self._progress_shown = False
        for name, file in (
            ("metrics.jsonl", self._metrics),
            ("log.txt", self._log),
            ("tensorboard", self._tensorboard),
        ):
            # A file that failed cannot be flushed either, and was reported.
            with contextlib.suppress(OSError) if self._failed else self._writing(name):
                file.close()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """The path of a file of the run, for writing."""
        try:
            with writing(self._paths[name]):
                yield self._paths[name]
        except ConfigError:
            self._failed = True
            raise

    def _show(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _progress(self, line: str) -> None:
        self._show(CLEAR_LINE + line if self._tty else f"{line}\n")
        self._progress_shown = self._tty
        self._to_log(line)

    def _to_log(self, text: str) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        with self._writing("log.txt"):
            self._log.write("".join(f"{now} {line}\n" for line in text.splitlines() or [""]))
            self._log.flush()

    def _progress_line(self, record: dict[str, Any]) -> str:
        loss = "-" if record["loss"] is None else f"{record['loss']:.4f}"
        return (
            f"{self._step_of(record)}  loss {loss}  {record['cells_per_s']:,.1f} cells/s  "
            f"{record['tokens_per_s']:,.0f} tokens/s  ETA {self._eta(record['step'])}"
        )

    def _validation_line(self, record: dict[str, Any]) -> str:
        loss = "-" if record["val_loss"] is None else f"{record['val_loss']:.4f}"
        line = f"{self._step_of(record)}  validation loss {loss}"
        if "val_accuracy" in record:
            line += (
                f"  accuracy {record['val_accuracy']:.2%}  macro F1 {record['val_macro_f1']:.4f}"
            )
        return line

    def _step_of(self, record: dict[str, Any]) -> str:
        return f"step {record['step']:{len(str(self.total_steps))}}/{self.total_steps}"

    def _eta(self, step: int) -> str:
        """Time left at the mean speed of this start, validation and saving included."""
        done = step - self._start_step
        if done <= 0:
            return "-"
        seconds = (self._clock() - self._started) / done * (self.total_steps - step)
        return duration(seconds)


def duration(seconds: float) -> str:
    """`7 s` as 0:07, an hour as 1:00:00, two days as 2d 0:00:00."""
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    clock = f"{hours}:{minutes:02}:{rest:02}" if days or hours else f"{minutes}:{rest:02}"
    return f"{days}d {clock}" if days else clock


def drop_later_steps(path: Path, step: int) -> None:
    """Remove from a metrics.jsonl, atomically, lines after `step` and one truncated by a kill."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_in(line) <= step]
    with replacing(path, durable=True, alone=True) as partial:
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step_in(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for a truncated line."""
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf


def _finite_or_none(value: Any) -> Any:
    # JSON has no NaN and no infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
