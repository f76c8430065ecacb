"""One file of curves for TensorBoard, written as it is told and not by a thread.

    scalar(tag, value, step) ... flush() -> tensorboard/events.out.tfevents.TIME.HOST.PID.NUMBER

torch's SummaryWriter writes the same records by a thread of its own. If a disk is full, that thread
prints a traceback, and the run hears of it one record later, or never.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

_numbers = itertools.count()
_VERSION = "brain.Event:2"
"""What TensorBoard expects the first record of a file to say."""


class EventFile:
    """A new file in `folder`. Raises OSError where it cannot be written, at once."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """first_step: what earlier files of the folder hold from there on is hidden."""
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
        """A point of the curve `tag`."""
        self._add(Event(step=step, summary=summary.scalar(tag, value)))

    def text(self, tag: str, text: str, step: int) -> None:
        """A text in Markdown."""
        shown: Summary = summary.text(tag, text)
        self._add(Event(step=step, summary=shown))

    def flush(self) -> None:
        """Hands everything to the system: a killed run loses none of it."""
        self._records.flush()

    def close(self) -> None:
        """Flushes, and closes the file."""
        self._records.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
