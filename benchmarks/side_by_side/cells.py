"""The cells that all contestants are given: real ones drawn again and again, or made-up ones.

h5ad files | a made-up pool  ->  one list of genes  ->  rows drawn with replacement
                             ->  Cells, data set after data set, as collections lie on disk
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from geneformer_mcore.io.h5ad import CountsFile
from geneformer_mcore.tokenizer.dictionary import import_dictionary
from geneformer_mcore.tokenizer.genes import find_gene_ids
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

POOL_CELLS = 2000
_POOL_SETS = 4
_GENES, _KNOWN_SHARE = 20_000, 0.86
"""Made-up cells have the genes of a usual file, as many of them in the vocabulary, and some 1,700
non-zeros each: what the real cells have that this project is tested with."""


@dataclass(frozen=True)
class Cells:
    """Raw counts in source order.

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

    @property
    def cell_ids(self) -> list[str]:
        """One name per cell; its number is the cell's place in source order."""
        return [f"c{row:08d}" for row in range(len(self))]

    @property
    def dataset_ids(self) -> list[str]:
        """The data set's name of each cell."""
        return [f"set{number}" for number in self.dataset_N]


def draw(
    paths: Sequence[Path], medians: Path | None, num_cells: int, seed: int
) -> tuple[Cells, Cells]:
    """(`num_cells` cells, one batch of 128 to warm up with), from `paths` or made up.

    medians: {gene id: median} of the vocabulary; None: those of the cells that are drawn from
    """
    rng = np.random.default_rng(seed)
    if paths:
        sets, gene_ids = _real_sets(paths)
        known = np.ones(len(gene_ids), dtype=bool)
    else:
        sets, gene_ids = _made_up_sets(rng)
        known = rng.random(len(gene_ids)) < _KNOWN_SHARE
    if medians is None:
        vocabulary = _vocabulary(sparse.vstack(sets, format="csr"), gene_ids, known)
    else:
        vocabulary = import_dictionary(medians)
    kept = np.array([gene in vocabulary.token_ids for gene in gene_ids])
    # Cells without a token have no place in a store of tokens: nobody is given one.
    sets = [counts[counts[:, kept].getnnz(axis=1) > 0] for counts in sets]
    return (
        _drawn(sets, gene_ids, vocabulary, num_cells, rng),
        _drawn(sets, gene_ids, vocabulary, 128, rng),
    )


def _drawn(
    sets: list[sparse.csr_matrix],
    gene_ids: list[str],
    vocabulary: Vocabulary,
    num_cells: int,
    rng: np.random.Generator,
) -> Cells:
    sizes = np.array([counts.shape[0] for counts in sets])
    ends = np.rint(num_cells * np.cumsum(sizes) / sizes.sum()).astype(int)
    shares = np.diff(ends, prepend=0)
    rows = [rng.integers(0, size, share) for size, share in zip(sizes, shares, strict=True)]
    parts = [counts[these] for counts, these in zip(sets, rows, strict=True)]
    dataset_N = np.repeat(np.arange(len(sets)), shares).astype(np.int16)
    return Cells(sparse.vstack(parts, format="csr"), gene_ids, dataset_N, vocabulary)


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
    """Columns moved to the genes' places, those of one gene summed, those without a gene left."""
    named = [column for column, gene in enumerate(ids) if gene]
    target = [place[ids[column]] for column in named]
    moves = sparse.csr_matrix((np.ones(len(named)), (named, target)), (len(ids), len(place)))
    moved = sparse.csr_matrix(counts @ moves, dtype=np.float32)
    moved.eliminate_zeros()
    moved.sort_indices()
    return moved


def _made_up_sets(rng: np.random.Generator) -> tuple[list[sparse.csr_matrix], list[str]]:
    gene_ids = [f"ENSG{number:011d}" for number in range(_GENES)]
    common = rng.lognormal(0.0, 2.0, _GENES)
    sets = []
    for _ in range(_POOL_SETS):
        # Each data set prefers genes of its own, as tissues do.
        share = np.cumsum(common * rng.lognormal(0.0, 0.7, _GENES))
        rows = []
        for _ in range(POOL_CELLS // _POOL_SETS):
            reads = int(rng.lognormal(8.0, 0.5))
            columns = np.searchsorted(share, rng.random(reads) * share[-1])
            rows.append(np.bincount(columns, minlength=_GENES).astype(np.float32))
        sets.append(sparse.csr_matrix(np.stack(rows)))
    return sets, gene_ids


def _vocabulary(counts: sparse.csr_matrix, gene_ids: list[str], known: np.ndarray) -> Vocabulary:
    """The genes that the cells express, with the medians of their non-zero normalised counts."""
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64)
    columns = sparse.csc_matrix(counts.multiply(10_000.0 / totals))
    medians = {
        gene_ids[column]: float(np.median(columns.data[start:stop]))
        for column, (start, stop) in enumerate(
            zip(columns.indptr[:-1], columns.indptr[1:], strict=True)
        )
        if known[column] and stop > start
    }
    return Vocabulary.from_medians(medians)
