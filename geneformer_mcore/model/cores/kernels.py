"""The compiled loops of attention with dropout on a CPU.

    which probability is dropped = hash(its place in the block, key of the block) < bound

A counter-based hash gives the same answer in the backward pass, so no mask is kept; torch's own
generator takes longer to draw a number than the matrix products take to use it. The hash is the
32-bit mixer "lowbias32" with the constants that Chris Wellons' hash prospector found best (2023).
"""

from __future__ import annotations

import numpy as np

from geneformer_mcore.cells.compiled import compiled

_MUL_1 = np.uint32(0x21F0AAAD)
_MUL_2 = np.uint32(0xD35A2D97)
_15, _16 = np.uint32(15), np.uint32(16)


@compiled
def _mix(x: np.uint32) -> np.uint32:
    x = np.uint32((x ^ (x >> _16)) * _MUL_1)
    x = np.uint32((x ^ (x >> _15)) * _MUL_2)
    return np.uint32(x ^ (x >> _15))


@compiled
def drop(values: np.ndarray, key: np.uint32, below: np.uint32) -> None:
    """Zeroes each of `values` (fp32, flat) with probability below / 2^32."""
    for i in range(len(values)):
        kept = _mix(np.uint32(np.uint32(i) + key)) >= below
        values[i] = values[i] if kept else np.float32(0)


@compiled
def softmax_backward(
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
