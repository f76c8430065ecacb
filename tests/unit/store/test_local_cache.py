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
from tests.support.small_cells import flip_bit
from tests.unit.data.identified_cells import Cells, cell

HASH = "ab" * 32
NUM_CELLS = 3000  # three blocks
WHOLE = Cells(NUM_CELLS).read(0, NUM_CELLS)


def ensure(cache: Path, source: Cells | None = None) -> local_cache.FlatCopy:
    return local_cache.ensure(source or Cells(NUM_CELLS), HASH, 10**6, cache)


def reads_of_ensure(cache: Path) -> int:
    source = Cells(NUM_CELLS)
    ensure(cache, source)
    return len(source.reads)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A finished copy."""
    return ensure(tmp_path).folder


def read_all(folder: Path) -> RaggedCells:
    return local_cache.FlatCopy(folder, HASH).read(0, NUM_CELLS)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def test_a_copy_holds_the_cells(tmp_path) -> None:
    copy = ensure(tmp_path)
    for start, stop in ((0, NUM_CELLS), (1000, 1030), (2999, 3000), (5, 5)):
        block, offsets = copy.read(start, stop), WHOLE.offsets[start : stop + 1]
        assert np.array_equal(block.tokens_T, WHOLE.tokens_T[offsets[0] : offsets[-1]])
        assert np.array_equal(block.offsets, offsets - offsets[0])
        assert np.array_equal(block.keys_N, WHOLE.keys_N[start:stop])
    rows = [2999, 0, 1024, 7, 7]
    views = copy.views(np.array(rows))
    for start, length, row in zip(views.starts_N, views.lengths_N, rows, strict=True):
        assert np.array_equal(views.tokens_T[start : start + length], cell(row))
    assert views.keys_N.tolist() == rows


def test_it_is_made_once_by_the_processes_of_a_node(tmp_path) -> None:
    with context.Pool(3) as pool:
        reads = pool.map(reads_of_ensure, [tmp_path] * 3)
    assert sorted(map(bool, reads)) == [False, False, True]
    assert reads_of_ensure(tmp_path) == 0


@pytest.mark.parametrize("name", ["offsets.bin", "keys.bin", "sums.bin", "flat.json"])
@pytest.mark.parametrize("harm", [lambda path: flip_bit(path, 9, 5), cut, Path.unlink])
def test_a_damaged_copy_is_made_again(folder, name: str, harm) -> None:
    harm(folder / name)
    assert np.array_equal(ensure(folder.parent).read(0, NUM_CELLS).tokens_T, WHOLE.tokens_T)


def test_a_copy_that_was_killed_or_has_no_manifest_is_made_again(folder) -> None:
    for content in ("[]", "{}", '{"format_version": 1}', "\xff"):
        (folder / "flat.json").write_text(content)
        assert len(ensure(folder.parent)) == NUM_CELLS
    partial = folder.rename(folder.with_name(f".{HASH[:16]}.partial"))
    (partial / "tokens.bin").write_bytes(b"half")
    assert len(ensure(folder.parent)) == NUM_CELLS
    assert sorted(os.listdir(folder.parent)) == [f".{HASH[:16]}.lock", HASH[:16]]


def test_cut_tokens_and_another_store_are_noticed_when_opened(folder) -> None:
    with pytest.raises(DataError, match="copy of another store"):
        local_cache.FlatCopy(folder, "cd" * 32)
    cut(folder / "tokens.bin")
    with pytest.raises(DataError, match=r"is not [\d,]+ bytes long"):
        local_cache.FlatCopy(folder, HASH)


def test_no_flipped_bit_is_read(folder) -> None:
    """200 single bits, one after the other, anywhere in the four files."""
    files = [folder / name for name in ("tokens.bin", "offsets.bin", "keys.bin", "sums.bin")]
    rng = np.random.default_rng(0)
    for _ in range(200):
        path = files[rng.integers(len(files))]
        sound = flip_bit(path, int(rng.integers(path.stat().st_size)), int(rng.integers(8)))
        with pytest.raises(DataError, match="damaged flat copy"):
            read_all(folder)
        path.write_bytes(sound)
    assert np.array_equal(read_all(folder).tokens_T, WHOLE.tokens_T)
    # Training takes single cells, and not spans.
    flip_bit(files[0], 0)
    with pytest.raises(DataError, match="do not fit their sum"):
        local_cache.FlatCopy(folder, HASH).views(np.array([0]))


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("failure", "error"), [(FULL, DataError), (KeyboardInterrupt("No space"), KeyboardInterrupt)]
)
def test_a_copy_that_fails_leaves_nothing(tmp_path, monkeypatch, failure, error) -> None:
    """After its first part, which is on the disk by then."""

    class Fails(Cells):
        def read(self, start: int, stop: int) -> RaggedCells:
            if start:
                raise failure
            return super().read(start, stop)

    monkeypatch.setattr(local_cache, "_CELLS_PER_READ", local_cache.BLOCK_CELLS)
    with pytest.raises(error, match="No space"):
        ensure(tmp_path, Fails(NUM_CELLS))
    assert os.listdir(tmp_path) == [f".{HASH[:16]}.lock"]


def test_a_cache_without_room_or_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written.*data\.cache_dir"):
        ensure(tmp_path / "file" / "cache")
    source, usage = Cells(NUM_CELLS), type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="takes 2,048,000 bytes, 1,000,000 are free"):
        ensure(tmp_path, source)
    assert not source.reads
