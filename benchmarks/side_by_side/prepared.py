"""The cells on disk, as every contestant finds them, and what is true of each.

Cells  ->  cells.h5ad (raw counts, uncompressed)
       ->  truth.npz: sums per cell, by which what a contestant yields is checked
       ->  tokens.npy, offsets.npy: the exact tokens, out of which formats of tokens are made
       ->  vocabulary.json, medians of columns
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from benchmarks.peers.hf_tokeniser import blocks
from benchmarks.side_by_side.cells import Cells
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.tokenizer.rank_encoder import RankEncoder
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

SEQ_LENGTH = 2048


@dataclass(frozen=True)
class Truth:
    """What is known of each cell, by its row in source order.

    count_sums_N, token_sums_N:  float64, all counts, and all token ids ([CLS] is 0)
    num_tokens_N:                int64, [CLS] included
    dataset_N:                   int16
    keys_N:                      uint64, its cell_key
    """

    count_sums_N: np.ndarray
    token_sums_N: np.ndarray
    num_tokens_N: np.ndarray
    dataset_N: np.ndarray
    keys_N: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """A folder that `write` has filled."""

    folder: Path

    @property
    def counts_file(self) -> Path:
        """Raw counts; row i of the file is cell i."""
        return self.folder / "cells.h5ad"

    def place(self, form: str) -> Path:
        """Where the format `form` lies, a file or a folder: named as the function that makes it."""
        return self.folder / form

    @cached_property
    def truth(self) -> Truth:
        """What is known of each cell."""
        with np.load(self.folder / "truth.npz") as found:
            return Truth(**{name: found[name] for name in Truth.__dataclass_fields__})

    def __len__(self) -> int:
        return len(self.truth.keys_N)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The genes that are tokens."""
        return Vocabulary.load(self.vocabulary_file)

    @property
    def vocabulary_file(self) -> Path:
        """The vocabulary, as commands take it."""
        return self.folder / "vocabulary.json"

    @cached_property
    def token_of_column(self) -> np.ndarray:
        """int32 [genes], 0 for a gene that is no token."""
        return np.load(self.folder / "token_of_column.npy")

    @cached_property
    def tokens_T(self) -> np.ndarray:
        """uint16, all cells end to end, mapped from disk."""
        return np.load(self.folder / "tokens.npy", mmap_mode="r")

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [N + 1]: cell i is tokens_T[offsets[i]:offsets[i + 1]]."""
        return np.load(self.folder / "offsets.npy")


def write(cells: Cells, folder: Path) -> Prepared:
    """Fills `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    obs = pd.DataFrame(
        {"dataset_id": pd.Categorical(cells.dataset_ids)}, index=pd.Index(cells.cell_ids)
    )
    var = pd.DataFrame(index=pd.Index(cells.gene_ids, name="feature_id"))
    anndata.AnnData(cells.counts, obs=obs, var=var).write_h5ad(folder / "cells.h5ad")
    cells.vocabulary.save(folder / "vocabulary.json")
    np.save(folder / "token_of_column.npy", cells.token_of_column)
    tokens_T, offsets = _encoded(cells)
    np.save(folder / "tokens.npy", tokens_T)
    np.save(folder / "offsets.npy", offsets)
    truth = Truth(
        count_sums_N=np.asarray(cells.counts.sum(axis=1, dtype=np.float64)).ravel(),
        token_sums_N=np.add.reduceat(tokens_T.astype(np.float64), offsets[:-1]),
        num_tokens_N=np.diff(offsets),
        dataset_N=cells.dataset_N,
        keys_N=cell_keys(cells.dataset_ids, cells.cell_ids),
    )
    np.savez(folder / "truth.npz", **vars(truth))
    return Prepared(folder)


def _encoded(cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    encoder, token_of_column = RankEncoder(cells.vocabulary, SEQ_LENGTH), cells.token_of_column
    parts, lengths = [], []
    for part in blocks(cells.counts):
        block = CountBlock(
            part.data.astype(np.float64),
            part.indices.astype(np.int32),
            part.indptr.astype(np.int64),
        )
        ranked = encoder.encode(block, token_of_column)
        parts.append(ranked.tokens_T)
        lengths.append(np.diff(ranked.offsets))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return np.concatenate(parts), offsets.astype(np.int64)
