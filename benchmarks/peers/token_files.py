"""The same tokens in the formats that peers read.

    tokens_h5ad   AnnData, X (cell, rank) -> token, CSR uint16, without [CLS] (0 is no entry)
    tokens_arrow  Hugging Face dataset: `input_ids`, a list of uint16 per cell, and `row`
    tokens_dense  numpy's own format, uint16 [cells, 2048], [PAD] after the last token

Rows are in source order in all of them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from benchmarks.side_by_side.prepared import SEQ_LENGTH, Prepared
from geneformer_mcore.types import PAD


def tokens_h5ad(data: Prepared) -> None:
    """tokens_h5ad."""
    import anndata

    lengths = np.diff(data.offsets)
    is_gene = np.ones(len(data.tokens_T), dtype=bool)
    is_gene[data.offsets[:-1]] = False
    starts = np.repeat(data.offsets[:-1], lengths)
    rank = (np.arange(len(data.tokens_T)) - starts - 1)[is_gene].astype(np.int32)
    indptr = data.offsets - np.arange(len(data) + 1)
    ranks = sparse.csr_matrix(
        (data.tokens_T[is_gene], rank, indptr), shape=(len(data), SEQ_LENGTH - 1)
    )
    names = pd.Index([f"c{row:08d}" for row in range(len(data))])
    genes = pd.Index([f"rank{number:04d}" for number in range(SEQ_LENGTH - 1)])
    cells = anndata.AnnData(ranks, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=genes))
    cells.write_h5ad(data.place("tokens_h5ad"))


def tokens_arrow(data: Prepared) -> None:
    """tokens_arrow, through Arrow without a copy."""
    import datasets
    import pyarrow as pa

    offsets = pa.array(data.offsets.astype(np.int32))
    cells = pa.ListArray.from_arrays(offsets, pa.array(np.asarray(data.tokens_T)))
    table = pa.table({"input_ids": cells, "row": np.arange(len(data))})
    datasets.Dataset(table).save_to_disk(data.place("tokens_arrow"))


def tokens_dense(data: Prepared) -> None:
    """tokens_dense."""
    target = np.lib.format.open_memmap(
        data.place("tokens_dense"), "w+", np.uint16, (len(data), SEQ_LENGTH)
    )
    place = np.arange(SEQ_LENGTH)
    for start in range(0, len(data), 1024):
        offsets = data.offsets[start : start + 1025]
        here = place < np.diff(offsets)[:, None]
        rows = np.full(here.shape, PAD, np.uint16)
        rows[here] = data.tokens_T[offsets[0] : offsets[-1]]
        target[start : start + len(rows)] = rows
    target.flush()
