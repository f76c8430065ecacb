"""Checkpoints of a run: saved one at a time, and the room they take.

    begin      staging folder -> plan -> is there room? -> a copy of the state
    writing    every rank its files, in a thread
    proceed    once all have: the description of the whole
    committing rank 0, in a thread: manifest, fsync, rename, old ones removed

With `checkpoint.asynchronous` training goes on in between, and all ranks proceed together when all
are ready; without it begin is followed by finish. Only a complete checkpoint gets its name.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint.record import Record, best_step
from geneformer_mcore.checkpoint.state import Snapshot
from geneformer_mcore.config.sections import CheckpointConfig, Config, Precision
from geneformer_mcore.distributed import collectives
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.io.files import is_write_failure
from geneformer_mcore.model.flops import ModelShape, num_parameters
from geneformer_mcore.optim.optimizer import Trainable
from geneformer_mcore.types import padded_vocabulary_size

_LOOK_S = 0.005
SPARE_BYTES = 1 << 20
"""For random states, descriptions, the manifest."""
OPTIMIZER_BYTES = 12
"""Per parameter: fp32 master weight and two fp32 moments."""
_RANDOM_BYTES = 32_768
"""A rank's file of random states, at most."""


class SaveDeadlineError(RuntimeError):
    """A checkpoint was not written within checkpoint.deadline_s seconds."""


class CheckpointManager:
    """Saves checkpoints; all ranks make the same calls in the same order."""

    def __init__(
        self,
        root: Path,
        settings: CheckpointConfig,
        rank: int,
        device: torch.device,
        log: Callable[[str], None],
    ) -> None:
        """root: the folder of checkpoints;  log: logs a line"""
        self._root = root
        self._asynchronous, self._deadline_s = settings.asynchronous, settings.deadline_s
        self._keep_last, self._keep_every = settings.keep_last, settings.keep_every
        self._keep_best = settings.keep_best
        self._rank, self._device, self._log = rank, device, log
        self._step = 0
        self._began = 0.0
        self._snapshot: Snapshot | None = None
        self._thread: _Caught | None = None

    @property
    def is_going_on(self) -> bool:
        """Whether a checkpoint was begun and is not committed, on every rank."""
        return self._thread is not None

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing. Raises SaveDeadlineError after the deadline."""
        if self._thread is None or not self._thread.is_alive():
            return False
        limit = self._deadline_s
        if time.monotonic() - self._began > limit:
            raise SaveDeadlineError(
                f"the checkpoint of step {self._step} was not written within {limit} s "
                f"(checkpoint.deadline_s): {self._root} answers too slowly, or not at all. The "
                "newest complete checkpoint stays as it was."
            )
        return True

    def begin(self, trainable: Trainable, record: Record) -> None:
        """Copy the state. Raises CheckpointError on every rank if there is no room for it."""
        self.finish()
        self._step, self._began = record.step, time.monotonic()
        staging = self._root / f".staging_step_{record.step:010d}"
        self._by_first_rank(lambda: checkpoints.make_staging(self._root, record.step))
        # Megatron writes a small file before the size is known.
        self._by_first_rank(lambda: self._check_room(SPARE_BYTES, "more than"))
        with self._as_users_error():
            self._snapshot = Snapshot(trainable, staging, self._rank, self._asynchronous)
        needed = collectives.total(self._snapshot.num_bytes, self._device) + SPARE_BYTES
        self._by_first_rank(lambda: self._check_room(needed, "about"))
        self._by_first_rank(lambda: record.save(staging))
        self._thread = _Caught(self._snapshot.write)
        if not self._asynchronous:
            self.finish()

    def proceed(self) -> None:
        """Take the next step, once no rank is busy."""
        assert self._thread is not None
        failures = [each for each in collectives.from_all_ranks(self._thread.failure) if each]
        if failures:
            self._snapshot = self._thread = None
            self._by_first_rank(lambda: checkpoints.clear(self._root))
            raise CheckpointError(self._cannot(failures[0]))
        if self._snapshot is not None:
            written = collectives.from_all_ranks(self._snapshot.files)
            with self._as_users_error():
                self._snapshot.describe()
            self._snapshot = None
            commit = partial(self._commit, written)
            self._thread = _Caught(commit if self._rank == 0 else lambda: None)
        else:
            self._thread = None
            self._log(f"saved {checkpoints.step_folder(self._root, self._step)}")

    def finish(self) -> None:
        """Wait until the checkpoint is committed."""
        while self.is_going_on:
            if collectives.any_rank(self.is_busy, self._device):
                time.sleep(_LOOK_S)
            else:
                self.proceed()

    def _commit(self, written: list[dict[str, int]]) -> None:
        """written: {name: bytes} of each rank's files"""
        root = self._root
        staging = root / f".staging_step_{self._step:010d}"
        for rank, files in enumerate(written):
            for name, size in files.items():
                path = staging / name
                if not path.is_file() or path.stat().st_size != size:
                    raise OSError(
                        errno.ENOENT,
                        f"rank {rank} has written {name}, and rank 0 does not see it: run.dir must "
                        "be one folder, shared by all nodes",
                    )
        checkpoints.commit(staging, root, self._step)
        best = None
        if self._keep_best:
            best = best_step(checkpoints.steps(root), partial(checkpoints.step_folder, root))
        checkpoints.retain(root, self._keep_last, self._keep_every, best)

    @contextlib.contextmanager
    def _as_users_error(self) -> Iterator[None]:
        """Rank 0 writes small files of its own within calls that all ranks make together: if it
        cannot, the watchdog informs the others."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(self._cannot(_reason(error))) from error
        except RuntimeError as error:
            if not is_write_failure(error):
                raise
            raise CheckpointError(self._cannot(str(error))) from error

    def _check_room(self, needed: int, about: str) -> None:
        free = shutil.disk_usage(self._root).free
        if free < needed:
            missing = (
                f"it takes {about} {needed:,} bytes, {free:,} are free, {needed - free:,} missing"
            )
            raise OSError(errno.ENOSPC, missing)

    def _by_first_rank(self, do: Callable[[], object]) -> None:
        """Call `do` on rank 0; all ranks get its error."""
        problem = ""
        if self._rank == 0:
            try:
                do()
            except OSError as error:
                problem = _reason(error)
                with contextlib.suppress(OSError):
                    checkpoints.clear(self._root)
        problem = collectives.from_first_rank(problem)
        if problem:
            self._snapshot = self._thread = None
            raise CheckpointError(self._cannot(problem))

    def _cannot(self, why: str) -> str:
        steps = checkpoints.steps(self._root)
        kept = "there is none yet"
        if steps:
            kept = f"the newest checkpoint, step {steps[-1]}, stays as it was"
        return (
            f"the checkpoint of step {self._step} cannot be written into {self._root}: {why}; "
            f"{kept}. Remedy: make room or fix the folder, and start the same command again."
        )


class _Caught(threading.Thread):
    """A running thread and its error."""

    def __init__(self, do: Callable[[], object]) -> None:
        # A daemon: a disk that does not answer must not keep the process from ending.
        super().__init__(name="checkpoint", daemon=True)
        self._do = do
        self.failure = ""
        self.start()

    def run(self) -> None:
        try:
            self._do()
        except OSError as error:
            self.failure = _reason(error)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"


def _reason(error: OSError) -> str:
    usual = os.strerror(error.errno) if error.errno else "error"
    more = error.strerror if error.strerror not in (None, usual) else error.filename
    return f"{usual} ({more})" if more else usual


def bytes_of_tensors(config: Config, vocabulary_size: int) -> int:
    """Bytes of all tensors of one checkpoint, in any layout."""
    shape = ModelShape.of(config.model, padded_vocabulary_size(vocabulary_size))
    weight_bytes = 4 if config.train.precision is Precision.fp32 else 2
    return num_parameters(shape, config.data.seq_length) * (weight_bytes + OPTIMIZER_BYTES)


def bytes_of_one(config: Config, vocabulary_size: int, world_size: int) -> int:
    """Bytes of one checkpoint, at most."""
    return bytes_of_tensors(config, vocabulary_size) + SPARE_BYTES + world_size * _RANDOM_BYTES


def most_at_once(config: Config) -> int:
    """Upper bound of checkpoints at one time, with the one being written."""
    settings, steps = config.checkpoint, config.train.steps
    every = 0
    if settings.keep_every:
        every = steps // math.lcm(settings.keep_every, settings.save_every_steps or 1)
    best = int(settings.keep_best and config.train.validate_every_steps > 0)
    return settings.keep_last + best + every + 1


def bytes_there(root: Path) -> int:
    """Bytes of the existing checkpoints."""
    folders = [checkpoints.step_folder(root, step) for step in checkpoints.steps(root)]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)
