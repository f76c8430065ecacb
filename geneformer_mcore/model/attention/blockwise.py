"""Attention with dropout for CPUs: a block of rows at a time, that fits the cache.

    a block of queries -> scores -> softmax -> some dropped -> weighted sum of values
    backward: the same block again, from query and key, then its gradients
    dropped: hash(position in the block, key of the block) < bound

torch's fused CPU attention has no dropout, and its fallback is slow. Here only outputs are kept; a
counter-based hash gives the same dropout in the backward pass, faster than torch's generator: the
32-bit mixer "lowbias32" with the best constants of Chris Wellons' hash prospector (2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geneformer_mcore.backends import compiled
from geneformer_mcore.model.attention.backends import SdpaAttention
from geneformer_mcore.model.attention.base import PackedCells, cell_by_cell

_MUL_1 = np.uint32(0x21F0AAAD)
_MUL_2 = np.uint32(0xD35A2D97)
_15, _16 = np.uint32(15), np.uint32(16)


@compiled
def _mix(x: np.uint32) -> np.uint32:
    x = np.uint32((x ^ (x >> _16)) * _MUL_1)
    x = np.uint32((x ^ (x >> _15)) * _MUL_2)
    return np.uint32(x ^ (x >> _15))


@compiled
def block_key(seed: np.uint32, number: np.uint32) -> np.uint32:
    """A hash of both."""
    return _mix(np.uint32(_mix(seed) + number))


@compiled
def _drop_block(values: np.ndarray, key: np.uint32, below: np.uint32) -> None:
    """Zeroes each of `values` (fp32, flat) with probability below / 2^32."""
    for i in range(len(values)):
        kept = _mix(np.uint32(np.uint32(i) + key)) >= below
        values[i] = values[i] if kept else np.float32(0)


@compiled
def _softmax_backward_block(
    probabilities: np.ndarray,
    gradients: np.ndarray,
    sums: np.ndarray,
    key: np.uint32,
    below: np.uint32,
) -> None:
    """For a block of rows, in place: gradients (of the dropped probabilities, fp32 [rows, n])
    become those of the scores, and probabilities (fp32 [rows, n]) are dropped.

    sums: fp32 [rows], of gradient x output of every row
    """
    n = probabilities.shape[1]
    for row in range(len(sums)):
        p, g, total = probabilities[row], gradients[row], sums[row]
        first = np.uint32(np.uint32(row * n) + key)
        for j in range(n):
            kept = _mix(np.uint32(np.uint32(j) + first)) >= below
            gradient = g[j] if kept else np.float32(0)
            g[j] = p[j] * (gradient - total)
            p[j] = p[j] if kept else np.float32(0)


_SCORES_PER_BLOCK = 520_000
"""2 MB of them, about the second-level cache of a core."""


class BlockwiseAttention(SdpaAttention):
    """torch's fused attention if nothing is dropped."""

    def padded(
        self, query: Tensor, key: Tensor, value: Tensor, padding_B11S: Tensor | None
    ) -> Tensor:
        if self.probability == 0:
            return super().padded(query, key, value, padding_B11S)
        num_positions, num_cells = query.shape[:2]
        lengths = [num_positions] * num_cells
        if padding_B11S is not None:
            lengths = (num_positions - padding_B11S[:, 0, 0].sum(-1)).tolist()
        contexts = []
        for cell, length in enumerate(lengths):
            one = self._dropped(*(tensor[:length, cell] for tensor in (query, key, value)))
            contexts.append(
                torch.nn.functional.pad(one.flatten(1), (0, 0, 0, num_positions - length))
            )
        return torch.stack(contexts, dim=1)

    def packed(self, query: Tensor, key: Tensor, value: Tensor, cells: PackedCells) -> Tensor:
        if self.probability == 0:
            return super().packed(query, key, value, cells)
        return cell_by_cell(query, key, value, cells, self._dropped)

    def _dropped(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All [n, heads, width]."""
        # From torch's generator, whose state is in the checkpoint.
        seed = int(torch.randint(2**32, (), dtype=torch.int64))
        scale = self.softmax_scale or 1 / math.sqrt(query.shape[-1])
        return _DroppedAttention.apply(query, key, value, self.probability, seed, scale)


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        probability: float,
        seed: int,
        scale: float,
    ) -> Tensor:
        blocks = _Blocks(_by_head(query), _by_head(key), _by_head(value), probability, seed, scale)
        context = blocks.forward()
        ctx.save_for_backward(query, key, value, context)
        ctx.constants = (probability, seed, scale)
        return context.transpose(0, 1).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        query, key, value, context = ctx.saved_tensors
        blocks = _Blocks(_by_head(query), _by_head(key), _by_head(value), *ctx.constants)
        gradients = blocks.backward(context, _by_head(gradient))
        back = (each.transpose(0, 1).to(gradient.dtype) for each in gradients)
        return (*back, None, None, None)


def _by_head(tensor: Tensor) -> Tensor:
    """[n, heads, width] -> fp32 [heads, n, width]."""
    return tensor.transpose(0, 1).float().contiguous()


class _Blocks:
    """One cell's attention. query, key, value: fp32 [heads, n, width]."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, probability: float, seed: int, scale: float
    ) -> None:
        self.query, self.key, self.value = query * scale, key, value
        self.scale = scale
        self.below = round(probability * 2**32)
        # What is kept stands for what was dropped, too.
        self.enlarged = 2**32 / (2**32 - self.below)
        self.seed = seed

    def forward(self) -> Tensor:
        """fp32 [heads, n, width]."""
        context = torch.empty_like(self.query)
        for rows, seed in self._rows():
            probabilities = self._probabilities(rows)
            drop(probabilities, seed, self.below)
            context[:, rows] = torch.bmm(probabilities, self.value)
        return context.mul_(self.enlarged)

    def backward(self, context: Tensor, gradient: Tensor) -> list[Tensor]:
        """Gradients of query, key and value, of those of the context. All fp32 [heads, n, width]"""
        sums = (gradient * context).sum(-1)
        gradient = gradient * self.enlarged
        value_t = self.value.transpose(1, 2)
        of_query, of_key, of_value = (torch.zeros_like(self.query) for _ in range(3))
        for rows, seed in self._rows():
            probabilities = self._probabilities(rows)
            scores = torch.bmm(gradient[:, rows], value_t)
            softmax_backward(probabilities, scores, sums[:, rows], seed, self.below)
            of_value.baddbmm_(probabilities.transpose(1, 2), gradient[:, rows])
            of_query[:, rows] = torch.bmm(scores, self.key)
            of_key.baddbmm_(scores.transpose(1, 2), self.query[:, rows])
        # The query that scores were made of is scaled already.
        return [of_query.mul_(self.scale), of_key, of_value]

    def _rows(self) -> Iterator[tuple[slice, int]]:
        """Rows of a block, and the key of its random numbers."""
        heads, n, _ = self.query.shape
        step = max(16, _SCORES_PER_BLOCK // (heads * n))
        for number, start in enumerate(range(0, n, step)):
            yield slice(start, min(start + step, n)), _key(self.seed, number)

    def _probabilities(self, rows: slice) -> Tensor:
        """fp32 [heads, rows, n]."""
        scores = torch.bmm(self.query[:, rows], self.key.transpose(1, 2))
        return torch.softmax(scores, dim=-1)


def _key(seed: int, number: int) -> int:
    """The start of a block's counter. Blocks rarely overlap, which is harmless."""
    return int(block_key(np.uint32(seed), np.uint32(number)))


def drop(probabilities: Tensor, key: int, below: int) -> None:
    """Zero values of a contiguous fp32 tensor in place, each with probability below / 2^32."""
    _drop_block(probabilities.view(-1).numpy(), np.uint32(key), np.uint32(below))


def softmax_backward(
    probabilities: Tensor, gradients: Tensor, sums: Tensor, key: int, below: int
) -> None:
    """In place: gradients of the dropped probabilities become those of the scores, probabilities
    are dropped. Both fp32 [heads, rows, n], contiguous; sums [heads, rows]."""
    flat = (tensor.flatten(0, 1).numpy() for tensor in (probabilities, gradients))
    rows = sums.flatten().contiguous().numpy()
    _softmax_backward_block(*flat, rows, np.uint32(key), np.uint32(below))
