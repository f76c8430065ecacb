"""Small files of counts and vocabularies for tests, damage, and a plain reference encoding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import CLS, NUM_SPECIALS


def gene_id(number: int) -> str:
    """An id of Ensembl's form."""
    return f"ENSG{number:011d}"


def gene_ids(numbers: int | Iterable[int]) -> list[str]:
    """Ids of the genes of these numbers, or of the first so many."""
    return [gene_id(number) for number in (range(numbers) if isinstance(numbers, int) else numbers)]


def vocabulary_of(num_genes: int, medians: np.ndarray | None = None) -> Vocabulary:
    """The genes 0..num_genes - 1; their medians, by default, differ and are not sorted."""
    if medians is None:
        medians = 0.5 + (np.arange(num_genes) * 7919 % 1000) / 250
    return Vocabulary.from_medians(dict(zip(gene_ids(num_genes), map(float, medians), strict=True)))


def random_counts(
    rng: np.random.Generator, num_cells: int, num_genes: int, density: float = 0.2
) -> sparse.csr_matrix:
    """Whole counts as cells have them: most 0, many 1, a few large; no cell is empty."""
    expressed = rng.random((num_cells, num_genes)) < density
    counts = np.ceil(rng.lognormal(0.0, 1.2, (num_cells, num_genes))) * expressed
    counts[np.arange(num_cells), rng.integers(0, num_genes, num_cells)] += 1
    return sparse.csr_matrix(counts.astype(np.float32))


def block_of(counts: sparse.csr_matrix) -> CountBlock:
    """A matrix as one block."""
    return CountBlock(
        counts.data.astype(np.float64),
        counts.indices.astype(np.int32),
        counts.indptr.astype(np.int64),
    )


def plain_tokens(
    counts: np.ndarray, token_of_column: np.ndarray, vocabulary: Vocabulary, seq_length: int
) -> np.ndarray:
    """The encoding of one cell (float64 counts by column), as plainly as it can be written."""
    by_token = np.zeros(vocabulary.size)
    np.add.at(by_token, token_of_column, counts)
    by_token[:NUM_SPECIALS] = 0
    tokens = np.flatnonzero(by_token)
    values = ((by_token[tokens] / counts.sum()) * 10_000) / vocabulary.medians_of_token[tokens]
    ranked = tokens[np.argsort(-values, kind="stable")]
    return np.concatenate([[CLS], ranked])[:seq_length]


def adata_of(
    counts: object,
    genes: Iterable[str] | None = None,
    obs: dict[str, object] | None = None,
    cell_ids: Iterable[str] | None = None,
    var: dict[str, object] | None = None,
    **parts: object,
) -> anndata.AnnData:
    """Cells in memory; genes are 0, 1, ... and cells c0, c1, ... unless named."""
    num_cells, num_genes = counts.shape  # type: ignore[attr-defined]
    cells = cell_ids or [f"c{number}" for number in range(num_cells)]
    return anndata.AnnData(
        counts,
        obs=pd.DataFrame(obs or {}, index=pd.Index(cells)),
        var=pd.DataFrame(var or {}, index=pd.Index(genes or gene_ids(num_genes))),
        **parts,
    )


def write_h5ad(
    path: Path, counts: object, gene_ids: Iterable[str] | None = None, **parts: object
) -> Path:
    """The cells of adata_of as an h5ad file."""
    adata_of(counts, gene_ids, **parts).write_h5ad(path)  # type: ignore[arg-type]
    return path


def flip_bit(path: Path, byte: int, bit: int = 0) -> bytes:
    """Flip one bit of a file; returns what it held before."""
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[byte] ^= 1 << bit
    path.write_bytes(damaged)
    return sound
