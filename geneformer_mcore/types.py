"""The words that every floor shares (floor 1): special tokens, ragged cells, one micro batch.

Shape legend, used as suffixes of tensor names throughout:

    B  cells of a padded micro batch, and 1 for a packed one
    S  positions of a row of the micro batch, [CLS] included
    H  hidden size                   V  padded vocabulary (this rank's part of it under TP)
    M  selected positions, that is, those whose gene must be predicted
    N  cells of a ragged block       T  tokens of a ragged block, laid end to end
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ("[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UKW]")
"""In the order of NVIDIA's Geneformer; a gene's id is its place in the vocabulary plus five."""

CLS, MASK, PAD, SEP, UKW = range(len(SPECIAL_TOKENS))
NUM_SPECIALS = len(SPECIAL_TOKENS)

VOCABULARY_MULTIPLE = 512
"""The embedding is padded to a multiple of this (25,429 -> 25,600), whatever the tensor-parallel
size, so that a checkpoint fits every layout."""


def padded_vocabulary_size(vocabulary_size: int) -> int:
    """Rows of the embedding for `vocabulary_size` tokens, specials included."""
    return -(-vocabulary_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class RaggedCells:
    """Tokenised cells laid end to end.

    tokens_T:   uint16, cell i is tokens_T[offsets[i]:offsets[i + 1]], [CLS] first
    offsets:    int64 [N + 1], starting at 0
    keys_N:     uint64, the `cell_key` of each cell (see store.keys)
    """

    tokens_T: np.ndarray
    offsets: np.ndarray
    keys_N: np.ndarray

    def __len__(self) -> int:
        return len(self.keys_N)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each cell, [CLS] included."""
        return np.diff(self.offsets)

    def first(self, number: int) -> RaggedCells:
        """The first `number` cells, or all if there are fewer."""
        number = min(number, len(self))
        offsets = self.offsets[: number + 1]
        return RaggedCells(self.tokens_T[: offsets[-1]], offsets, self.keys_N[:number])


@dataclass(frozen=True)
class CellViews:
    """Tokenised cells that lie anywhere in one array, which holds others too.

    tokens_T:   uint16, cell i is tokens_T[starts_N[i] : starts_N[i] + lengths_N[i]], [CLS] first
    starts_N:   int64 [N]
    lengths_N:  int64 [N]; a cell cut short is one whose length is less than it was
    keys_N:     uint64 [N], the `cell_key` of each cell

    The array may be used again for other cells once the views were worked on: nothing that lasts
    longer than a step may be made of views, but of `ragged()`.
    """

    tokens_T: np.ndarray
    starts_N: np.ndarray
    lengths_N: np.ndarray
    keys_N: np.ndarray

    def __len__(self) -> int:
        return len(self.keys_N)

    def part(self, cells: slice | np.ndarray) -> CellViews:
        """Those of `cells`."""
        return CellViews(
            self.tokens_T, self.starts_N[cells], self.lengths_N[cells], self.keys_N[cells]
        )

    def ragged(self) -> RaggedCells:
        """The same cells, copied and laid end to end."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths_N)]).astype(np.int64)
        shift = np.repeat(self.starts_N - offsets[:-1], self.lengths_N)
        return RaggedCells(self.tokens_T[np.arange(offsets[-1]) + shift], offsets, self.keys_N)


class TokenSource(Protocol):
    """Whatever tokenised cells can be read from by row number: a store, a flat file, an array."""

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1, in row order. Called from the prefetch thread."""
        ...


@runtime_checkable
class KnownLengths(TokenSource, Protocol):
    """A source that knows how long its cells are without reading them."""

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int64 [N], tokens of the cells of `rows` (int64 [N]), [CLS] included."""
        ...


@runtime_checkable
class RandomAccess(TokenSource, Protocol):
    """A source from which single cells cost no more than neighbouring ones: memory, a flat file."""

    def views(self, rows: np.ndarray) -> CellViews:
        """The cells of `rows` (int64 [N]), in that order."""
        ...


@dataclass(frozen=True)
class Batch:
    """One micro batch, ready for the model: padded, a cell per row, or packed, one row of cells end
    to end, each of which attends to itself only.

    tokens_BS:   int32, masked token ids, [PAD] after the last token of a cell (packed: of all)
    lengths_N:   int64, tokens of each cell, [CLS] included
    selected_M:  int64, flat places `b * S + s` of the positions to predict, ascending
    labels_M:    int64, the true token ids at those places
    keys_N:      uint64 array, the `cell_key` of each cell: for logs, never seen by the model
    bounds:      None if padded; packed: int32 [at least N + 1], 0 to S, where cells begin and end.
                 What is left behind the last cell is cut into pieces like cells, so that attention
                 leaves no position undefined
    longest:     tokens of the longest piece between two bounds: an int of the host, for kernels
                 that want it without waiting for the device
    """

    tokens_BS: torch.Tensor
    lengths_N: torch.Tensor
    selected_M: torch.Tensor
    labels_M: torch.Tensor
    keys_N: np.ndarray
    bounds: torch.Tensor | None = None
    longest: int = 0

    @property
    def num_tokens(self) -> int:
        """Real tokens, [CLS] included and padding not."""
        return int(self.lengths_N.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies by itself; a batch that is
        on a GPU stays there."""
        return self if self.tokens_BS.is_cuda else self._with(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that `stream` works on this batch."""
        for tensor in self._tensors().values():
            tensor.record_stream(stream)

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("tokens_BS", "lengths_N", "selected_M", "labels_M", "bounds")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed = {name: change(tensor) for name, tensor in self._tensors().items()}
        return replace(self, **changed)  # type: ignore[arg-type]
