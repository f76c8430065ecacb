"""Rank-value encoding equals a plain stable float64 sort, token for token; its compiled loops."""

from __future__ import annotations

from types import FunctionType
from unittest.mock import Mock

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from geneformer_mcore import backends as module
from geneformer_mcore.errors import DataError
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.h5ad import CountsFile
from geneformer_mcore.tokenizer.dictionary import import_dictionary
from geneformer_mcore.tokenizer.genes import find_gene_ids, map_genes
from geneformer_mcore.tokenizer.rank_encoder import RankedCells, RankEncoder
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import CLS, NUM_SPECIALS
from tests.support.small_cells import block_of, plain_tokens, random_counts, vocabulary_of


def encode(
    counts: object, columns: object, vocabulary: Vocabulary, seq_length: int = 10
) -> RankedCells:
    """Ranked cells of a matrix, or a block; columns: the token of each, or their number."""
    block = counts if isinstance(counts, CountBlock) else block_of(sparse.csr_matrix(counts))
    columns = in_order(columns) if isinstance(columns, int) else np.array(columns, np.int32)
    return RankEncoder(vocabulary, seq_length).encode(block, columns)


def lists(ranked: RankedCells) -> list[list[int]]:
    return [part.tolist() for part in np.split(ranked.tokens_T, ranked.offsets[1:-1])]


def in_order(num_genes: int) -> np.ndarray:
    return np.arange(NUM_SPECIALS, NUM_SPECIALS + num_genes, dtype=np.int32)


def assert_as_plain(counts, token_of_column, vocabulary, seq_length: int = 2048) -> None:
    found = lists(encode(counts, token_of_column, vocabulary, seq_length))
    assert len(found) == counts.shape[0]
    for cell, tokens in enumerate(found):
        row = counts[cell].toarray().ravel().astype(np.float64)
        expected = plain_tokens(row, token_of_column, vocabulary, seq_length)
        np.testing.assert_array_equal(tokens, expected, err_msg=f"cell {cell}")


@pytest.mark.parametrize("num_genes", [3, 50, 2000])
@pytest.mark.parametrize("seq_length", [2, 20, 2048])
def test_random_cells(rng, num_genes, seq_length) -> None:
    counts = random_counts(rng, 60, num_genes, density=0.5)
    columns = rng.permutation(in_order(num_genes))
    columns[rng.random(num_genes) < 0.2] = 0
    assert_as_plain(counts, columns, vocabulary_of(num_genes), seq_length)


def test_exact_ties_follow_the_token_id(rng) -> None:
    vocabulary = vocabulary_of(3000, np.ones(3000))
    counts = sparse.csr_matrix(rng.integers(0, 3, (20, 3000)).astype(np.float32))
    columns = rng.permutation(in_order(3000))
    assert_as_plain(counts, columns, vocabulary)
    tokens = lists(encode(counts, columns, vocabulary, 2048))[0]
    assert np.any(np.diff(tokens[1:500]) > 0)


def test_near_ties_that_float32_cannot_tell_apart(rng) -> None:
    # Medians a few float64 steps apart: every cell is one run of equal float32 bits.
    medians = 1.0 + rng.integers(0, 40, 1500) * np.finfo(np.float64).eps
    counts = sparse.csr_matrix(np.ones((5, 1500), dtype=np.float32))
    assert_as_plain(counts, rng.permutation(in_order(1500)), vocabulary_of(1500, medians))


def test_order_of_evaluation_decides_near_ties(rng) -> None:
    # Pairs of genes whose values would be equal without rounding: (b k) / (b / 10) and
    # (3 b k) / (3 b / 10). Which leads is decided by the rounding of each step.
    base = rng.integers(1, 60, 200).astype(np.float64)
    medians = np.concatenate([base * 0.1, base * 0.3])
    rows = np.array([np.concatenate([base * k, base * 3 * k]) for k in range(1, 20)])
    totals = rows.sum(axis=1, keepdims=True)
    ours = np.argsort(-(rows / totals * 10_000 / medians), kind="stable")
    for other in (rows / medians / totals * 10_000, rows * 10_000 / totals / medians):
        assert (np.argsort(-other, kind="stable") != ours).any(axis=1).all()
    counts = sparse.csr_matrix(rows.astype(np.float32))
    assert_as_plain(counts, in_order(400), vocabulary_of(400, medians))


@pytest.mark.parametrize("exponent", [10, 30])
def test_wide_range_of_values(rng, exponent) -> None:
    medians = 10.0 ** rng.uniform(-exponent, exponent, 500)
    counts = random_counts(rng, 30, 500, density=0.8)
    assert_as_plain(counts, in_order(500), vocabulary_of(500, medians))


@st.composite
def small_cells(draw):
    """(counts, token of each column, medians) of one cell."""

    def values(each):
        return draw(st.lists(each, min_size=num_genes, max_size=num_genes))

    num_genes = draw(st.integers(1, 90))
    row = np.array([values(st.integers(0, 4))], np.float32)
    columns = np.array(values(st.integers(NUM_SPECIALS - 1, NUM_SPECIALS + num_genes - 1)))
    columns[columns < NUM_SPECIALS] = 0
    return row, columns, np.array(values(st.sampled_from([0.5, 1.0, 2.0, 3.0])))


@given(small_cells())
def test_any_small_cell(cell) -> None:
    row, columns, medians = cell
    if row.sum():
        assert_as_plain(sparse.csr_matrix(row), columns, vocabulary_of(len(medians), medians), 30)


def test_columns_of_one_gene_are_summed_before_ranking() -> None:
    # Gene 1 leads by its sum, though no single column of it does.
    ranked = encode([[3.0, 2, 2, 1]], [5, 6, 6, 0], vocabulary_of(2, np.ones(2)))
    assert lists(ranked) == [[CLS, 6, 5]]
    assert (ranked.n_counts_N, ranked.known_counts_N) == ([8], [7])
    assert (ranked.n_genes_N, ranked.n_known_N) == ([4], [2])


def test_stored_zeros_and_repeated_entries() -> None:
    # Row 0 stores zeros; row 1 names column 1 twice; row 2 has its columns out of order.
    block = CountBlock(
        data=np.array([0.0, 2.0, 0.0, 1.0, 3.0, 2.0, 1.0, 5.0]),
        indices=np.array([0, 1, 2, 1, 2, 1, 2, 0], dtype=np.int32),
        indptr=np.array([0, 3, 6, 8]),
    )
    ranked = encode(block, 3, vocabulary_of(3, np.ones(3)))
    assert lists(ranked) == [[0, 6], [0, 6, 7], [0, 5, 7]]
    assert ranked.n_genes_N.tolist() == [1, 3, 2]


def test_cells_without_a_known_gene_have_cls_alone_and_a_block_may_be_empty() -> None:
    ranked = encode([[0.0, 0], [0, 4], [2, 0]], [5, 0], vocabulary_of(1))
    assert lists(ranked) == [[CLS], [CLS], [CLS, 5]]
    assert ranked.n_known_N.tolist() == [0, 0, 1]
    ranked = encode(np.zeros((0, 1), np.float32), 1, vocabulary_of(1))
    assert (len(ranked), ranked.offsets.tolist(), len(ranked.tokens_T)) == (0, [0], 0)


def test_seq_length_must_hold_a_gene() -> None:
    with pytest.raises(DataError, match="at least 2"):
        RankEncoder(vocabulary_of(1), 1)


@pytest.mark.parametrize(
    "name", ["heart_san_1k", "lca_lung_1k", "marrow_cd34_palantir", "pbmc3k_labelled"]
)
def test_a_thousand_real_cells(shared_data, name) -> None:
    vocabulary = import_dictionary(shared_data / "dicts" / "gc30m_gene_medians.json")
    with CountsFile(shared_data / f"{name}.h5ad") as file:
        genes = find_gene_ids(file.gene_columns(), vocabulary.token_ids)
        columns = map_genes(genes, vocabulary, file).token_of_column
        block = file.read_rows(0, 1000)
    counts = sparse.csr_matrix((block.data, block.indices, block.indptr), (1000, len(columns)))
    assert_as_plain(counts, columns, vocabulary)


def test_compiled_without_a_place_for_the_cache(monkeypatch) -> None:
    # Numba raises this error for code that is in no file.
    code = compile("lambda number: number * 2", "<nowhere>", "eval")
    function = FunctionType(code.co_consts[0], {})
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(function)
    asked = Mock(wraps=numba.njit)
    monkeypatch.setattr(numba, "njit", asked)
    assert module.compiled(function)(4) == 8
    assert [call.kwargs.get("cache", False) for call in asked.call_args_list] == [True, False]
