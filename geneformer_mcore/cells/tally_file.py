"""A tally as a file, so that parts of a corpus can be seen on different machines.

    Tally  ->  part.npz: header (JSON with SHA-256), offsets of genes, values | bins and counts
    part.npz  ->  whole? of this version?  ->  Tally

Genes are sorted in it, and so are the values of each: equal tallies make equal content.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.cells.output import whole_file
from geneformer_mcore.cells.sketch import BinCounts
from geneformer_mcore.cells.tally import FileRecord, Tally
from geneformer_mcore.errors import DataError

FORMAT = "geneformer_mcore tally"
VERSION = 1
"""Goes up with any change of the layout, of the bins or of how values are made."""

_DAMAGE = (
    *(OSError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile),
    *(ValueError, KeyError, TypeError, AttributeError),
)
"""What reading an npz file with wrong bytes in it may raise."""


def save_tally(tally: Tally, path: str | Path) -> None:
    """Writes `tally`, whole or not at all. Raises DataError if it cannot be written."""
    genes = tally.genes
    order = np.argsort(np.array(genes, dtype=object), kind="stable") + 1
    arrays = _exact_arrays(tally, order) if tally.collector.is_exact else _bin_arrays(tally, order)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "exact": tally.collector.is_exact,
        "options": tally.options,
        "files": [asdict(file) for file in tally.files],
        "genes": sorted(genes),
        "names": tally.names,
    }
    header["checksum"] = _checksum(header, arrays)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_tally(path: str | Path, most_values: int) -> Tally:
    """Reads what `save_tally` wrote; most_values: see MedianCollector.

    Raises DataError if it is damaged, or of another version.
    """
    header, arrays = _read(Path(path))
    tally = Tally(header["options"], most_values)
    tally.files = [FileRecord(**file) for file in header["files"]]
    tally.names = header["names"]
    places = np.repeat(tally.places(header["genes"]), np.diff(arrays["offsets"]))
    if header["exact"]:
        tally.collector.add(places, arrays["values"])
    else:
        tally.collector.add_bins(BinCounts(places, arrays["keys"], arrays["counts"]))
    return tally


def _exact_arrays(tally: Tally, order: np.ndarray) -> dict[str, np.ndarray]:
    offsets, values = tally.collector.values(len(order) + 1)
    by_gene = [np.sort(values[offsets[place] : offsets[place + 1]]) for place in order]
    return {"offsets": _offsets(map(len, by_gene)), "values": np.concatenate([[], *by_gene])}


def _bin_arrays(tally: Tally, order: np.ndarray) -> dict[str, np.ndarray]:
    bins = tally.collector.bins()
    lengths = np.bincount(bins.places, minlength=len(order) + 1)
    starts = np.cumsum(lengths) - lengths
    offsets = _offsets(lengths[order])
    # Genes change places; the bins of each stay in their order.
    taken = np.arange(offsets[-1]) + np.repeat(starts[order] - offsets[:-1], lengths[order])
    return {"offsets": offsets, "keys": bins.keys[taken], "counts": bins.counts[taken]}


def _offsets(lengths: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(header without its checksum, arrays), verified."""
    if not path.exists():
        raise DataError(f"{path}: there is no such file.")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no npz")
        # An open file: given the path, numpy leaves it open where the content is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
        header = json.loads(arrays.pop("header").tobytes())
        version, checksum = header["version"], header.pop("checksum")
        is_ours = header["format"] == FORMAT
    except _DAMAGE as error:
        raise _unreadable(path, str(error)) from error
    if not is_ours:
        raise _unreadable(path, "its header is another program's")
    if version != VERSION:
        raise DataError(
            f"{path}: version {version!r}, this program reads {VERSION}. Remedy: make it again "
            "with this version: build_vocabulary.py --partial."
        )
    if checksum != _checksum(header, arrays):
        raise _unreadable(path, "its content does not fit its checksum, it was changed since")
    return header, arrays


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(
        f"{path}: not a whole partial file: {why}. Remedy: make it again with build_vocabulary.py "
        "--partial, or copy it again."
    )
