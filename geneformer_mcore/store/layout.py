"""Layout of a store, its manifest, the list of its files and the hash of its content.

    STORE/                  a SOMA Collection, opened by plain tiledbsoma
      tokens/               DataFrame: soma_joinid, tokens (large_binary, little-endian uint16)
      obs/                  DataFrame: soma_joinid, cell_id, dataset_id, cell_key, split, n_counts,
                            n_genes, n_tokens, and the inputs' label columns
      vocabulary.json       genes in token order, medians, checksum
      manifest.json         the dataclass below, with {path: [bytes, SHA-256]} of all other files

Rows are grouped by split and shuffled within each; rows of `tokens` and `obs` with the same
soma_joinid are one cell. TileDB's own filters check the tiles that are read, not which fragments
are there, nor their metadata: of files of tiles only the size is kept, so that opening is cheap.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.files import checksum_of, file_digest
from geneformer_mcore.io.schema import Count, Digest, Positive, as_type, read_json
from geneformer_mcore.store.split.table import SPLITS

SCHEMA_VERSION = 1
TOKENS = "tokens"
OBS = "obs"
MANIFEST_FILE = "manifest.json"
VOCABULARY_FILE = "vocabulary.json"

OBS_COLUMNS: dict[str, pa.DataType] = {
    "cell_id": pa.large_string(),
    "dataset_id": pa.large_string(),
    "cell_key": pa.uint64(),
    "split": pa.large_string(),
    "n_counts": pa.float64(),
    "n_genes": pa.int32(),
    "n_tokens": pa.int32(),
}
"""Columns of every store's obs, besides soma_joinid: n_counts = all counts of the cell, n_genes =
its expressed genes (columns of the file), n_tokens = its tokens in the store, [CLS] included."""


Entry = tuple[Count, Digest | None]
"""A file's bytes and SHA-256; None in place of it for files of tiles."""


@dataclass(frozen=True)
class Manifest:
    """The content of a finished store. Written last, so that an unfinished store has none.

    cells, tokens:     rows, and token ids of all rows together ([CLS] included)
    rows:              {split: [start, stop]}, train, validation, test, one after the other
    seq_length:        longest cell a row may hold, [CLS] included
    content_hash:      SHA-256 over every column of every row (see content_hash)
    vocabulary_hash:   checksum of vocabulary.json
    labels:            {label column of obs: its type}
    split:             how cells were assigned to splits
    sources:           one report per input file (see ingest.SourceReport)
    skipped:           {reason: cells}, over all sources
    versions:          {package: version} that wrote the store
    refused:           inputs that were given and could not be used: [{"name", "reason"}]
    files:             {path in the folder: Entry} of all files but the manifest itself
    """

    cells: Positive
    tokens: Positive
    rows: dict[str, tuple[Count, Count]]
    seq_length: Positive
    content_hash: Digest
    vocabulary_hash: Digest
    labels: dict[str, str]
    split: dict[str, Any]
    sources: list[dict[str, Any]]
    skipped: dict[str, Count]
    versions: dict[str, str]
    refused: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, Entry] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: str | Path) -> None:
        """Writes manifest.json, with a checksum of itself, into the store's folder."""
        content = asdict(self)
        text = json.dumps(content | {"checksum": checksum_of(content)}, indent=2)
        (Path(folder) / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Reads and checks manifest.json; DataError if missing, damaged or of another version."""
        path = Path(folder) / MANIFEST_FILE
        content = _read_json(path)
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path}: store schema {version!r}, this version reads {SCHEMA_VERSION}. Remedy: "
                "build the store again with data_prep/build_store.py."
            )
        found = content.pop("checksum", None)
        if found != checksum_of(content):
            raise _damaged(path, "its content does not fit its checksum, it was changed since")
        # Fields with a default are newer: earlier stores lack them.
        manifest = as_type(content, cls, path, _BUILD)
        problem = _problem(manifest)
        if problem:
            raise _damaged(path, problem)
        return manifest


_BUILD = "build the store again, or read it with the version that wrote it"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(
            f"{path.parent}: not a finished store, {path.name} is missing. Remedy: build it with "
            "data_prep/build_store.py."
        )
    content = read_json(path, _BUILD)
    if not isinstance(content, dict):
        raise _damaged(path, "not a JSON object")
    return content


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: damaged manifest: {what}. Remedy: {_BUILD}.")


def _problem(manifest: Manifest) -> str | None:
    if tuple(manifest.rows) != SPLITS:
        return f"rows must name {', '.join(SPLITS)}"
    end = 0
    for split, (start, stop) in manifest.rows.items():
        if start != end or stop < start:
            return f"rows of {split} are {start} to {stop}, and must start at {end}"
        end = stop
    if end != manifest.cells:
        return f"the splits' rows end at {end:,}, and there are {manifest.cells:,} cells"
    return None


# Files

_FRAGMENTS = "__fragments"
_FRAGMENT_METADATA = "__fragment_metadata.tdb"


def list_files(folder: Path) -> dict[str, Path]:
    """{path relative to `folder`: file} of all files in it but the manifest, sorted."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    found.pop(MANIFEST_FILE, None)
    return dict(sorted(found.items()))


def describe_files(folder: Path) -> dict[str, Entry]:
    """{path: Entry}, for the manifest."""
    return {
        name: (path.stat().st_size, None if _is_tiles(name) else file_digest(path))
        for name, path in list_files(folder).items()
    }


def find_changes(folder: Path, expected: Mapping[str, Entry]) -> list[str]:
    """A short description of each difference of the files in `folder`; OSError if unreadable."""
    there = list_files(folder)
    problems = [f"{name} is missing" for name in expected if name not in there]
    for name, path in there.items():
        if name not in expected:
            problems.append(f"{name} is not of the store")
            continue
        size, digest = expected[name]
        found = path.stat().st_size
        if found != size:
            problems.append(f"{name} has {found:,} bytes of {size:,}")
        elif digest is not None and file_digest(path) != digest:
            problems.append(f"{name} was changed since it was written")
    return problems


def _is_tiles(name: str) -> bool:
    parts = name.split("/")
    return _FRAGMENTS in parts and parts[-1] != _FRAGMENT_METADATA


# Content hash: independent of the blocks in which rows come


class _ColumnHash:
    """Three streams over all rows: validity (one byte per row); for text and tokens the lengths in
    bytes (int64); the values end to end, little-endian, missing ones as zero."""

    def __init__(self) -> None:
        self._streams = tuple(hashlib.sha256() for _ in range(3))

    def update(self, column: pa.ChunkedArray) -> None:
        validity, lengths, values = self._streams
        for array in column.chunks:
            validity.update(array.is_valid().cast(pa.uint8()).to_numpy(zero_copy_only=False).data)
            if pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type):
                offsets, raw = text_buffers(array)
                lengths.update(np.diff(offsets).astype("<i8").data)
                values.update(raw.data)
            else:
                filled = pc.fill_null(array, pa.scalar(0).cast(array.type))
                numbers = filled.to_numpy(zero_copy_only=False)
                little = numbers.dtype.newbyteorder("<")
                values.update(np.ascontiguousarray(numbers).astype(little).data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(part.digest() for part in self._streams)).hexdigest()


def text_buffers(array: pa.LargeBinaryArray | pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets int64 [rows + 1] from 0, bytes uint8) of text or binary; missing values are empty"""
    if array.null_count:
        array = pc.fill_null(array, b"" if pa.types.is_large_binary(array.type) else "")
    _, offsets_buffer, raw_buffer = array.buffers()
    window = slice(array.offset, array.offset + len(array) + 1)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[window]
    raw = np.frombuffer(raw_buffer, dtype=np.uint8) if raw_buffer else np.empty(0, np.uint8)
    return offsets - offsets[0], raw[offsets[0] : offsets[-1]]


class ContentHash:
    """The hash of a store's rows in order, as Arrow tables of any size with the same columns."""

    def __init__(self) -> None:
        self._columns: dict[str, _ColumnHash] = {}
        self._types: dict[str, str] = {}

    def update(self, table: pa.Table) -> None:
        """The next rows. Columns are known by name; their order does not matter."""
        for name in table.column_names:
            column = self._columns.setdefault(name, _ColumnHash())
            self._types[name] = str(table.schema.field(name).type)
            column.update(table[name])

    def hexdigest(self) -> str:
        """SHA-256 over the canonical JSON of {column: [type, digest]}."""
        columns = {
            name: [self._types[name], column.hexdigest()] for name, column in self._columns.items()
        }
        return hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()
