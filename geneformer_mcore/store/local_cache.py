"""A store's tokens as flat memory-mapped files on a node's own disk, for random access.

    store  --ensure, once per node-->  CACHE/CONTENT_HASH/  tokens.bin   uint16, cells end to end
                                                            offsets.bin  int64 [cells + 1]
                                                            keys.bin     uint64 [cells]
                                                            sums.bin     SHA-256 of every block
                                                            flat.json    written last
    FlatCopy: opened, sizes and indices verified  ->  a cell's block verified when first touched

Rows are the store's. A copy may be deleted at any time; the next run that needs it makes it again.
Numbers are little-endian. Needs numpy only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import file_digest, lock_file, read_sealed, sync_tree, write_sealed
from geneformer_mcore.io.progress import Progress
from geneformer_mcore.io.schema import Positive, as_type
from geneformer_mcore.types import CellViews, RaggedCells, TokenSource

FORMAT_VERSION = 1
BLOCK_CELLS = 1024
"""Cells that share a checksum."""

_DIGEST_BYTES = 32
_CELLS_PER_READ = 4096
_MANIFEST = "flat.json"
_REMEDY = "delete this folder; the next run makes the copy again"
_FILES = ("tokens.bin", "offsets.bin", "keys.bin", "sums.bin")


@dataclass(frozen=True)
class _Manifest:
    """flat.json without its checksum. sha256: {file: digest}, of all but the tokens."""

    format_version: int
    content_hash: str
    cells: Positive
    sha256: dict[str, str]


class Copyable(TokenSource, Protocol):
    """The source of a flat copy: rows 0..len-1."""

    def __len__(self) -> int: ...


def ensure(
    source: Copyable,
    content_hash: str,
    num_tokens: int,
    cache: str | Path,
    progress: Progress | None = None,
) -> FlatCopy:
    """The flat copy of `source` in the folder `cache`, made if it is missing or damaged.

    Processes of one node may call this at the same time: one makes the copy, the others wait.
    content_hash: equal for equal cells; names the copy
    num_tokens: tokens of all cells, for the room that must be free
    Raises DataError if the copy cannot be written, or there is no room for it.
    """
    cache = Path(cache)
    folder = cache / content_hash[:16]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with lock_file(cache / f".{folder.name}.lock", wait=True):
            try:
                return FlatCopy(folder, content_hash)
            except DataError:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(_partial(folder), ignore_errors=True)
            _check_room(cache, num_bytes(num_tokens, len(source)))
            _make(source, content_hash, folder, progress)
            return FlatCopy(folder, content_hash)
    except OSError as error:
        raise DataError(
            f"{cache}: the flat copy cannot be written: {error.strerror or error}. Remedy: name "
            "another folder with data.cache_dir, or leave it empty to read the store itself."
        ) from error


def num_bytes(num_tokens: int, num_cells: int) -> int:
    """Bytes of a flat copy, without its sums: 32 per 1024 cells."""
    return 2 * num_tokens + 16 * num_cells


def is_there(cache: str | Path, content_hash: str) -> bool:
    """Whether there is a finished copy, by its name and manifest only."""
    content = read_sealed(Path(cache) / content_hash[:16] / _MANIFEST)
    return content is not None and content.get("content_hash") == content_hash


class FlatCopy:
    """A flat copy open for reading (types.RandomAccess and KnownLengths).

    Raises DataError if it is unsound."""

    def __init__(self, folder: str | Path, content_hash: str | None = None) -> None:
        """content_hash: of the store it must be a copy of; None: of any."""
        self.folder = Path(folder)
        content = self._manifest()
        if content_hash not in (None, content.content_hash):
            raise self._damaged("it is a copy of another store")
        self.num_cells = content.cells
        self._offsets = self._array("offsets.bin", "<i8", self.num_cells + 1, content)
        self._keys = self._array("keys.bin", "<u8", self.num_cells, content)
        num_blocks = -(-self.num_cells // BLOCK_CELLS)
        self._sums = self._array("sums.bin", "u1", num_blocks * _DIGEST_BYTES, content)
        self._tokens_T = self._map("tokens.bin", "<u2", int(self._offsets[-1]))
        self._is_verified = np.zeros(num_blocks, dtype=bool)

    def __len__(self) -> int:
        return self.num_cells

    def views(self, rows: np.ndarray) -> CellViews:
        """The cells of `rows` (int64 [N]). DataError where a checksum does not hold."""
        self._verify(rows // BLOCK_CELLS)
        starts_N = self._offsets[rows]
        lengths_N = self._offsets[rows + 1] - starts_N
        return CellViews(self._tokens_T, starts_N, lengths_N, self._keys[rows])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int64 [N], tokens of the cells of `rows` (int64 [N]), no block of which is touched."""
        return self._offsets[rows + 1] - self._offsets[rows]

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1, sharing the file's memory."""
        if stop > start:
            self._verify(np.arange(start // BLOCK_CELLS, (stop - 1) // BLOCK_CELLS + 1))
        offsets = self._offsets[start : stop + 1]
        tokens_T = self._tokens_T[offsets[0] : offsets[-1]]
        return RaggedCells(tokens_T, offsets - offsets[0], self._keys[start:stop])

    def _verify(self, blocks: np.ndarray) -> None:
        for block in np.unique(blocks[~self._is_verified[blocks]]):
            first, last = _bounds(self._offsets, int(block), self.num_cells)
            found = hashlib.sha256(self._tokens_T[first:last].data).digest()
            start = int(block) * _DIGEST_BYTES
            if found != self._sums[start : start + _DIGEST_BYTES].tobytes():
                raise self._damaged(f"cells {block * BLOCK_CELLS:,} and on do not fit their sum")
            self._is_verified[block] = True

    def _manifest(self) -> _Manifest:
        content = read_sealed(self.folder / _MANIFEST)
        if content is None:
            raise self._damaged(f"{_MANIFEST} is not there, or not as it was written")
        if content.get("format_version") != FORMAT_VERSION:
            raise self._damaged(f"format {content.get('format_version')}, not {FORMAT_VERSION}")
        return as_type(content, _Manifest, self.folder / _MANIFEST, _REMEDY)

    def _array(self, name: str, kind: str, length: int, manifest: _Manifest) -> np.ndarray:
        array = self._map(name, kind, length)
        if hashlib.sha256(array.data).hexdigest() != manifest.sha256.get(name):
            raise self._damaged(f"{name} does not fit its sum")
        return array

    def _map(self, name: str, kind: str, length: int) -> np.ndarray:
        path = self.folder / name
        size = length * np.dtype(kind).itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise self._damaged(f"{name} is not {size:,} bytes long")
        # As a plain array: slices of a memmap are slower to make.
        return np.asarray(np.memmap(path, dtype=kind, mode="r", shape=(length,)))

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.folder}: damaged flat copy of a store: {what}. Remedy: {_REMEDY}.")


def _make(source: Copyable, content_hash: str, folder: Path, progress: Progress | None) -> None:
    partial = _partial(folder)
    try:
        partial.mkdir()
        _fill(partial, source, content_hash, progress)
        os.rename(partial, folder)
    except BaseException:
        # The disk may be full of it, and no later run may need this copy.
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fill(partial: Path, source: Copyable, content_hash: str, progress: Progress | None) -> None:
    """Writes all files of a copy, the manifest last, down to the disk."""
    num_cells = len(source)
    lengths, sums = [], b""
    with (partial / "tokens.bin").open("wb") as tokens, (partial / "keys.bin").open("wb") as keys:
        for start in range(0, num_cells, _CELLS_PER_READ):
            stop = min(start + _CELLS_PER_READ, num_cells)
            cells = source.read(start, stop)
            tokens.write(cells.tokens_T.astype("<u2", copy=False).data)
            keys.write(cells.keys_N.astype("<u8", copy=False).data)
            lengths.append(cells.lengths)
            sums += b"".join(_block_sums(cells))
            if progress:
                progress("copying the store to data.cache_dir", stop, num_cells)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype("<i8")
    (partial / "offsets.bin").write_bytes(offsets.tobytes())
    (partial / "sums.bin").write_bytes(sums)
    hashes = {name: file_digest(partial / name) for name in _FILES if name != "tokens.bin"}
    manifest = _Manifest(FORMAT_VERSION, content_hash, num_cells, hashes)
    write_sealed(partial / _MANIFEST, asdict(manifest))
    sync_tree(partial)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _block_sums(cells: RaggedCells) -> Iterator[bytes]:
    """Digest after digest; `cells` begins at the first cell of a block."""
    for block in range(-(-len(cells) // BLOCK_CELLS)):
        first, last = _bounds(cells.offsets, block, len(cells))
        yield hashlib.sha256(cells.tokens_T[first:last].astype("<u2", copy=False).data).digest()


def _bounds(offsets: np.ndarray, block: int, num_cells: int) -> tuple[int, int]:
    stop = min((block + 1) * BLOCK_CELLS, num_cells)
    return int(offsets[block * BLOCK_CELLS]), int(offsets[stop])


def _check_room(cache: Path, needed: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DataError(
            f"{cache}: a flat copy of the store takes {needed:,} bytes, {free:,} are free. Remedy: "
            "make room, name another folder with data.cache_dir, or leave that empty."
        )
