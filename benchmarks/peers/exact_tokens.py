"""The truth that every tokeniser is compared with, written as plainly as can be.

counts of a cell  ->  / all its counts  ->  * 10,000  ->  / median of the gene   (float64)
                  ->  descending, ties by token id  ->  [CLS] in front  ->  cut
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from geneformer_mcore.types import CLS


def exact_tokens(
    counts: sparse.csr_matrix, token_of_column: np.ndarray, medians: np.ndarray, seq_length: int
) -> list[np.ndarray]:
    """uint16 tokens of every cell of `counts`.

    token_of_column: int32 [genes], 0 for a gene without a token
    medians:         float64 [tokens]
    """
    cells = []
    for start, stop in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        count = counts.data[start:stop].astype(np.float64)
        token = token_of_column[counts.indices[start:stop]]
        kept = (token > 0) & (count > 0)
        value = count[kept] / count.sum() * 10_000 / medians[token[kept]]
        order = np.lexsort((token[kept], -value))
        cells.append(np.concatenate([[CLS], token[kept][order]])[:seq_length].astype(np.uint16))
    return cells
