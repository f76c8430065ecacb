"""Weights, moments and random states of all ranks, to and from a folder.

stages + optimizer -> sharded description -> dist_checkpointing -> files that fit every layout
random states      -> random/rank_00000.npz, for the same layout only
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from geneformer_mcore.checkpoint import safe_metadata
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.optim import optimizer as optim

_METADATA = {
    # The layer's number is part of a parameter's name, whichever stage holds it.
    "non_homogeneous_layers": True,
    # The one format of the sharded optimizer that loads under another layout.
    "distrib_optim_sharding_type": "fully_reshardable",
}
_EXTRA_STATE = "_extra_state"
"""Megatron's linears keep it for fp8; empty here, and in files it would be a pickle."""


class Snapshot:
    """A copy of this rank's state, to be written into `folder`.

    Snapshot(...)   all ranks together: who writes what  ->  num_bytes
    write()         each by itself, in any thread        ->  files, on the disk
    describe()      all together, once all have written  ->  torch's .metadata
    """

    def __init__(
        self, trainable: optim.Trainable, folder: Path, rank: int, training_goes_on: bool
    ) -> None:
        """training_goes_on: while `write` runs, so that tensors on the CPU must be copied."""
        self._folder, self._rank = folder, rank
        trainable.complete_weights()
        with _written_by_this_process():
            self._request = dist_checkpointing.save(
                _description(trainable, is_loading=False), str(folder), async_sharded_save=True
            )
        # From a GPU this copies; on a CPU it returns the tensors themselves.
        buckets = self._request.preload_fn() if self._request.preload_fn else []
        if training_goes_on and not torch.cuda.is_available():
            buckets = [_copied(bucket) for bucket in buckets]
        self._buckets = buckets
        self._paths = [_random_file(folder, rank), *(Path(path) for path, _, _ in buckets)]
        self._random_states = _random_states()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that this rank writes."""
        return sum(
            tensor.numel() * tensor.itemsize
            for _, _, (_, tensors) in self._buckets
            for _, tensor in tensors
        )

    @property
    def files(self) -> dict[str, int]:
        """{name within the folder: bytes} of what this rank has written, as it sees it."""
        return {
            path.relative_to(self._folder).as_posix(): path.stat().st_size for path in self._paths
        }

    def write(self) -> None:
        _write_random_states(self._random_states, self._folder, self._rank)
        if self._request.async_fn is not None:
            results = self._request.async_fn_args[2]
            self._request.async_fn(self._rank, self._buckets, results)
            self._buckets = []
            # Megatron's writer returns errors: raise them here.
            outcome = results.get_nowait()
            if isinstance(outcome, Exception):
                raise outcome
            results.put(outcome)

    def describe(self) -> None:
        """Write torch's description: which part of which tensor is in which file."""
        for finish in self._request.finalize_fns:
            finish()


def _copied(bucket: tuple) -> tuple:
    path, key, (objects, tensors) = bucket
    return path, key, (objects, [(item, tensor.clone()) for item, tensor in tensors])


def save(trainable: optim.Trainable, folder: Path, rank: int) -> None:
    """Write this rank's part into `folder` now; all ranks call it together."""
    snapshot = Snapshot(trainable, folder, rank, training_goes_on=False)
    snapshot.write()
    torch.distributed.barrier()
    snapshot.describe()


def load(trainable: optim.Trainable, folder: Path, rank: int | None) -> None:
    """Fill weights, moments and steps from `folder`, of any layout; with `rank`, random states too,
    of the same layout. Raises CheckpointError if `folder` holds anything but tensors."""
    with safe_metadata.read_by_torch():
        state = dist_checkpointing.load(_description(trainable, is_loading=True), str(folder))
    for number, stage in enumerate(trainable.stages):
        fill(stage, state[f"model{number}"])
    optim.load_states(trainable.optimizer, state["optimizer"])
    if rank is not None:
        _load_random_states(folder, rank)


def fill(stage: Any, tensors: dict[str, Any]) -> None:
    """Load all weights of a stage."""
    missing, unexpected = stage.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.endswith(_EXTRA_STATE) for name in missing), missing


def description_of(stage: Any) -> dict[str, Any]:
    """{name: which part of which tensor of the checkpoint} of the weights of a stage."""
    entries = stage.sharded_state_dict(metadata=dict(_METADATA))
    return {name: entry for name, entry in entries.items() if not name.endswith(_EXTRA_STATE)}


def _description(trainable: optim.Trainable, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for number, stage in enumerate(trainable.stages):
        state[f"model{number}"] = description_of(stage)
    state["optimizer"] = trainable.optimizer.sharded_state_dict(
        state, is_loading=is_loading, metadata=dict(_METADATA)
    )
    return state


def _random_states() -> dict[str, np.ndarray]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, tracked in get_cuda_rng_tracker().get_states().items():
        states[f"tracker:{name}"] = tracked
    return {name: state.numpy().copy() for name, state in states.items()}


def _write_random_states(arrays: dict[str, np.ndarray], folder: Path, rank: int) -> None:
    (folder / "random").mkdir(exist_ok=True)
    np.savez(_random_file(folder, rank), **arrays)  # type: ignore[arg-type]


def _load_random_states(folder: Path, rank: int) -> None:
    try:
        with np.load(_random_file(folder, rank), allow_pickle=False) as file:
            states = {name: torch.from_numpy(file[name]) for name in file.files}
        _set_random_states(states)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, BadZipFile) as error:
        raise CheckpointError(
            f"the random states of rank {rank} cannot be read: {error}. Remedy: take another "
            "checkpoint, or another layout of ranks: dropout is then seeded again."
        ) from None


def _set_random_states(states: dict[str, torch.Tensor]) -> None:
    tracked = {
        name.removeprefix("tracker:"): state
        for name, state in states.items()
        if name.startswith("tracker:")
    }
    get_cuda_rng_tracker().set_states(tracked)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    torch.set_rng_state(states["cpu"])


def _random_file(folder: Path, rank: int) -> Path:
    return folder / "random" / f"rank_{rank:05d}.npz"


@contextlib.contextmanager
def _written_by_this_process() -> Iterator[None]:
    """Within it Megatron's function writes the same files in line. Its forked process and the queue
    of a spawned one would hang the run if killed, and a fork is unsafe with TileDB's threads."""
    writer = filesystem_async.FileSystemWriterAsync
    theirs, their_queue = writer.write_preloaded_data_multiproc, filesystem_async._results_queue
    writer.write_preloaded_data_multiproc = staticmethod(_write_in_line)
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        writer.write_preloaded_data_multiproc = staticmethod(theirs)
        filesystem_async._results_queue = their_queue


def _write_in_line(
    transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue
) -> None:
    written: dict[int, Any] | Exception = {}
    for number, bucket in enumerate(buckets):
        done: queue.Queue = queue.Queue()
        pending: queue.Queue = queue.Queue()
        pending.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, done, pending, use_fsync=True
        )
        _, outcome = done.get_nowait()
        if isinstance(outcome, Exception):
            written = outcome
            break
        assert isinstance(written, dict)
        written[number] = outcome
    results.put(written)
