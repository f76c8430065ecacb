"""Cells tokenised on the fly: the very cells of a token store, in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from geneformer_mcore.data import counts_source
from geneformer_mcore.data.counts_source import CountsSource, find_inputs
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import SPLITS, RandomSplit
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import CLS
from tests.support.small_cells import gene_ids, write_h5ad

GENES = gene_ids(60)
VOCABULARY = Vocabulary.from_medians({gene: 1.0 + i / 7 for i, gene in enumerate(GENES[:50])})
SEQ_LENGTH = 32
SPLIT = RandomSplit(0.2, 0.1)


def opened(*files: str | Path, **changes: Any) -> CountsSource:
    settings = {"vocabulary": VOCABULARY, "seq_length": SEQ_LENGTH, "split": SPLIT} | changes
    return CountsSource([str(file) for file in files], *settings.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Three data sets; in the second, row 7 has genes that the vocabulary does not know, alone."""
    folder = tmp_path_factory.mktemp("counts")
    rng = np.random.default_rng(3)
    paths = []
    for name, num_cells in {"b": 90, "a": 130, "c": 41}.items():
        counts = rng.poisson(1.2, (num_cells, 60)).astype(np.float32)
        if name == "a":
            counts[7, :50], counts[7, 50:] = 0, 3
        cells = [f"{name}{i}" for i in range(num_cells)]
        path = folder / f"{name}.h5ad"
        paths.append(str(write_h5ad(path, sparse.csr_matrix(counts), GENES, cell_ids=cells)))
    return paths


@pytest.fixture
def source(files) -> CountsSource:
    return opened(*files)


@pytest.fixture(scope="module")
def store(files, tmp_path_factory) -> TokenStore:
    out = tmp_path_factory.mktemp("built") / "store"
    build_store(files, out, VOCABULARY, SEQ_LENGTH, split_rule=SPLIT)
    return TokenStore.open(out)


def cells_of(source: CountsSource | TokenStore, split: str) -> dict[int, list[int]]:
    start, stop = source.rows(split)
    block = source.read(start, stop)
    parts = np.split(block.tokens_T, block.offsets[1:-1])
    return {int(key): part.tolist() for key, part in zip(block.keys_N, parts, strict=True)}


def test_cells_are_those_of_the_store(source, store) -> None:
    """And one that the vocabulary does not know, which a store skips."""
    unknown = []
    for split in SPLITS:
        ours, stored = cells_of(source, split), cells_of(store, split)
        unknown += [ours.pop(key) for key in ours.keys() - stored.keys()]
        assert ours == stored
        assert len(stored) > 10
    assert unknown == [[CLS]]


def test_any_span_is_that_part_of_the_whole(source, monkeypatch) -> None:
    whole = source.read(0, len(source))
    monkeypatch.setattr(counts_source, "_ROWS_PER_READ", 13)
    for start, stop in ((0, 1), (5, 40), (100, 190), (0, len(source)), (17, 17)):
        part = source.read(start, stop)
        first, last = whole.offsets[start], whole.offsets[stop]
        assert np.array_equal(part.tokens_T, whole.tokens_T[first:last])
        assert np.array_equal(part.offsets, whole.offsets[start : stop + 1] - first)
        assert np.array_equal(part.keys_N, whole.keys_N[start:stop])


def test_the_content_hash_depends_on_what_cells_depend_on(files, source, tmp_path) -> None:
    """Cells, counts, split, length and vocabulary, not the order of the files."""
    reversed_files = opened(*files[::-1])
    assert reversed_files.content_hash == source.content_hash
    assert np.array_equal(reversed_files.read(0, 50).tokens_T, source.read(0, 50).tokens_T)
    changed = ad.read_h5ad(files[2])
    changed.X.data = changed.X.data[::-1].copy()
    changed.write_h5ad(tmp_path / "c.h5ad")
    others = [
        opened(*files[:2]),
        opened(*files[:2], tmp_path / "c.h5ad"),
        opened(*files, split=RandomSplit(0.1, 0.1)),
        opened(*files, seq_length=16),
        opened(*files, vocabulary=Vocabulary.from_medians(dict.fromkeys(GENES[:40], 2.0))),
    ]
    assert len({each.content_hash for each in [source, *others]}) == 6


def test_a_cell_given_twice_is_refused(files, tmp_path) -> None:
    twin = tmp_path / "a.h5ad"
    twin.write_bytes(Path(files[1]).read_bytes())
    with pytest.raises(DataError, match="130 cells have the dataset and the name of another one"):
        opened(*files, twin)


def test_inputs_that_a_store_setting_names(files, tmp_path) -> None:
    folder = str(Path(files[0]).parent)
    assert find_inputs(folder) == sorted(files)
    assert find_inputs(f"{files[0]}, {files[2]}") == [files[0], files[2]]
    assert find_inputs("s3://bucket/experiment") == ["s3://bucket/experiment"]
    assert find_inputs(f"{files[0]},") == [files[0]], "a comma at the end names nothing"
    assert find_inputs(str(tmp_path)) == [str(tmp_path)], "taken for an Experiment"


def test_a_store_setting_that_names_nothing_or_no_possible_file() -> None:
    for store in (",", "", " , "):
        with pytest.raises(DataError, match=r"data\.store must name .*names nothing\. Remedy"):
            find_inputs(store)
    with pytest.raises(DataError, match="cannot be looked at: File name too long"):
        opened(*find_inputs("x" * 300))


ONES = np.ones((2000, 60), np.float32)
REMEDY = r"data_prep/build_store\.py.*data\.source=tokens data\.store=STORE\.$"


@pytest.mark.parametrize(
    ("counts", "genes", "option"),
    [
        (ONES * 1.5, GENES, "--layer"),
        (ONES, [f"SYM{i}" for i in range(60)], "--symbols"),
        (ONES, GENES[:1] + [f"ENSG9{i}" for i in range(59)], "--allow-low"),
    ],
)
def test_options_that_a_run_lacks(tmp_path, counts: np.ndarray, genes: list, option: str) -> None:
    """The error names the command that has them."""
    with pytest.raises(DataError, match=rf"{option}.*{REMEDY}"):
        opened(write_h5ad(tmp_path / "x.h5ad", counts[:5], genes))


def test_a_value_that_is_met_in_the_middle_of_a_run_and_other_errors(tmp_path) -> None:
    counts = ONES.copy()
    counts[100, 3] = 0.5  # Not among the rows that are looked at when it is opened.
    source = opened(write_h5ad(tmp_path / "x.h5ad", counts, GENES))
    with pytest.raises(DataError, match=rf"row 100 .*--layer.*{REMEDY}"):
        source.read(0, len(source))
    with pytest.raises(DataError, match=r"no such file\. Remedy: check the path\.$"):
        opened(tmp_path / "none.h5ad")
