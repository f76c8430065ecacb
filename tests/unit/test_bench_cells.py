"""The cells and the formats that contestants are given."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from benchmarks.peers.token_files import tokens_dense, tokens_h5ad
from benchmarks.side_by_side import cells as module
from benchmarks.side_by_side.cells import Cells, draw
from benchmarks.side_by_side.prepared import Prepared, write
from geneformer_mcore.contracts import CLS, PAD
from tests.small_cells import gene_id, random_counts, vocabulary_of, write_h5ad

NUM_CELLS = 200


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL_CELLS", 40)
    monkeypatch.setattr(module, "_GENES", 300)


@pytest.mark.usefixtures("small_pool")
def test_made_up_cells_are_the_same_each_time() -> None:
    (one, few), (other, _) = (draw([], None, NUM_CELLS, seed=3) for _ in range(2))
    assert (len(one), len(few)) == (NUM_CELLS, 128)
    assert (one.counts != other.counts).nnz == 0
    assert (one.counts != draw([], None, NUM_CELLS, seed=4)[0].counts).nnz > 0
    assert np.all(np.diff(one.dataset_N) >= 0)
    assert one.dataset_N[0] != one.dataset_N[-1]
    share = np.count_nonzero(one.token_of_column) / len(one.gene_ids)
    assert 0.7 < share < 0.95


def test_files_are_laid_on_the_genes_of_all(rng: np.random.Generator, tmp_path: Path) -> None:
    first, second = random_counts(rng, 30, 5, 0.9), random_counts(rng, 90, 4, 0.9)
    genes = {
        "a": [gene_id(3), gene_id(1), "", gene_id(0), gene_id(1)],
        "b": [gene_id(i) for i in (7, 1, 3, 9)],
    }
    paths = [
        write_h5ad(tmp_path / f"{name}.h5ad", counts, var={"ensembl_id": genes[name]})
        for name, counts in (("a", first), ("b", second))
    ]
    found, _ = draw(paths, None, NUM_CELLS, seed=0)
    assert found.gene_ids == [gene_id(i) for i in (0, 1, 3, 7, 9)]
    assert found.dataset_N.tolist() == [0] * 50 + [1] * 150, "as many as the files have cells"
    dense = first.toarray()
    on_genes = np.stack([dense[:, 3], dense[:, 1] + dense[:, 4], dense[:, 0]], axis=1)
    expected = {tuple(row) for row in np.pad(on_genes, ((0, 0), (0, 2)))}
    assert {tuple(row) for row in found.counts[:50].toarray()} <= expected


def small_cells(rng: np.random.Generator, num_cells: int) -> Cells:
    counts = sparse.csr_matrix(random_counts(rng, num_cells, 60))
    gene_ids = [gene_id(i) for i in range(60)]
    dataset_N = np.sort(rng.integers(0, 3, num_cells)).astype(np.int16)
    return Cells(counts, gene_ids, dataset_N, vocabulary_of(60))


@pytest.fixture
def prepared(rng: np.random.Generator, tmp_path: Path) -> Prepared:
    return write(small_cells(rng, 70), tmp_path / "cells")


def test_truth_is_of_the_cells(prepared: Prepared) -> None:
    counts = anndata.read_h5ad(prepared.counts_file)
    truth = Prepared(prepared.folder).truth
    assert np.array_equal(truth.count_sums_N, np.asarray(counts.X.sum(1)).ravel())
    for row, (start, stop) in enumerate(
        zip(prepared.offsets[:-1], prepared.offsets[1:], strict=True)
    ):
        tokens = prepared.tokens_T[start:stop]
        assert tokens[0] == CLS
        assert truth.token_sums_N[row] == tokens.sum()
        assert truth.num_tokens_N[row] == len(tokens)
    assert len(np.unique(truth.keys_N)) == len(prepared) == 70


def test_tokens_survive_each_format(prepared: Prepared) -> None:
    tokens_h5ad(prepared)
    tokens_dense(prepared)
    ranks = anndata.read_h5ad(prepared.place("tokens_h5ad")).X
    dense = np.load(prepared.place("tokens_dense"))
    for row, (start, stop) in enumerate(
        zip(prepared.offsets[:-1], prepared.offsets[1:], strict=True)
    ):
        tokens = prepared.tokens_T[start:stop]
        assert np.array_equal(ranks[row].data, tokens[1:])
        assert np.array_equal(ranks[row].indices, np.arange(len(tokens) - 1))
        assert np.array_equal(dense[row, : len(tokens)], tokens)
        assert np.all(dense[row, len(tokens) :] == PAD)
