"""Micro batches made by NVIDIA DALI, on the GPU that trains where there is one.

    CellViews -> tokens as they are --copy--> DALI: masked, padded -> selected places -> Batch
                 (half the bytes of a padded batch, or less)

The batches are those of `batch.make_batch`, bit for bit. With a GPU the work leaves the host; on a
CPU, DALI takes many times as long as our compiled loops, and is there for tests.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from geneformer_mcore.backends import require
from geneformer_mcore.contracts import PAD, Batch, CellViews
from geneformer_mcore.feed.batch import assembled, make_batch
from geneformer_mcore.feed.masks import Masking

if TYPE_CHECKING:
    from geneformer_mcore.feed.dali_pipeline import MaskingPipeline

_ROOM = 2048
"""Positions that every pipeline has room for: those of the published models."""
_CELLS_MULTIPLE = 16


class DaliBatches:
    """A BatchMaker whose batches lie on `device`, complete, when it returns.

    It may be called from several threads: one batch is made at a time. Raises MissingBackendError
    if DALI is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        require("nvidia.dali")
        self._device = device
        # Its own, so that batches are made while the training step computes.
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
        """See batch.BatchMaker. DALI pads; cells to be packed are taken out of its rows."""
        longest = int(cells.lengths_N.max(initial=0))
        assert (cells.lengths_N.sum() if packed else longest) <= num_positions
        if len(cells) == 0:
            empty = make_batch(cells, epochs_N, idle_N, masking, num_positions, packed)
            return empty.to(self._device)
        padded_to = longest if packed else num_positions
        # A pipeline is built for a number of cells, and packed batches have any: a few numbers do.
        asked = np.arange(
            -(-len(cells) // _CELLS_MULTIPLE) * _CELLS_MULTIPLE if packed else len(cells)
        )
        asked[len(cells) :] = 0
        with self._lock, self._beside():
            pipeline = self._pipeline(len(asked), padded_to, masking)
            tokens_BS, labels_BS = pipeline.run(
                _tokens(cells.part(asked)),
                masking.streams(cells.keys_N, epochs_N)[asked],
                idle_N[asked],
                padded_to,
                self._stream,
            )
            # Copied, into memory that torch's allocator knows: DALI's is out of its sight.
            tokens, labels = tokens_BS.flatten().clone(), labels_BS.flatten().clone()
            if packed:
                tokens = _packed(tokens, cells.lengths_N, num_positions, PAD)
                labels = _packed(labels, cells.lengths_N, num_positions, -1)
            batch = _batch(cells, tokens, labels, num_positions, packed)
            if self._stream is not None:
                self._stream.synchronize()
        if self._stream is not None:
            # The allocator must not give this memory to the next batch while the caller computes.
            batch.record_stream(torch.cuda.current_stream(self._device))
        return batch

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _pipeline(self, num_cells: int, num_positions: int, masking: Masking) -> MaskingPipeline:
        room = _ROOM
        while room < num_positions:
            room *= 2
        key = (num_cells, room, masking)
        if key not in self._pipelines:
            from geneformer_mcore.feed.dali_pipeline import MaskingPipeline

            self._pipelines[key] = MaskingPipeline(
                *key,
                device_id=None if self._stream is None else self._stream.device_index,
                num_threads=torch.get_num_threads() if self._stream is None else 1,
            )
        return self._pipelines[key]


def _tokens(cells: CellViews) -> list[np.ndarray]:
    """uint16 [n] per cell, views: DALI copies them, one behind the other."""
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


def _batch(
    cells: CellViews, tokens: torch.Tensor, labels: torch.Tensor, num_positions: int, packed: bool
) -> Batch:
    # Token ids are not negative, and what stands elsewhere is.
    selected_M = torch.nonzero(labels >= 0).flatten()
    return assembled(cells, tokens, selected_M, labels[selected_M].long(), num_positions, packed)
