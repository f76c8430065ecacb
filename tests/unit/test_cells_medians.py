"""Medians of a corpus, exact, and the vocabulary they make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from geneformer_mcore.cells.corpus import InputOptions, build_vocabulary, describe_other_ids
from geneformer_mcore.cells.medians import MedianCollector
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError
from tests.small_cells import block_of, gene_id, random_counts, write_h5ad


def plain_medians(dense: np.ndarray, ids: list[str]) -> dict[str, float]:
    distinct = sorted({gene for gene in ids if gene})
    summed = np.zeros((len(dense), len(distinct)))
    for column, gene in enumerate(ids):
        if gene:
            summed[:, distinct.index(gene)] += dense[:, column]
    scaled = summed / dense.sum(axis=1, keepdims=True) * 10_000
    return {
        gene: float(np.median(values[values > 0]))
        for gene, values in zip(distinct, scaled.T, strict=True)
        if np.any(values > 0)
    }


def test_medians_over_files_and_blocks(rng: np.random.Generator) -> None:
    counts = random_counts(rng, 90, 30, density=0.1)
    ids = [gene_id(number % 25) for number in range(30)]
    ids[3] = ""
    counts = sparse.csr_matrix(counts.toarray() * (np.arange(30) != 7))  # Gene 7: never expressed.
    collector = MedianCollector()
    collector.add([block_of(counts[:20]), block_of(counts[20:50])], ids)
    # Another file has its columns the other way round.
    collector.add([block_of(sparse.csr_matrix(counts[50:].toarray()[:, ::-1]))], ids[::-1])
    expected = plain_medians(counts.toarray().astype(np.float64), ids)
    assert collector.medians() == expected
    assert gene_id(7) not in expected


def test_nothing_expressed_is_refused() -> None:
    with pytest.raises(DataError, match="no cell expresses a gene"):
        MedianCollector().vocabulary()


def test_vocabulary_of_files(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = random_counts(rng, 40, 12)
    symbols = [f"S{number}" for number in range(12)]
    first = write_h5ad(tmp_path / "a.h5ad", counts[:15], var={"gene_symbol": symbols})
    second = write_h5ad(
        tmp_path / "b.h5ad",
        counts[15:],
        gene_ids=symbols,
        var={"ensembl_id": [f"{gene_id(number)}.4" for number in range(12)]},
    )
    vocabulary = build_vocabulary([first, second], InputOptions())
    ids = [gene_id(number) for number in range(12)]
    expected = plain_medians(counts.toarray().astype(np.float64), ids)
    assert dict(zip(vocabulary.feature_ids, vocabulary.medians, strict=True)) == expected
    assert vocabulary.names == tuple(symbols)
    assert build_vocabulary([second, first], InputOptions()) == vocabulary


def test_other_ids_are_told_but_taken(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = random_counts(rng, 30, 4, density=0.9)
    ids = ["TP53", "YAL001C", "FBgn0000001", gene_id(1)]
    file = write_h5ad(tmp_path / "a.h5ad", counts, gene_ids=ids)
    vocabulary = build_vocabulary([file], InputOptions())
    assert set(vocabulary.feature_ids) == set(ids)
    told = describe_other_ids(vocabulary)
    assert told is not None
    assert "3 of 4 gene ids look like symbols" in told
    assert "(FBgn0000001, TP53, YAL001C)" in told
    assert "--symbols FILE" in told
    mostly = Vocabulary.from_medians({gene_id(1): 1.0, gene_id(2): 1.0, "TP53": 1.0})
    assert describe_other_ids(mostly) is None
    mouse = Vocabulary.from_medians({"ENSMUSG00000059552": 1.0})
    assert describe_other_ids(mouse) is None


def test_ids_of_two_kinds_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    counts = random_counts(rng, 5, 3)
    first = write_h5ad(tmp_path / "a.h5ad", counts)
    second = write_h5ad(tmp_path / "b.h5ad", counts, gene_ids=["TP53", "MYC", "GATA1"])
    with pytest.raises(DataError, match=r"b\.h5ad names 0%.*--symbols"):
        build_vocabulary([first, second], InputOptions())
    symbols = {"TP53": gene_id(0), "MYC": gene_id(1)}
    vocabulary = build_vocabulary([first, second], InputOptions(symbols=symbols))
    assert set(vocabulary.feature_ids) <= {gene_id(number) for number in range(3)}
