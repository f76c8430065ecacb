"""The folder of a run: where everything lies, and how the last start of it ended.

config.yaml  metrics.jsonl  tensorboard/  checkpoints/  log.txt  outcome.json  baselines.json
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import ConfigError

FINISHED, INTERRUPTED, WRONG_INPUT, DEFECT = 0, 75, 2, 1
"""Exit codes: finished; saved, start me again; the user's to mend; a defect, hang or lost rank."""

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
        self.baselines = self.path / "baselines.json"
        self.step = 0
        self._restart = 0
        self._is_open = False

    def open(self) -> None:
        """Makes the folder and clears the outcome: until `close`, it says that this start was
        killed, which is what is true if `close` is never reached."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            previous = self._previous()
            self._restart = previous.get("restart", -1) + 1
            self._write(Outcome("running", DEFECT, 0, "not ended by itself", self._restart))
            self._is_open = True
        except OSError as error:
            raise ConfigError(
                f"run.dir ({self.path}) must be a folder that can be written: {error.strerror}. "
                "Choose another run.dir, or mend its permissions."
            ) from None

    def close(self, exit_code: int, reason: str) -> None:
        """Writes how this start ended, atomically. Does nothing on ranks that did not open it."""
        if self._is_open:
            name = _NAMES[exit_code]
            self._write(Outcome(name, exit_code, self.step, reason, self._restart))

    def write_config(self, text: str) -> None:
        """Keeps the merged settings beside the results."""
        _replace(self.path / "config.yaml", text)

    def _previous(self) -> dict[str, Any]:
        try:
            previous = json.loads((self.path / "outcome.json").read_text())
        except (OSError, ValueError):
            return {}
        return previous if isinstance(previous, dict) else {}

    def _write(self, outcome: Outcome) -> None:
        _replace(self.path / "outcome.json", json.dumps(asdict(outcome), indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.new")
    with staging.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)
