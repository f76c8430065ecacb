"""Files, genes and values of a corpus or of a part of it; parts add up, also those in files.

    files  ->  Tally: genes, names, values of each (see build.gather)
    Tally  ->  part.npz: header (JSON with SHA-256), offsets of genes, values | bins and counts
    Tally of one part + Tally of another  ->  Tally of both  ->  Vocabulary with medians

Sums are exact: the vocabulary is independent of how a corpus is partitioned, and of the order of
parts. In a file genes, and the values of each, are sorted: equal tallies have equal content.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.blocks import CountBlock
from geneformer_mcore.io.files import whole_file
from geneformer_mcore.io.schema import Count, Share, as_type, parse_json
from geneformer_mcore.tokenizer.gencode import is_ensembl_id
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.tokenizer.medians import BYTES_PER_VALUE, NUM_KEYS, BinCounts, MedianCollector
from geneformer_mcore.tokenizer.rank_encoder import normalised_values
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

DEFAULT_MEMORY_GB = 4.0
_DIGEST_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class FileRecord:
    """One file, or some rows of it.

    name:           as it was given
    ensembl_share:  share of its genes that are named by Ensembl ids
    cells, values:  rows, and expressed genes of all rows together
    digest:         sum of the bits of all its values, modulo 2^64: the same counts have the same
    """

    name: str
    ensembl_share: Share
    cells: Count = 0
    values: Count = 0
    digest: Count = 0

    def plus(self, cells: int, values: int, digest: int) -> FileRecord:
        """The record with more rows."""
        return replace(
            self,
            cells=self.cells + cells,
            values=self.values + values,
            digest=(self.digest + digest) & _DIGEST_MASK,
        )


def most_values(memory_gb: float) -> int:
    """Values that fit into `memory_gb` (10^9 bytes). DataError unless that is above 0."""
    if not 0 < memory_gb < math.inf:
        raise DataError(f"`memory_gb=` must be above 0 and finite, not {memory_gb:g}.")
    return int(memory_gb * 1e9 / BYTES_PER_VALUE)


def describe_options(options: InputOptions) -> dict[str, Any]:
    """The options that the values of a file depend on (plain JSON)."""
    symbols = json.dumps(sorted(options.symbols.items()))
    return {
        "layer": options.layer,
        "allow_normalised": options.allow_normalised,
        "symbols": hashlib.sha256(symbols.encode()).hexdigest() if options.symbols else None,
    }


class Tally:
    """Files, genes and values of a corpus. Genes have places from 1 on; 0 stands for none.

    options:    see describe_options
    names:      {gene id: its name}, the smallest of those that are not the id itself
    collector:  the values, by place
    """

    def __init__(self, options: Mapping[str, Any], most_values: int) -> None:
        self.options = dict(options)
        self.files: list[FileRecord] = []
        self.names: dict[str, str] = {}
        self.collector = MedianCollector(most_values)
        self._place_of_gene: dict[str, int] = {}

    @property
    def genes(self) -> list[str]:
        """The ids, in the order of their places, from place 1 on."""
        return list(self._place_of_gene)

    @property
    def cells(self) -> int:
        """Of all files."""
        return sum(file.cells for file in self.files)

    def places(self, gene_ids: Iterable[str]) -> np.ndarray:
        """int32, the place of each gene, a new one where it is new; 0 for the id ""."""
        known = self._place_of_gene
        return np.array(
            [known.setdefault(gene, len(known) + 1) if gene else 0 for gene in gene_ids],
            dtype=np.int32,
        )

    def add_names(self, gene_ids: Sequence[str], names: Sequence[str]) -> None:
        """Of several columns of a gene in one file, the first names it."""
        found: dict[str, str] = {}
        for gene, name in zip(gene_ids, names, strict=True):
            found.setdefault(gene, name)
        for gene, name in found.items():
            if gene and name != gene:
                self.names[gene] = min(name, self.names.get(gene, name))

    def add_file(self, file: FileRecord) -> None:
        """Raises DataError if its genes are named by another kind of id than those before it."""
        self.files.append(file)
        check_one_kind(self.files)

    def add_block(self, block: CountBlock, column_places: np.ndarray) -> None:
        """Rows of the file that was added last; column_places: the place of each column's gene."""
        places, values = normalised_values(block, column_places, len(self._place_of_gene) + 1)
        with np.errstate(over="ignore"):
            digest = int(values.view(np.uint64).sum())
        self.files[-1] = self.files[-1].plus(len(block), len(values), digest)
        if self.collector.is_exact:
            # They are kept, and are views of arrays with room for every entry of the block.
            places, values = places.copy(), values.copy()
        self.collector.add(places, values)

    def absorb(self, other: Tally) -> None:
        """Adds the genes and values of another part, which is used up; its files are not added."""
        here = np.concatenate([[0], self.places(other.genes)]).astype(np.int32)
        self.add_names(list(other.names), list(other.names.values()))
        if other.collector.is_exact:
            for places, values in other.collector.take():
                self.collector.add(here[places], values)
        else:
            bins = other.collector.bins()
            self.collector.add_bins(replace(bins, places=here[bins.places]))

    def add_rows(self, seen: Sequence[FileRecord]) -> None:
        """Adds another worker's rows of the same files, or of others."""
        number_of = {file.name: number for number, file in enumerate(self.files)}
        for part in seen:
            if part.name in number_of:
                number = number_of[part.name]
                rows = part.cells, part.values, part.digest
                self.files[number] = self.files[number].plus(*rows)
            else:
                self.add_file(part)

    def vocabulary(self) -> Vocabulary:
        """The expressed genes with their medians, and their origin.

        Raises DataError if there is none, or if the same counts were given twice.
        """
        _check_no_file_twice(self.files)
        medians = self.collector.medians(len(self._place_of_gene) + 1)[1:]
        of_gene = {
            gene: float(median)
            for gene, median in zip(self._place_of_gene, medians, strict=True)
            if not np.isnan(median)
        }
        if not of_gene:
            raise DataError(
                "no cell expresses a gene that has an id: there is no vocabulary to build. Remedy: "
                "check the counts and the gene ids of the files."
            )
        return Vocabulary.from_medians(of_gene, self.names, self._origin())

    def _origin(self) -> dict[str, Any]:
        files = sorted((PurePath(file.name).name, file.cells) for file in self.files)
        return {
            "method": "exact" if self.collector.is_exact else "histograms",
            "relative_error": self.collector.relative_error,
            "cells": self.cells,
            "values": self.collector.num_values,
            "files": [{"name": name, "cells": cells} for name, cells in files],
        }


def ensembl_share(gene_ids: Iterable[str]) -> float:
    """The share of the ids, blank ones aside, that are Ensembl's."""
    ids = [gene for gene in gene_ids if gene]
    return sum(map(is_ensembl_id, ids)) / max(1, len(ids))


def check_one_kind(files: Sequence[FileRecord]) -> None:
    """Raises DataError if some of the files name genes by Ensembl ids and others do not."""
    with_ids = [file for file in files if file.ensembl_share >= 0.5]
    without = [file for file in files if file.ensembl_share < 0.5]
    if with_ids and without:
        raise DataError(
            f"{without[0].name} names {without[0].ensembl_share:.0%} of its genes by Ensembl ids, "
            f"{with_ids[0].name} {with_ids[0].ensembl_share:.0%}: one vocabulary takes one kind of "
            "id. Remedy: `symbols=FILE` with symbol -> id, or give var an `ensembl_id` column."
        )


def _check_no_file_twice(files: Sequence[FileRecord]) -> None:
    seen: dict[tuple[int, int, int], str] = {}
    for file in files:
        content = (file.cells, file.values, file.digest)
        if file.values and content in seen:
            raise DataError(
                f"{seen[content]} and {file.name} hold the same {file.values:,} values of "
                f"{file.cells:,} cells: they would count twice. Remedy: give each file once."
            )
        seen[content] = file.name


FORMAT = "geneformer_mcore tally"
VERSION = 1
"""Goes up with any change of the layout, of the bins or of how values are made."""

_DAMAGE = (
    *(OSError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile),
    *(ValueError, KeyError, TypeError, AttributeError),
)
"""Exceptions of reading a damaged npz file."""


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
    tally = Tally(header.options, most_values)
    tally.files, tally.names = header.files, header.names
    places = np.repeat(tally.places(header.genes), np.diff(arrays["offsets"]))
    if header.exact:
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


@dataclass(frozen=True)
class _Header:
    """Of a file, without its checksum."""

    format: str
    version: int
    exact: bool
    options: dict[str, Any]
    files: list[FileRecord]
    genes: list[str]
    names: dict[str, str]


_AGAIN = "make it again with build_vocabulary.py --partial, or copy it again"


def _problem(header: _Header, arrays: Mapping[str, np.ndarray]) -> str | None:
    numbers: dict[str, type] = {"offsets": np.int64} | (
        {"values": np.float64} if header.exact else {"keys": np.uint16, "counts": np.uint32}
    )
    found = {name: (array.dtype, array.ndim) for name, array in arrays.items()}
    if found != {name: (np.dtype(kind), 1) for name, kind in numbers.items()}:
        return f"its arrays must be {', '.join(numbers)}"
    offsets = arrays["offsets"]
    ends = {len(array) for name, array in arrays.items() if name != "offsets"}
    if len(offsets) != len(header.genes) + 1 or offsets[0] or {int(offsets[-1])} != ends:
        return "its offsets do not fit its genes and values"
    if np.any(np.diff(offsets) < 0) or len(set(header.genes)) < len(header.genes):
        return "its offsets must ascend, and its genes differ"
    if not header.exact and np.any(arrays["keys"] >= NUM_KEYS):
        return f"its keys must be below {NUM_KEYS:,}"
    return None


def _read(path: Path) -> tuple[_Header, dict[str, np.ndarray]]:
    """(header, arrays), verified."""
    if not path.exists():
        raise DataError(f"{path}: there is no such file.")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no npz")
        # An open file: given the path, numpy leaves it open where the content is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
        header = parse_json(arrays.pop("header").tobytes())
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
    read = as_type(header, _Header, path, _AGAIN)
    problem = _problem(read, arrays)
    if problem:
        raise _unreadable(path, problem)
    return read, arrays


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(f"{path}: not a whole partial file: {why}. Remedy: {_AGAIN}.")
