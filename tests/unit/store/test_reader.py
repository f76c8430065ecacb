"""Reading a store: the right rows, by few threads, in any process but a forked one."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.store import reader, soma_io
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import SPLITS
from tests.support.small_store import write_small_store

NUM_CELLS, NUM_GENES, SEQ_LENGTH = 3000, 500, 64


@pytest.fixture(scope="module")
def cells() -> list[list[int]]:
    """Cell i starts with two genes that spell i, so that a misaligned read shows."""
    rng = np.random.default_rng(9)
    made = []
    for number in range(NUM_CELLS):
        rest = 205 + rng.permutation(NUM_GENES - 205)[: rng.integers(0, SEQ_LENGTH - 3)]
        made.append([0, 5 + number // 100, 105 + number % 100, *rest.tolist()])
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory, cells) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    write_small_store(path, cells, NUM_GENES, SEQ_LENGTH)
    return path


@pytest.fixture
def store(path, monkeypatch):
    monkeypatch.setattr(reader, "_ROWS_PER_PART", 700)
    with TokenStore.open(path) as opened:
        yield opened


def test_all_rows(store, cells) -> None:
    block = store.read(0, NUM_CELLS)
    firsts = np.stack([block.tokens_T[block.offsets[:-1] + place] for place in (1, 2)])
    numbers = ((firsts[0] - 5) * 100 + firsts[1] - 105).tolist()
    assert list(range(NUM_CELLS)) == sorted(numbers) != numbers
    assert (block.tokens_T.dtype, block.offsets.dtype) == (np.uint16, np.int64)
    assert block.tokens_T.tolist() == [token for number in numbers for token in cells[number]]
    assert block.offsets.tolist() == [0, *np.cumsum([len(cells[number]) for number in numbers])]
    keys_N = cell_keys("d", [f"c{number}" for number in numbers])
    np.testing.assert_array_equal(block.keys_N, keys_N)


def test_spans_and_lengths_agree_with_the_whole(store) -> None:
    whole = store.read(0, len(store))
    spans = ((0, 1), (0, 512), (1000, 1030), (1023, 1025), (2999, 3000), (17, 2900), (5, 5))
    for start, stop in spans:
        span, offsets = store.read(start, stop), whole.offsets[start : stop + 1]
        np.testing.assert_array_equal(span.tokens_T, whole.tokens_T[offsets[0] : offsets[-1]])
        np.testing.assert_array_equal(span.offsets, offsets - offsets[0])
        np.testing.assert_array_equal(span.keys_N, whole.keys_N[start:stop])
    for start, stop in ((-1, 5), (0, NUM_CELLS + 1), (6, 5)):
        with pytest.raises(DataError, match="rows"):
            store.read(start, stop)
    rows = np.random.default_rng(0).integers(0, NUM_CELLS, 5000)
    lengths = store.lengths(rows)
    assert lengths.dtype == np.int64
    np.testing.assert_array_equal(lengths, whole.lengths[rows])
    assert len(store.lengths(rows[:0])) == 0


def test_rows_of_splits(store) -> None:
    (first, one), (two, three), (four, last) = map(store.rows, SPLITS)
    assert (first, one, three, last) == (0, two, four, NUM_CELLS)
    with pytest.raises(DataError, match=r"no split 'dev'.*train, validation, test"):
        store.rows("dev")


def test_pickled_by_its_path(store) -> None:
    raw = pickle.dumps(store)
    assert len(raw) < 1000
    with pickle.loads(raw) as again:
        np.testing.assert_array_equal(again.read(3, 9).tokens_T, store.read(3, 9).tokens_T)


def test_few_threads(path) -> None:
    # In a process of its own: libraries that other tests use have threads too.
    code = (
        "import psutil; from geneformer_mcore.store.reader import TokenStore; "
        f"s = TokenStore.open({str(path)!r}); s.read(0, {NUM_CELLS}); "
        "print(psutil.Process().num_threads())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 64


def test_context_is_one_and_its_settings() -> None:
    """Tiles are not merged beforehand: TileDB 2.30's threads that do so end the process with a
    segmentation fault, rarely: seen twice in a day of tests, both times in the destructor of
    algorithm::MergeUnit."""
    assert soma_io.soma_context() is soma_io.soma_context()
    settings = soma_io.soma_context().tiledb_config
    assert settings["sm.compute_concurrency_level"] == "2"
    assert settings["sm.query.sparse_global_order.preprocess_tile_merge"] == "0"


def test_forked_child_is_refused_instead_of_hanging(path, monkeypatch) -> None:
    soma_io.soma_context()
    monkeypatch.setattr("os.getpid", lambda: -5)
    with pytest.raises(DataError, match="spawn"):
        TokenStore.open(path)
