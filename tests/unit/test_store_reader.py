"""Reading a store: the right rows, fast to open, damage seen, never a wrong cell."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma

from geneformer_mcore.errors import DataError
from geneformer_mcore.store import reader, soma_io
from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import RaggedCells
from tests.small_cells import vocabulary_of
from tests.small_store import write_small_store

NUM_CELLS, NUM_GENES, SEQ_LENGTH = 3000, 500, 64


def write_store(path: Path, cells: list[list[int]]) -> Manifest:
    return write_small_store(path, cells, NUM_GENES, SEQ_LENGTH)


@pytest.fixture(scope="module")
def cells() -> list[list[int]]:
    """Cell i starts with two genes that spell i, so that a misaligned read shows."""
    rng = np.random.default_rng(9)
    made = []
    for number in range(NUM_CELLS):
        high, low = 5 + number // 100, 105 + number % 100
        rest = 205 + rng.permutation(NUM_GENES - 205)[: rng.integers(0, SEQ_LENGTH - 3)]
        made.append([0, high, low, *rest.tolist()])
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, cells: list[list[int]]) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    write_store(path, cells)
    return path


@pytest.fixture
def copy(tmp_path: Path, path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def numbers_of(block: RaggedCells) -> list[int]:
    starts = block.offsets[:-1]
    return ((block.tokens_T[starts + 1] - 5) * 100 + block.tokens_T[starts + 2] - 105).tolist()


def test_all_rows(path: Path, cells: list[list[int]]) -> None:
    with TokenStore.open(path) as store:
        block = store.read(0, len(store))
        numbers = numbers_of(block)
    assert sorted(numbers) == list(range(NUM_CELLS))
    assert numbers != sorted(numbers)
    assert block.tokens_T.dtype == np.uint16
    assert (block.offsets.dtype, block.offsets[0]) == (np.int64, 0)
    assert block.tokens_T.tolist() == [token for number in numbers for token in cells[number]]
    ids = [f"c{number}" for number in numbers]
    np.testing.assert_array_equal(block.keys_N, cell_keys("d", ids))


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1), (0, 512), (1000, 1030), (1023, 1025), (2999, 3000), (17, 2900)]
)
def test_spans_agree_with_the_whole(
    path: Path, start: int, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_ROWS_PER_PART", 700)
    with TokenStore.open(path) as store:
        whole = store.read(0, len(store))
        span = store.read(start, stop)
    offsets = whole.offsets[start : stop + 1]
    np.testing.assert_array_equal(span.tokens_T, whole.tokens_T[offsets[0] : offsets[-1]])
    np.testing.assert_array_equal(span.offsets, offsets - offsets[0])
    np.testing.assert_array_equal(span.keys_N, whole.keys_N[start:stop])


def test_lengths_without_reading_tokens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_ROWS_PER_PART", 700)
    with TokenStore.open(path) as store:
        wanted = store.read(0, len(store)).lengths
        rows = np.random.default_rng(0).integers(0, NUM_CELLS, 5000)
        found = store.lengths(rows)
        assert len(store.lengths(rows[:0])) == 0
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, wanted[rows])


def test_span_of_no_rows_and_beyond(path: Path) -> None:
    with TokenStore.open(path) as store:
        assert len(store.read(5, 5)) == 0
        for start, stop in ((-1, 5), (0, NUM_CELLS + 1), (6, 5)):
            with pytest.raises(DataError, match="rows"):
                store.read(start, stop)


def test_rows_of_splits(path: Path) -> None:
    with TokenStore.open(path) as store:
        spans = [store.rows(split) for split in ("train", "validation", "test")]
        assert spans[0][0] == 0
        assert [spans[0][1], spans[1][1]] == [spans[1][0], spans[2][0]]
        assert spans[2][1] == NUM_CELLS
        with pytest.raises(DataError, match=r"no split 'dev'.*train, validation, test"):
            store.rows("dev")


def test_pickled_by_its_path(path: Path) -> None:
    with TokenStore.open(path) as store:
        raw = pickle.dumps(store)
        assert len(raw) < 1000
        expected = store.read(3, 9)
    with pickle.loads(raw) as again:
        np.testing.assert_array_equal(again.read(3, 9).tokens_T, expected.tokens_T)


def test_few_threads(path: Path) -> None:
    # In a process of its own: libraries that other tests use have threads too.
    read = f"s = TokenStore.open({str(path)!r}); s.read(0, {NUM_CELLS})"
    count = "print(psutil.Process().num_threads())"
    code = f"import psutil; from geneformer_mcore.store.reader import TokenStore; {read}; {count}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 64
    settings = soma_io.soma_context().tiledb_config
    assert settings["sm.compute_concurrency_level"] == "2"
    assert soma_io.soma_context() is soma_io.soma_context()


def test_tiles_are_not_merged_beforehand() -> None:
    """TileDB 2.30's threads that do so end the process with a segmentation fault, rarely: seen
    twice in a day of tests, both times in the destructor of algorithm::MergeUnit."""
    settings = soma_io.soma_context().tiledb_config
    assert settings["sm.query.sparse_global_order.preprocess_tile_merge"] == "0"


def test_forked_child_is_told_instead_of_hanging(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soma_io.soma_context()
    monkeypatch.setattr("os.getpid", lambda: -5)
    with pytest.raises(DataError, match="spawn"):
        TokenStore.open(path)


# Damage


def data_files(store: Path, frame: str) -> list[Path]:
    return sorted((store / frame / "__fragments").rglob("*.tdb"))


def flip(path: Path, byte: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def test_flip_in_the_tokens_names_the_rows(copy: Path) -> None:
    largest = max(data_files(copy, "tokens"), key=lambda p: p.stat().st_size)
    flip(largest, largest.stat().st_size - 2000)
    with TokenStore.open(copy) as store:
        store.read(0, 1024)
        with pytest.raises(DataError, match="rows 2,900 to 2,999 of tokens cannot be read"):
            store.read(2900, 3000)
    assert any("cannot be read" in problem for problem in check_store(copy))


@pytest.mark.parametrize("frame", ["tokens", "obs"])
def test_missing_commit_is_seen_at_opening(copy: Path, frame: str) -> None:
    for commit in (copy / frame / "__commits").iterdir():
        commit.unlink()
    with pytest.raises(DataError, match=rf"{frame}/__commits/\S+ is missing"):
        TokenStore.open(copy)
    # A store built before files were listed says it by its rows.
    replace(Manifest.load(copy), files={}).save(copy)
    with pytest.raises(DataError, match=rf"{frame} holds 0 rows, the manifest says 3,000"):
        TokenStore.open(copy)


@pytest.mark.parametrize("part", ["tokens", "obs", "manifest.json", "vocabulary.json"])
def test_missing_part_is_seen_at_opening(copy: Path, part: str) -> None:
    target = copy / part
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    with pytest.raises(DataError, match="Remedy"):
        TokenStore.open(copy)
    assert check_store(copy)


def test_exchanged_vocabulary_is_seen(copy: Path) -> None:
    vocabulary = vocabulary_of(NUM_GENES, np.full(NUM_GENES, 3.0))
    vocabulary.save(copy / "vocabulary.json")
    with pytest.raises(DataError, match=r"vocabulary\.json has [0-9,]* bytes of"):
        TokenStore.open(copy)
    replace(Manifest.load(copy), files={}).save(copy)
    with pytest.raises(DataError, match="the manifest is of vocabulary"):
        TokenStore.open(copy)
    assert Vocabulary.load(copy / "vocabulary.json") == vocabulary


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cells", 2999, "checksum"),
        ("tokens", 0, "checksum"),
        ("schema_version", 2, "store schema 2"),
        ("rows", None, "rows missing"),
    ],
)
def test_changed_manifest_is_refused(copy: Path, name: str, value: object, message: str) -> None:
    content = json.loads((copy / "manifest.json").read_text())
    content[name] = value
    if value is None:
        del content[name]
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        TokenStore.open(copy)


@pytest.mark.parametrize(
    "rows",
    [
        {"train": [0, 3000]},
        {"train": [0, 10], "validation": [11, 20], "test": [20, 3000]},
        {"train": [0, 10], "validation": [10, 5], "test": [5, 3000]},
        {"train": [0, 10], "validation": [10, 20], "test": [20, 2000]},
    ],
)
def test_manifest_with_wrong_rows_is_refused(copy: Path, rows: dict[str, list[int]]) -> None:
    replace(Manifest.load(copy), rows=rows).save(copy)
    with pytest.raises(DataError, match="damaged manifest"):
        TokenStore.open(copy)


def test_no_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("missing", "file"):
        with pytest.raises(DataError, match="not a finished store"):
            TokenStore.open(tmp_path / name)


# check_store


def test_sound_store_has_no_problems(path: Path) -> None:
    told = []
    assert check_store(path, lambda what, done, total: told.append(done)) == []
    assert told == [NUM_CELLS]


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ([5, 6], "1 cells do not start with [CLS]"),
        ([0, 505], "hold token ids beyond the vocabulary"),
        ([0, 6, 1], "hold special tokens among the genes"),
        ([0, 6, 7, 6], "hold a gene twice"),
        ([0], "hold no gene"),
        ([0, *range(5, 5 + SEQ_LENGTH)], "are longer than seq_length 64"),
    ],
)
def test_unsound_cells_are_found(tmp_path: Path, cell: list[int], problem: str) -> None:
    write_store(tmp_path / "store", [[0, 9, 8]] * 20 + [cell] + [[0, 5]] * 5)
    problems = check_store(tmp_path / "store")
    assert any(problem in text for text in problems), problems


def test_rows_changed_behind_the_manifest_are_found(copy: Path) -> None:
    with tiledbsoma.open(str(copy / "obs"), "w") as obs:
        table = tiledbsoma.open(str(copy / "obs")).read((slice(7, 7),)).concat()
        place = table.schema.get_field_index("number")
        obs.write(table.set_column(place, "number", pa.array([123_456])))
    with pytest.raises(DataError, match="is not of the store"):
        TokenStore.open(copy)
    replace(Manifest.load(copy), files={}).save(copy)
    assert any("content hash" in problem for problem in check_store(copy))


def test_obs_that_does_not_fit_is_found(copy: Path) -> None:
    with tiledbsoma.open(str(copy / "obs"), "w") as obs:
        table = tiledbsoma.open(str(copy / "obs")).read((slice(7, 7),)).concat()
        for name, value in (("n_tokens", 1), ("split", "test"), ("cell_id", "z")):
            place = table.schema.get_field_index(name)
            kind = table.schema.field(name).type
            table = table.set_column(place, name, pa.array([value], kind))
        obs.write(table)
    replace(Manifest.load(copy), files={}).save(copy)
    text = "\n".join(check_store(copy))
    for part in ("another n_tokens", "another split", "cell_key that is not"):
        assert f"{part}" in text
    assert "at row 7" in text
