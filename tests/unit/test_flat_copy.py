"""The flat copy of a store: the same cells, and never wrong ones."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.store import local_cache
from geneformer_mcore.types import RaggedCells
from tests.distributed.ranks import context
from tests.unit.identified_cells import Cells, cell

HASH = "ab" * 32
NUM_CELLS = 3000  # three blocks


def ensure(cache: Path, source: Cells | None = None) -> local_cache.FlatCopy:
    return local_cache.ensure(source or Cells(NUM_CELLS), HASH, 10**6, cache)


def test_a_copy_holds_the_cells(tmp_path: Path) -> None:
    copy = ensure(tmp_path)
    for start, stop in ((0, NUM_CELLS), (1000, 1030), (2999, 3000), (5, 5)):
        block, truth = copy.read(start, stop), Cells(NUM_CELLS).read(start, max(stop, start + 1))
        if start == stop:
            assert len(block) == 0
            continue
        assert np.array_equal(block.tokens_T, truth.tokens_T)
        assert np.array_equal(block.offsets, truth.offsets)
        assert np.array_equal(block.keys_N, truth.keys_N)
    rows = np.array([2999, 0, 1024, 7, 7])
    views = copy.views(rows)
    for i, row in enumerate(rows):
        start = views.starts_N[i]
        assert np.array_equal(views.tokens_T[start : start + views.lengths_N[i]], cell(int(row)))
    assert views.keys_N.tolist() == rows.tolist()


def test_it_is_made_once(tmp_path: Path) -> None:
    source = Cells(NUM_CELLS)
    ensure(tmp_path, source)
    reads = len(source.reads)
    ensure(tmp_path, source)
    assert len(source.reads) == reads > 0


@pytest.mark.parametrize("name", ["offsets.bin", "keys.bin", "sums.bin", "flat.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, name: str, harm: str) -> None:
    folder = ensure(tmp_path).folder
    _harm(folder / name, harm)
    again = ensure(tmp_path)
    assert np.array_equal(
        again.read(0, NUM_CELLS).tokens_T, Cells(NUM_CELLS).read(0, NUM_CELLS).tokens_T
    )


def test_truncated_tokens_are_noticed_when_opened(tmp_path: Path) -> None:
    folder = ensure(tmp_path).folder
    _harm(folder / "tokens.bin", "truncate")
    with pytest.raises(DataError, match=r"is not [\d,]+ bytes long"):
        local_cache.FlatCopy(folder, HASH)


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    """200 single bits, one after the other, anywhere in the four files."""
    folder = ensure(tmp_path).folder
    whole = Cells(NUM_CELLS).read(0, NUM_CELLS)
    files = [folder / name for name in ("tokens.bin", "offsets.bin", "keys.bin", "sums.bin")]
    rng = np.random.default_rng(0)
    for _ in range(200):
        path = files[rng.integers(len(files))]
        sound = path.read_bytes()
        _harm(path, "flip", int(rng.integers(8 * len(sound))))
        with pytest.raises(DataError, match="damaged flat copy"):
            _read_all(folder)
        path.write_bytes(sound)
    assert np.array_equal(_read_all(folder).tokens_T, whole.tokens_T)


def test_no_view_of_a_flipped_bit_is_given(tmp_path: Path) -> None:
    """Training takes single cells, and not spans."""
    folder = ensure(tmp_path).folder
    _harm(folder / "tokens.bin", "flip", 0)
    with pytest.raises(DataError, match="do not fit their sum"):
        local_cache.FlatCopy(folder, HASH).views(np.array([0]))


def test_a_copy_of_another_store_is_not_taken(tmp_path: Path) -> None:
    folder = ensure(tmp_path).folder
    with pytest.raises(DataError, match="copy of another store"):
        local_cache.FlatCopy(folder, "cd" * 32)


def test_processes_of_a_node_make_one_copy(tmp_path: Path) -> None:
    with context.Pool(3) as pool:
        reads = pool.map(_reads_of_ensure, [tmp_path] * 3)
    assert sorted(bool(number) for number in reads) == [False, False, True]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DataError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_copy_that_fails_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    told: type[BaseException],
) -> None:
    """After its first part, which is on the disk by then."""

    class Fails(Cells):
        def read(self, start: int, stop: int) -> RaggedCells:
            if start:
                raise failure
            return super().read(start, stop)

    monkeypatch.setattr(local_cache, "_CELLS_PER_READ", local_cache.BLOCK_CELLS)
    with pytest.raises(told, match="No space left" if told is DataError else None):
        ensure(tmp_path, Fails(NUM_CELLS))
    assert os.listdir(tmp_path) == [f".{HASH[:16]}.lock"]


def test_a_copy_that_was_killed_is_begun_anew(tmp_path: Path) -> None:
    partial = tmp_path / f".{HASH[:16]}.partial"
    partial.mkdir()
    (partial / "tokens.bin").write_bytes(b"half")
    assert len(ensure(tmp_path)) == NUM_CELLS
    assert sorted(os.listdir(tmp_path)) == [f".{HASH[:16]}.lock", HASH[:16]]


def test_too_little_room_is_said_before_copying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Cells(NUM_CELLS)
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="takes 2,048,000 bytes, 1,000,000 are free"):
        ensure(tmp_path, source)
    assert not source.reads


def test_a_cache_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written.*data\.cache_dir"):
        ensure(tmp_path / "file" / "cache")


def _reads_of_ensure(cache: Path) -> int:
    source = Cells(NUM_CELLS)
    ensure(cache, source)
    return len(source.reads)


def _read_all(folder: Path) -> RaggedCells:
    return local_cache.FlatCopy(folder, HASH).read(0, NUM_CELLS)


def _harm(path: Path, harm: str, bit: int = 77) -> None:
    content = bytearray(path.read_bytes())
    if harm == "remove":
        path.unlink()
        return
    if harm == "flip":
        content[bit // 8] ^= 1 << bit % 8
    else:
        del content[-5:]
    path.write_bytes(content)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": 1}', "\xff"])
def test_a_manifest_that_is_another_json_is_made_again(tmp_path: Path, content: str) -> None:
    folder = ensure(tmp_path).folder
    (folder / "flat.json").write_text(content)
    assert len(ensure(tmp_path)) == NUM_CELLS
