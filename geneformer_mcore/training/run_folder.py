"""The run directory: its files, and the outcome of its last start.

config.yaml  metrics.jsonl  tensorboard/  checkpoints/  log.txt  outcome.json  baselines.json
skipped.jsonl (updates that were left out, if any)  profile/ (if train.profile_steps)
labels.json (of fine-tuning: the classes, instead of baselines.json)
"""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.exit_codes import DEFECT, FINISHED, INTERRUPTED, WRONG_INPUT
from geneformer_mcore.io.files import holder, lock_file, replacing, unwritable, writing
from geneformer_mcore.io.schema import as_type, read_json
from geneformer_mcore.store.layout import VOCABULARY_FILE
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

_TAKE_OVER_S = 2.0
"""Time for a killed process' lock to be released."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_RUNNING = "running"
_NAMES = {
    FINISHED: "finished",
    INTERRUPTED: "interrupted",
    WRONG_INPUT: "refused",
    DEFECT: "failed",
}


@dataclass(frozen=True)
class Outcome:
    """How a start of the run ended. restart: number of earlier starts."""

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
        self._outcome = self.path / "outcome.json"
        self._restart = 0
        self._lock: IO[bytes] | None = None

    def open(self) -> None:
        """Create the folder, take its lock, and write an outcome that holds if `close` is never
        reached: this start was killed. Raises ConfigError if the folder cannot be used, or another
        start is using it."""
        path = self.path
        try:
            for path in (self.path, self.checkpoints, self.path / "tensorboard"):
                path.mkdir(parents=True, exist_ok=True)
            path = self.path / ".lock"
            self._lock = lock_file(path)
            # An unfinished save may be what fills the disk.
            checkpoints.clear(self.checkpoints)
            path = self._outcome
            self._restart = self._previous().get("restart", -1) + 1
            self.step = max(checkpoints.steps(self.checkpoints), default=0)
            self._write(Outcome(_RUNNING, DEFECT, self.step, "not ended by itself", self._restart))
        except BlockingIOError:
            raise ConfigError(
                f"another start of the run in {self.path} is still going: {holder(path)}. Two "
                "would spoil each other's checkpoints. Wait for it, stop it, or choose another "
                "run.dir."
            ) from None
        except OSError as error:
            raise unwritable(path, error) from None

    def close(self, exit_code: int, reason: str) -> None:
        """Write the outcome, atomically, on the rank that opened it. Raises ConfigError."""
        if self._lock is None:
            return
        name, line = _NAMES[exit_code], " ".join(reason.split())[:1000]
        outcome = Outcome(name, exit_code, self.step, line, self._restart)
        lock, self._lock = self._lock, None
        with lock, writing(self._outcome):
            try:
                self._write(outcome)
            except OSError as error:
                if error.errno not in _NO_ROOM or not self._outcome.exists():
                    raise
                # On a full disk: the existing file has a block.
                with self._outcome.open("r+", encoding="utf-8") as file:
                    file.write(_text_of(outcome))
                    file.flush()
                    file.truncate()
                    os.fsync(file.fileno())

    def take_over(self, exit_code: int, reason: str, step: int) -> None:
        """Write the outcome in place of rank 0, which is lost, on the first rank that is left;
        nothing while rank 0 still holds the folder, or after it wrote the outcome itself."""
        deadline = time.monotonic() + _TAKE_OVER_S
        while self._lock is None and time.monotonic() < deadline:
            try:
                self._lock = lock_file(self.path / ".lock")
            except OSError:
                time.sleep(0.1)
        if self._lock is None:
            return
        previous = self._previous()
        if previous.get("outcome", _RUNNING) != _RUNNING:
            self._lock.close()
            self._lock = None
            return
        self.step, self._restart = step, previous.get("restart", 0)
        self.close(exit_code, reason)

    def write_config(self, text: str) -> None:
        """Keep the merged settings. Raises ConfigError where it cannot, as the following do."""
        self._keep("config.yaml", text)

    def write_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Keep the vocabulary, so that the folder can be used without its store."""
        path = self.path / VOCABULARY_FILE
        if vocabulary.is_saved(path):  # by an earlier start, which this one continues
            return
        try:
            vocabulary.save(path)
        except DataError as error:
            raise ConfigError(f"{error} Then start the same command again.") from error

    def write_baselines(self, text: str) -> None:
        self._keep("baselines.json", text)

    def write_labels(self, text: str) -> None:
        self._keep("labels.json", text)

    def _keep(self, name: str, text: str) -> None:
        with writing(self.path / name):
            _replace(self.path / name, text)

    def write_skipped(self, record: dict[str, Any]) -> None:
        path = self.path / "skipped.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _previous(self) -> dict[str, Any]:
        try:
            path = self._outcome
            return asdict(as_type(read_json(path, "remove it"), Outcome, path, "remove it"))
        except DataError:
            return {}

    def _write(self, outcome: Outcome) -> None:
        _replace(self._outcome, _text_of(outcome))


def _text_of(outcome: Outcome) -> str:
    return json.dumps(asdict(outcome), indent=1) + "\n"


def _replace(path: Path, text: str) -> None:
    # Alone, by the lock: a killed start leaves nothing to the next one.
    with replacing(path, durable=True, alone=True) as partial:
        partial.write_text(text, encoding="utf-8")
