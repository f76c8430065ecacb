"""Cells are found again by their content, whatever they are called and whichever genes are left."""

from __future__ import annotations

import functools
from pathlib import Path

import anndata
import numpy as np
import pytest

from geneformer_mcore.data.counts_source import CountsSource
from geneformer_mcore.inference import data_leakage
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.inference.data_leakage import Overlap, TrainingCells
from geneformer_mcore.store.split.table import RandomSplit
from geneformer_mcore.tokenizer.corpus import InputOptions
from geneformer_mcore.tokenizer.dictionary import import_dictionary
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS, RaggedCells
from tests.small_cells import gene_id, random_counts, vocabulary_of, write_h5ad

NUM_CELLS, NUM_GENES, SEQ_LENGTH = 60, 900, 200


class InMemory:
    """Cells as a TokenSource, and as those that are looked for."""

    def __init__(self, cells: RaggedCells) -> None:
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def read(self, start: int, stop: int) -> RaggedCells:
        offsets = self.cells.offsets[start : stop + 1]
        tokens = self.cells.tokens_T[offsets[0] : offsets[-1]]
        return RaggedCells(tokens, offsets - offsets[0], self.cells.keys_N[start:stop])


@functools.cache
def opened(path: Path, vocabulary: Vocabulary) -> tuple[RaggedCells, np.ndarray]:
    """(cells, which tokens' genes their file has)."""
    cells = CountedCells(str(path), vocabulary, SEQ_LENGTH, InputOptions())
    has_gene_V = np.zeros(vocabulary.size, bool)
    has_gene_V[cells.genes.token_of_column] = True
    read = cells.read(0, len(cells))
    cells.close()
    return read, has_gene_V


def compared(judged: Path, trained_on: Path, vocabulary: Vocabulary) -> Overlap:
    """What overlap.find says of two files."""
    training, _ = opened(trained_on, vocabulary)
    cells, has_gene_V = opened(judged, vocabulary)
    source = TrainingCells("", InMemory(training), 0, len(training), SEQ_LENGTH)
    return data_leakage.find(InMemory(cells), has_gene_V, source)


def compared_with_all(judged: Path, files: list[Path], vocabulary: Vocabulary) -> Overlap:
    """The same of several training files, as data.source=counts has them."""
    source = CountsSource(list(map(str, files)), vocabulary, SEQ_LENGTH, RandomSplit(0.0))
    cells, has_gene_V = opened(judged, vocabulary)
    training = TrainingCells("", source, 0, len(source), SEQ_LENGTH, source.datasets)
    try:
        return data_leakage.find(InMemory(cells), has_gene_V, training)
    finally:
        source.close()


def test_the_same_cells_under_other_names_with_fewer_genes_are_found(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    counts = random_counts(rng, NUM_CELLS, NUM_GENES)
    trained_on = write_h5ad(tmp_path / "a.h5ad", counts[:40])
    genes = rng.permutation(NUM_GENES)[:600]
    rows = rng.permutation(NUM_CELLS)
    ids = [gene_id(number) for number in genes]
    names = [f"other{row}" for row in rows]
    judged = write_h5ad(tmp_path / "b.h5ad", counts[rows][:, genes], ids, cell_ids=names)
    found = compared(judged, trained_on, vocabulary_of(NUM_GENES))
    np.testing.assert_array_equal(found.same_N, rows < 40)
    assert found.share_N[rows < 40].min() > 0.8
    assert found.share_N[rows >= 40].max() < 0.05
    assert found.num_training == 40
    assert not found.too_short_N.any()


def test_the_training_file_may_be_the_one_with_fewer_genes(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    counts = random_counts(rng, NUM_CELLS, NUM_GENES)
    ids = [gene_id(number) for number in range(300)]
    fewer = write_h5ad(tmp_path / "fewer.h5ad", counts[:40, :300], ids)
    whole = write_h5ad(tmp_path / "whole.h5ad", counts)
    found = compared(whole, fewer, vocabulary_of(NUM_GENES))
    np.testing.assert_array_equal(found.same_N, np.arange(NUM_CELLS) < 40)


def test_each_training_file_is_compared_by_its_own_genes(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """A copy with half the genes, beside strangers with all of them."""
    counts = random_counts(rng, 2 * NUM_CELLS, NUM_GENES)
    half = rng.permutation(NUM_GENES)[: NUM_GENES // 2]
    ids = [gene_id(number) for number in half]
    names = [f"other{number}" for number in range(40)]
    fewer = write_h5ad(tmp_path / "fewer.h5ad", counts[:40, half], ids, cell_ids=names)
    strangers = write_h5ad(tmp_path / "strangers.h5ad", counts[NUM_CELLS:])
    judged = write_h5ad(tmp_path / "judged.h5ad", counts[:NUM_CELLS])
    found = compared_with_all(judged, [fewer, strangers], vocabulary_of(NUM_GENES))
    np.testing.assert_array_equal(found.same_N, np.arange(NUM_CELLS) < 40)
    assert found.num_training == 40 + NUM_CELLS


def test_blocks_make_no_difference(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = random_counts(rng, NUM_CELLS, NUM_GENES)
    training = write_h5ad(tmp_path / "a.h5ad", counts[20:50])
    judged = write_h5ad(tmp_path / "b.h5ad", counts)
    whole = compared(judged, training, vocabulary_of(NUM_GENES))
    for module in (data_leakage, data_leakage):
        monkeypatch.setattr(module, "BLOCK_CELLS", 7)
    parts = compared(judged, training, vocabulary_of(NUM_GENES))
    np.testing.assert_array_equal(whole.share_N, parts.share_N)
    assert whole.same_N.sum() == 30


def test_cells_of_few_genes_cannot_be_told_apart_and_are_counted(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    counts = random_counts(rng, NUM_CELLS, NUM_GENES).toarray()
    few = np.zeros_like(counts[:3])
    few[0, :18], few[1, :19], few[2, :1] = 1, 1, 5
    a = write_h5ad(tmp_path / "a.h5ad", np.concatenate([counts, few]))
    found = compared(a, a, vocabulary_of(NUM_GENES))
    assert found.too_short_N[NUM_CELLS:].tolist() == [True, False, True]
    assert found.same_N[NUM_CELLS:].tolist() == [False, True, False]
    assert found.same_N[:NUM_CELLS].all()
    assert found.num_training_too_short == 2
    assert found.num_training == NUM_CELLS + 1


def test_windows_are_told_apart_exactly() -> None:
    tokens = np.array([5, 6, 7, 8, 9, 65_535, 8, 7, 6, 5, 4], np.uint16)
    cells = RaggedCells(tokens, np.array([0, 5, 11]), np.zeros(2, np.uint64))
    both_V = np.ones(65_536, bool)
    both_V[:NUM_SPECIALS] = False
    owners, windows = data_leakage._windows(cells, both_V[None], np.zeros(2, int))
    assert owners.tolist() == [0, 0, 1, 1]
    assert len(set(windows.tolist())) == 4
    assert windows[0] == 5 | 6 << 16 | 7 << 32 | 8 << 48


def test_nothing_in_common_is_no_overlap(rng: np.random.Generator, tmp_path: Path) -> None:
    counts = random_counts(rng, 8, 200)
    a = write_h5ad(tmp_path / "a.h5ad", counts, [gene_id(number) for number in range(200)])
    b = write_h5ad(tmp_path / "b.h5ad", counts, [gene_id(number + 200) for number in range(200)])
    found = compared(b, a, vocabulary_of(400))
    assert not found.same_N.any()
    assert found.too_short_N.all()


@pytest.fixture(scope="module")
def first_corpus(shared_data: Path) -> Vocabulary:
    """Geneformer's own genes and medians."""
    return import_dictionary(shared_data / "dicts" / "gc30m_gene_medians.json")


def test_pbmc3k_of_two_sources(
    shared_data: Path, first_corpus: Vocabulary, rng: np.random.Generator, tmp_path: Path
) -> None:
    """13,714 filtered genes by symbol against 32,738, other names and ids."""
    labelled, raw = shared_data / "pbmc3k_labelled.h5ad", shared_data / "pbmc3k_raw.h5ad"
    found = compared(labelled, raw, first_corpus)
    assert found.same_N.all()
    assert found.share_N.min() > 0.9
    cells = anndata.read_h5ad(labelled)
    genes = np.sort(rng.permutation(cells.n_vars)[: cells.n_vars // 2])
    cells[:, genes].copy().write_h5ad(tmp_path / "half.h5ad")
    half = compared(tmp_path / "half.h5ad", raw, first_corpus)
    assert half.same_N.all()
    assert half.share_N.min() > 0.9
    back = compared(raw, labelled, first_corpus)
    assert int(back.same_N.sum()) == len(found.same_N), "62 more are in the raw file alone"
    assert back.share_N[~back.same_N].max() < 0.05


@pytest.mark.parametrize("other", ["marrow_cd34_palantir", "heart_san_1k", "lca_lung_1k"])
def test_real_cells_of_other_studies_are_others(
    other: str, shared_data: Path, first_corpus: Vocabulary
) -> None:
    judged, trained_on = shared_data / "pbmc3k_labelled.h5ad", shared_data / f"{other}.h5ad"
    found = compared(judged, trained_on, first_corpus)
    assert not found.same_N.any()
    assert found.share_N.max() < 0.05


def test_cells_of_one_study_are_not_taken_for_each_other(
    shared_data: Path, first_corpus: Vocabulary, tmp_path: Path
) -> None:
    cells = anndata.read_h5ad(shared_data / "heart_san_1k.h5ad")
    for name, rows in (("a", slice(0, 500)), ("b", slice(500, None))):
        cells[rows].copy().write_h5ad(tmp_path / f"{name}.h5ad")
    found = compared(tmp_path / "a.h5ad", tmp_path / "b.h5ad", first_corpus)
    assert not found.same_N.any()
    assert found.share_N.max() < 0.05
