"""A trace of the operators of a few steps, written by rank 0 while the others wait.

step 1 2 3 (warm-up of this start)  ->  profile_steps steps, recorded  ->  RUN/profile/
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from geneformer_mcore.distributed import collectives
from geneformer_mcore.io.files import replacing

WARM_UP_STEPS = 3
"""Steps that are not recorded: they compile kernels and allocate memory."""
_MEMORY_EVENTS = 100_000
_END_BYTES = 64


class Profile:
    """The recorded steps; a context manager around the loop. Its errors are logged only."""

    def __init__(
        self,
        folder: Path,
        num_steps: int,
        rank: int,
        device: torch.device,
        log: Callable[[str], None],
    ) -> None:
        """folder: to write into; num_steps: 0 records nothing"""
        self._folder, self._num_steps = folder, num_steps
        self._records, self._on_gpu, self._log = rank == 0, device.type == "cuda", log
        self._begun = 0
        self._profiler: profile | None = None

    def before_step(self) -> None:
        self._begun += 1
        if not self._records or not self._num_steps or self._begun != WARM_UP_STEPS + 1:
            return
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        # Without acc_events torch warns that a later cycle would clear them; there is none.
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()

    @property
    def is_complete(self) -> bool:
        """Whether the last step to record has ended; the same on every rank."""
        return self._num_steps > 0 and self._begun == WARM_UP_STEPS + self._num_steps

    def write(self, last_step: int) -> None:
        """Write the trace of the steps up to `last_step`. All ranks call it."""
        recorder, self._profiler = self._profiler, None
        if recorder is not None:
            name = f"step_{last_step - self._num_steps + 1:010d}_to_{last_step:010d}"
            try:
                recorder.stop()
                self._log(f"profile of {self._num_steps} step(s): {self._written(recorder, name)}")
            except (OSError, RuntimeError) as error:  # a full disk, in torch's words
                self._log(f"the profile cannot be written into {self._folder}: {error}")
            self._forget_memory()
        collectives.barrier()

    def _written(self, recorder: profile, name: str) -> Path:
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / f"trace_{name}.json"
        with replacing(trace, alone=True) as partial:
            recorder.export_chrome_trace(str(partial))
            _check_whole(partial)
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_{name}.pickle"))
        return trace

    def _forget_memory(self) -> None:
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profiler is not None:
            with contextlib.suppress(RuntimeError):
                self._profiler.stop()
                self._forget_memory()


def _check_whole(partial: Path) -> None:
    """Raise OSError for a truncated trace: torch ignores a full disk."""
    with partial.open("rb") as file:
        file.seek(max(0, partial.stat().st_size - _END_BYTES))
        whole = file.read().rstrip().endswith(b"}")
    if not whole:
        raise OSError("it came out cut short, as on a disk that is full")
