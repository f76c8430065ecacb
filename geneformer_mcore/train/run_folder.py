"""The folder of a run: where everything lies, and how the last start of it ended.

config.yaml  metrics.jsonl  tensorboard/  checkpoints/  log.txt  outcome.json  baselines.json
skipped.jsonl (updates that were left out, if any)
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from geneformer_mcore.commands import DEFECT, FINISHED, INTERRUPTED, WRONG_INPUT
from geneformer_mcore.errors import ConfigError

_TAKE_OVER_S = 2.0
"""How long a killed process may take to give its lock back."""

_NAMES = {
    FINISHED: "finished",
    INTERRUPTED: "interrupted",
    WRONG_INPUT: "refused",
    DEFECT: "failed",
}


@dataclass(frozen=True)
class Outcome:
    """How a start of the run ended. restart: starts of this run folder before this one."""

    outcome: str
    exit_code: int
    step: int
    reason: str
    restart: int


class RunFolder:
    """Paths of a run, and its outcome.json. Only rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.step = 0
        self._restart = 0
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Makes the folder, takes its lock and clears the outcome: until `close`, that says that
        this start was killed, which is what is true if `close` is never reached.

        Raises ConfigError if the folder cannot be used, or another start is using it.
        """
        try:
            for folder in (self.path, self.checkpoints, self.path / "tensorboard"):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / ".lock")
            self._restart = self._previous().get("restart", -1) + 1
            self._write(Outcome("running", DEFECT, 0, "not ended by itself", self._restart))
        except BlockingIOError:
            raise ConfigError(
                f"another start of the run in {self.path} is still going, and two would spoil each "
                "other's checkpoints. Wait for it, stop it, or choose another run.dir."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run.dir ({self.path}) must be a folder that can be written: {error.strerror}. "
                "Choose another run.dir, or mend its permissions."
            ) from None

    def close(self, exit_code: int, reason: str) -> None:
        """Writes how this start ended, atomically. Does nothing on ranks that did not open it."""
        if self._lock is not None:
            name, line = _NAMES[exit_code], " ".join(reason.split())[:1000]
            self._write(Outcome(name, exit_code, self.step, line, self._restart))
            self._lock.close()
            self._lock = None

    def take_over(self, exit_code: int, reason: str, step: int) -> None:
        """Writes how this start ended in place of rank 0, which is lost: for the first rank that is
        left. Does nothing while rank 0 still holds the folder."""
        deadline = time.monotonic() + _TAKE_OVER_S
        while self._lock is None and time.monotonic() < deadline:
            try:
                self._lock = _locked(self.path / ".lock")
            except OSError:
                time.sleep(0.1)
        if self._lock is not None:
            self.step, self._restart = step, self._previous().get("restart", 0)
            self.close(exit_code, reason)

    def write_config(self, text: str) -> None:
        """Keeps the merged settings beside the results."""
        _replace(self.path / "config.yaml", text)

    def write_baselines(self, text: str) -> None:
        """Keeps what the loss is to be compared with."""
        _replace(self.path / "baselines.json", text)

    def write_skipped(self, record: dict[str, Any]) -> None:
        """Adds a line on an update that was left out."""
        with (self.path / "skipped.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _previous(self) -> dict[str, Any]:
        try:
            previous = json.loads((self.path / "outcome.json").read_text())
        except (OSError, ValueError):
            return {}
        return previous if isinstance(previous, dict) else {}

    def _write(self, outcome: Outcome) -> None:
        _replace(self.path / "outcome.json", json.dumps(asdict(outcome), indent=1) + "\n")


def _locked(path: Path) -> IO[str]:
    """The file, locked until it is closed or this process ends, however it ends."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _replace(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.new")
    with staging.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)
