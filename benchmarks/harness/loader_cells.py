"""The cells that loaders and tokenisers are given: in memory, and on disk for every contestant.

h5ad files | a made-up pool -> one list of genes -> rows drawn with replacement -> Cells
Cells -> cells.h5ad (raw counts, uncompressed), vocabulary.json, arrays.npz: exact tokens, and sums
         per cell, against which the batches of a contestant are checked
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from benchmarks.harness import made_up
from benchmarks.harness.common import SEQ_LENGTH
from benchmarks.harness.peers.tokenisers import blocks
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.h5ad import CountsFile
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.tokenizer.dictionary import import_dictionary
from geneformer_mcore.tokenizer.genes import find_gene_ids
from geneformer_mcore.tokenizer.rank_encoder import RankEncoder
from geneformer_mcore.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class Cells:
    """Raw counts in source order, data set after data set, as collections are stored.

    counts:      float32 CSR [N, genes], columns ascending, no explicit zeros
    gene_ids:    id of each column
    dataset_N:   int16, data set of each cell, ascending
    vocabulary:  the genes that become tokens, and their medians
    """

    counts: sparse.csr_matrix
    gene_ids: list[str]
    dataset_N: np.ndarray
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    @property
    def token_of_column(self) -> np.ndarray:
        """int32 [genes], 0 for a gene that is not in the vocabulary."""
        tokens = self.vocabulary.token_ids
        return np.array([tokens.get(gene, 0) for gene in self.gene_ids], dtype=np.int32)


def draw(
    paths: Sequence[Path], medians: Path | None, num_cells: int, seed: int
) -> tuple[Cells, Cells]:
    """(`num_cells` cells, one batch of 128 to warm up with), from `paths` or made up.

    medians: {gene id: median} of the vocabulary; cells that are made up have their own
    """
    rng = np.random.default_rng(seed)
    if paths and medians:
        vocabulary = import_dictionary(medians)
        sets, gene_ids = _real_sets(paths)
    elif paths or medians:
        raise ConfigError("files and --medians go together: give both, or none for made-up cells.")
    else:
        sets, gene_ids, own_medians = made_up.count_sets(rng)
        vocabulary = Vocabulary.from_medians(own_medians)
    kept = np.array([gene in vocabulary.token_ids for gene in gene_ids])
    # Cells without a token have no place in a store of tokens: no contestant gets one.
    sets = [counts[counts[:, kept].getnnz(axis=1) > 0] for counts in sets]
    sizes = np.array([counts.shape[0] for counts in sets])

    def drawn(number: int) -> Cells:
        ends = np.rint(number * np.cumsum(sizes) / sizes.sum()).astype(int)
        shares = np.diff(ends, prepend=0)
        pairs = zip(sets, sizes, shares, strict=True)
        parts = [counts[rng.integers(0, size, share)] for counts, size, share in pairs]
        dataset_N = np.repeat(np.arange(len(sets)), shares).astype(np.int16)
        return Cells(sparse.vstack(parts, format="csr"), gene_ids, dataset_N, vocabulary)

    return drawn(num_cells), drawn(128)


def _real_sets(paths: Sequence[Path]) -> tuple[list[sparse.csr_matrix], list[str]]:
    """The counts of each file, over the genes that any of them names by an id."""
    found = []
    for path in paths:
        with CountsFile(path) as file:
            ids = find_gene_ids(file.gene_columns()).ids
            block = file.read_rows(0, file.num_cells)
        shape = (len(block), len(ids))
        found.append((ids, sparse.csr_matrix((block.data, block.indices, block.indptr), shape)))
    gene_ids = sorted({gene for ids, _ in found for gene in ids if gene})
    place = {gene: column for column, gene in enumerate(gene_ids)}
    return [_on_genes(ids, counts, place) for ids, counts in found], gene_ids


def _on_genes(
    ids: Sequence[str], counts: sparse.csr_matrix, place: dict[str, int]
) -> sparse.csr_matrix:
    """Columns moved to the genes' places, those of one gene summed, others dropped."""
    named = [column for column, gene in enumerate(ids) if gene]
    target = [place[ids[column]] for column in named]
    moves = sparse.csr_matrix((np.ones(len(named)), (named, target)), (len(ids), len(place)))
    moved = sparse.csr_matrix(counts @ moves, dtype=np.float32)
    moved.eliminate_zeros()
    moved.sort_indices()
    return moved


class Prepared:
    """A folder that `write` has filled, and its arrays by name, each read when first used.

    counts_file:      raw counts; row i of the file is cell i
    token_of_column:  int32 [genes], 0 for a gene that is no token
    tokens_T:         uint16, all cells end to end
    offsets:          int64 [N + 1]: cell i is tokens_T[offsets[i]:offsets[i + 1]]
    num_tokens_N:     int64, [CLS] included
    count_sums_N, token_sums_N:  float64, all counts, and all token ids ([CLS] is 0)
    keys_N:           uint64, its cell_key
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts_file, self.vocabulary_file = folder / "cells.h5ad", folder / "vocabulary.json"

    def place(self, form: str) -> Path:
        """File or folder of the format `form`, named as the function that makes it."""
        return self.folder / form

    def __len__(self) -> int:
        return len(self.keys_N)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.vocabulary_file)

    def rows_of(self, keys: np.ndarray) -> np.ndarray:
        return self._row_of_key[np.searchsorted(self.keys_N, keys, sorter=self._row_of_key)]

    @cached_property
    def _row_of_key(self) -> np.ndarray:
        return np.argsort(self.keys_N)

    def __getattr__(self, name: str) -> np.ndarray:
        with np.load(self.folder / "arrays.npz") as found:
            if name not in found:
                raise AttributeError(name)
            self.__dict__[name] = found[name]
        return self.__dict__[name]


def write(cells: Cells, folder: Path) -> Prepared:
    """Fill `folder`, which is made."""
    import anndata

    folder.mkdir(parents=True, exist_ok=True)
    data = Prepared(folder)
    cell_ids = [f"c{row:08d}" for row in range(len(cells))]
    dataset_ids = [f"set{number}" for number in cells.dataset_N]
    obs = pd.DataFrame({"dataset_id": pd.Categorical(dataset_ids)}, index=pd.Index(cell_ids))
    var = pd.DataFrame(index=pd.Index(cells.gene_ids, name="feature_id"))
    anndata.AnnData(cells.counts, obs=obs, var=var).write_h5ad(data.counts_file)
    cells.vocabulary.save(data.vocabulary_file)
    encoder, token_of_column = RankEncoder(cells.vocabulary, SEQ_LENGTH), cells.token_of_column
    ranked = [encoder.encode(count_block(part), token_of_column) for part in blocks(cells.counts)]
    lengths = np.concatenate([np.diff(part.offsets) for part in ranked])
    tokens_T = np.concatenate([part.tokens_T for part in ranked])
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    np.savez(
        folder / "arrays.npz",
        token_of_column=token_of_column,
        tokens_T=tokens_T,
        offsets=offsets,
        count_sums_N=np.asarray(cells.counts.sum(axis=1, dtype=np.float64)).ravel(),
        token_sums_N=np.add.reduceat(tokens_T.astype(np.float64), offsets[:-1]),
        num_tokens_N=lengths,
        keys_N=cell_keys(dataset_ids, cell_ids),
    )
    return data


def count_block(counts: sparse.csr_matrix) -> CountBlock:
    """The counts widened, as our encoder takes them."""
    indices = counts.indices.astype(np.int32, copy=False)
    return CountBlock(counts.data.astype(np.float64), indices, counts.indptr.astype(np.int64))
