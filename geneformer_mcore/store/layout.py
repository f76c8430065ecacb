"""What lies where in a store, and the manifest that says what must be there.

    STORE/                  a SOMA Collection, opened by plain tiledbsoma
      tokens/               DataFrame: soma_joinid, tokens (large_binary, little-endian uint16)
      obs/                  DataFrame: soma_joinid, cell_id, dataset_id, cell_key, split, n_counts,
                            n_genes, n_tokens, and the inputs' label columns
      vocabulary.json       genes in token order, medians, checksum
      manifest.json         the dataclass below

Rows are grouped by split and shuffled within each; a row of `tokens` and of `obs` with one
soma_joinid is one cell.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.sealed_json import checksum_of
from geneformer_mcore.store.split import SPLITS

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
"""Columns every store's obs has beside soma_joinid: n_counts = all counts of the cell, n_genes =
its expressed genes (columns of the file), n_tokens = its tokens in the store, [CLS] included."""


@dataclass(frozen=True)
class Manifest:
    """What a finished store holds. Written last, so that an unfinished store has none.

    cells, tokens:     rows, and token ids of all rows together ([CLS] included)
    rows:              {split: [start, stop]}, train, validation, test, one after the other
    seq_length:        longest cell a row may hold, [CLS] included
    content_hash:      SHA-256 over every column of every row (see content_hash)
    vocabulary_hash:   checksum of vocabulary.json
    labels:            {label column of obs: its type}
    split:             how cells were dealt to splits
    sources:           one report per input file (see ingest.SourceReport)
    skipped:           {reason: cells}, over all sources
    versions:          {package: version} that wrote the store
    refused:           inputs that were given and could not be used: [{"name", "reason"}]
    files:             {path in the folder: [bytes, SHA-256]} of all files but the manifest itself
    """

    cells: int
    tokens: int
    rows: dict[str, list[int]]
    seq_length: int
    content_hash: str
    vocabulary_hash: str
    labels: dict[str, str]
    split: dict[str, Any]
    sources: list[dict[str, Any]]
    skipped: dict[str, int]
    versions: dict[str, str]
    refused: list[dict[str, str]] = field(default_factory=list)
    files: dict[str, list[Any]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: str | Path) -> None:
        """Writes manifest.json, with a checksum of itself, into the store's folder."""
        content = asdict(self)
        text = json.dumps(content | {"checksum": checksum_of(content)}, indent=2)
        (Path(folder) / MANIFEST_FILE).write_text(text + "\n")

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
        # What has a default came in later: stores that were there before do without it.
        optional = {item.name for item in fields(cls) if item.default_factory is not MISSING}
        wanted = {item.name for item in fields(cls)} - optional
        missing = sorted((wanted | {"checksum"}) - set(content))
        if missing:
            raise _damaged(path, f"{', '.join(missing)} missing")
        found = content.pop("checksum")
        if found != checksum_of(content):
            raise _damaged(path, "its content does not fit its checksum, it was changed since")
        manifest = cls(**{name: content[name] for name in (wanted | optional) & set(content)})
        problem = _problem(manifest)
        if problem:
            raise _damaged(path, problem)
        return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path.parent}: not a finished store, {path.name} is missing. Remedy: build it with "
            "data_prep/build_store.py."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "not a JSON object")
    return content


def _damaged(path: Path, what: str) -> DataError:
    return DataError(f"{path}: damaged manifest: {what}. Remedy: build the store again.")


def _problem(manifest: Manifest) -> str | None:
    numbers = (manifest.cells, manifest.tokens, manifest.seq_length)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return f"cells, tokens and seq_length must be whole numbers above 0, not {numbers}"
    if not isinstance(manifest.rows, dict) or tuple(manifest.rows) != SPLITS:
        return f"rows must name {', '.join(SPLITS)}"
    end = 0
    for split, span in manifest.rows.items():
        if len(span) != 2 or span[0] != end or span[1] < span[0]:
            return f"rows of {split} are {span}, and must start at {end}"
        end = span[1]
    if end != manifest.cells:
        return f"the splits' rows end at {end:,}, and there are {manifest.cells:,} cells"
    return None
