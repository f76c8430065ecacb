"""Micro batches by NVIDIA DALI, on the GPU where there is one; equal to `make_batch` bit for bit.

    tokens, cell after cell (uint16) ------------------------+-> shown tokens -> pad -> seen
    one random stream per cell -> hash of every position ----+-> true tokens  -> pad -> labels
    idle cells ----------------------------------------------+

With a GPU the left column is copied there; on a CPU the same graph is slow, and there for tests.
DALI cannot index positions, so it hashes three times for every position, not for selected ones.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, math, types
from nvidia.dali.data_node import DataNode
from torch.utils.dlpack import from_dlpack

from geneformer_mcore.data.collate import assembled, make_batch
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.store.keys import GOLDEN, MIX_1, MIX_2
from geneformer_mcore.types import MASK, NUM_SPECIALS, PAD, Batch, CellViews

_NO_LABEL = -1


class MaskingPipeline:
    """A DALI pipeline that masks and pads one batch per run."""

    def __init__(
        self, num_cells: int, room: int, masking: Masking, device_id: int | None, num_threads: int
    ) -> None:
        """num_cells: of each batch;  room: most positions of a batch;  device_id: None for the CPU,
        with `num_threads` threads"""
        self._num_cells = num_cells
        self._pipeline = Pipeline(
            batch_size=num_cells,
            num_threads=num_threads,
            device_id=device_id,
            # A run starts with its inputs and ends with its outputs.
            prefetch_queue_depth=1,
        )
        with self._pipeline as pipeline:
            pipeline.set_outputs(*_graph(room, masking, "cpu" if device_id is None else "gpu"))

    def run(
        self,
        tokens: list[np.ndarray],
        streams_N: np.ndarray,
        idle_N: np.ndarray,
        num_positions: int,
        stream: torch.cuda.Stream | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens with masks and padding, and the true tokens at selected positions, else -1: two
        int32 [N, num_positions] in DALI's memory, where the pipeline runs.

        tokens:     uint16 [n] of each cell
        streams_N:  uint64, see Masking.streams
        idle_N:     bool, nothing is predicted in the cell
        stream:     on which the results are used; None on a CPU
        """
        outputs = self._pipeline.run(
            stream,
            tokens=tokens,
            streams=streams_N,
            # A rank's flags are every n-th of the global batch; DALI takes no strides.
            idle=np.ascontiguousarray(idle_N),
            num_positions=np.full((self._num_cells, 1), num_positions, dtype=np.int32),
        )
        seen_NS, labels_NS = (from_dlpack(output.as_tensor()) for output in outputs)
        return seen_NS, labels_NS


def _graph(room: int, masking: Masking, device: str) -> tuple[DataNode, DataNode]:
    tokens = fn.external_source(name="tokens", dtype=types.UINT16, ndim=1)
    stream = fn.external_source(name="streams", dtype=types.UINT64, ndim=0)
    idle = fn.external_source(name="idle", dtype=types.BOOL, ndim=0)
    num_positions = fn.external_source(name="num_positions", dtype=types.INT32, ndim=1)

    places = types.Constant(np.arange(room, dtype=np.int32), device=device)
    place = fn.slice(places, start=[0], shape=tokens.shape(dtype=types.INT32), axes=[0])
    if device == "gpu":
        tokens = tokens.gpu()
    true = fn.cast(tokens, dtype=types.INT32)

    hashed = _Hash(device)
    bits = hashed.mix(stream + fn.cast(place, dtype=types.UINT64) * hashed.golden)
    selected_below, _, _ = masking.bounds()
    # Place 0 is [CLS].
    selected = _below(bits, selected_below) & (place > 0) & (idle == 0)
    shown = _shown(true, bits, hashed, masking)
    # DALI has no `where`; a bool counts as 0 or 1.
    seen = true + selected * (shown - true)
    labels = selected * (true - _NO_LABEL) + _NO_LABEL
    return _padded(seen, num_positions, PAD), _padded(labels, num_positions, _NO_LABEL)


class _Hash:
    """SplitMix64 (see store/keys.py). DALI's uint64 wraps as C's does."""

    def __init__(self, device: str) -> None:
        self.golden, self.mix_1, self.mix_2 = (
            _number(int(value), device) for value in (GOLDEN, MIX_1, MIX_2)
        )

    def mix(self, x: DataNode) -> DataNode:
        """store.keys.mix: uint64 in and out."""
        x = x + self.golden
        x = (x ^ (x >> _small(30))) * self.mix_1
        x = (x ^ (x >> _small(27))) * self.mix_2
        return x ^ (x >> _small(31))


def _shown(true: DataNode, bits: DataNode, hashed: _Hash, masking: Masking) -> DataNode:
    """The token shown at each position if selected: [MASK], a random gene or its own."""
    _, masked_below, random_below = masking.bounds()
    action = hashed.mix(bits ^ hashed.mix_1)
    masked = _below(action, masked_below)
    # Bounds ascend: what is masked is below this one too.
    changed = _below(action, random_below)
    gene = _random_gene(hashed.mix(bits ^ hashed.mix_2), masking.vocabulary_size - NUM_SPECIALS)
    return true + changed * (gene - true) + masked * (MASK - gene)


def _random_gene(bits: DataNode, num_genes: int) -> DataNode:
    """int32: `floor(x * 2^-53 * num_genes)` of the upper 53 bits x, plus the special tokens.

    In float64 as in masking.py, and exact: a factor 2^-53 changes no digit. DALI takes constants
    as float32: this one fits.
    """
    x = fn.cast(bits >> _small(11), dtype=types.FLOAT64)
    share = x * types.Constant(num_genes * 2.0**-53, types.FLOAT64)
    # DALI's cast rounds to the nearest.
    return fn.cast(math.floor(share), dtype=types.INT32) + NUM_SPECIALS


def _below(bits: DataNode, bound: np.uint64) -> DataNode:
    """bool: whether the upper 53 bits are below `bound`."""
    return (bits >> _small(11)) < _small(int(bound))


def _padded(row: DataNode, num_positions: DataNode, value: int) -> DataNode:
    return fn.pad(row, axes=[0], shape=num_positions, fill_value=value)


def _small(value: int) -> types.ScalarConstant:
    """A uint64 below 2^63: the largest that DALI takes as a constant."""
    return types.Constant(value, types.UINT64)


def _number(value: int, device: str) -> DataNode:
    """Any uint64, put together from two constants of 32 bits."""
    halves = types.Constant(np.array([value], "<u8").view("<i4"), device=device)
    return fn.reinterpret(halves, dtype=types.UINT64, shape=[])


_ROOM = 2048
"""Positions that every pipeline has room for: those of the published models."""
_CELLS_MULTIPLE = 16


class DaliBatches:
    """A thread-safe Collator with batches on `device`. Raises MissingBackendError without DALI."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Its own, so that it runs next to the training step.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pipelines: dict[tuple[int, int, Masking], MaskingPipeline] = {}
        self._lock = threading.Lock()

    def __call__(
        self,
        cells: CellViews,
        epochs_N: np.ndarray,
        idle_N: np.ndarray,
        masking: Masking,
        num_positions: int,
        packed: bool = False,
    ) -> Batch:
        """See Collator. DALI pads; packed cells are taken out of its rows."""
        longest = int(cells.lengths_N.max(initial=0))
        assert (cells.lengths_N.sum() if packed else longest) <= num_positions
        if len(cells) == 0:
            empty = make_batch(cells, epochs_N, idle_N, masking, num_positions, packed)
            return empty.to(self._device)
        padded_to = longest if packed else num_positions
        # A pipeline is built for a number of cells, which is rounded up for packed batches.
        asked = np.arange(
            -(-len(cells) // _CELLS_MULTIPLE) * _CELLS_MULTIPLE if packed else len(cells)
        )
        asked[len(cells) :] = 0
        side: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            side = torch.cuda.stream(self._stream)
        with self._lock, side:
            pipeline = self._pipeline(len(asked), padded_to, masking)
            tokens_BS, labels_BS = pipeline.run(
                _tokens(cells.part(asked)),
                masking.streams(cells.keys_N, epochs_N)[asked],
                idle_N[asked],
                padded_to,
                self._stream,
            )
            # Copied into memory of torch's allocator.
            tokens, labels = tokens_BS.flatten().clone(), labels_BS.flatten().clone()
            if packed:
                tokens = _packed(tokens, cells.lengths_N, num_positions, PAD)
                labels = _packed(labels, cells.lengths_N, num_positions, -1)
            # Token ids are not negative, other labels are.
            selected_M = torch.nonzero(labels >= 0).flatten()
            labels_M = labels[selected_M].long()
            batch = assembled(cells, tokens, selected_M, labels_M, num_positions, packed)
            if self._stream is not None:
                self._stream.synchronize()
        if self._stream is not None:
            # The allocator must not reuse this memory while the caller computes.
            batch.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _pipeline(self, num_cells: int, num_positions: int, masking: Masking) -> MaskingPipeline:
        room = _ROOM
        while room < num_positions:
            room *= 2
        key = (num_cells, room, masking)
        if key not in self._pipelines:
            self._pipelines[key] = MaskingPipeline(
                *key,
                device_id=None if self._stream is None else self._stream.device_index,
                num_threads=torch.get_num_threads() if self._stream is None else 1,
            )
        return self._pipelines[key]


def _tokens(cells: CellViews) -> list[np.ndarray]:
    stops_N = cells.starts_N + cells.lengths_N
    return [cells.tokens_T[start:stop] for start, stop in zip(cells.starts_N, stops_N, strict=True)]


def _packed(
    rows: torch.Tensor, lengths_N: np.ndarray, num_positions: int, filler: int
) -> torch.Tensor:
    """[num_positions]: of rows padded to the longest, their first lengths_N, then `filler`."""
    first_N = np.arange(len(lengths_N)) * int(lengths_N.max())
    shift_N = first_N - (np.cumsum(lengths_N) - lengths_N)
    where = np.arange(lengths_N.sum()) + np.repeat(shift_N, lengths_N)
    packed = rows.new_full((num_positions,), filler)
    packed[: len(where)] = rows[torch.from_numpy(where).to(rows.device)]
    return packed
