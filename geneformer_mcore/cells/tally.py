"""What was seen of a corpus, or of a part of it: files, genes and their values; parts add up.

    files  ->  Tally: genes, names, values of each      (see gathering)
    Tally of one part + Tally of another  ->  Tally of both  ->  Vocabulary with medians

Adding is exact: however a corpus is cut into parts, and in whatever order they come, its
vocabulary is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from geneformer_mcore.cells.corpus import InputOptions
from geneformer_mcore.cells.genes import is_ensembl_id
from geneformer_mcore.cells.medians import BYTES_PER_VALUE, MedianCollector
from geneformer_mcore.cells.normalise import CountBlock, normalised_values
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError

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
    ensembl_share: float
    cells: int = 0
    values: int = 0
    digest: int = 0

    def plus(self, cells: int, values: int, digest: int) -> FileRecord:
        """The record with more rows."""
        return replace(
            self,
            cells=self.cells + cells,
            values=self.values + values,
            digest=(self.digest + digest) & _DIGEST_MASK,
        )


def most_values(memory_gb: float) -> int:
    """How many values fit into `memory_gb` (10^9 bytes). DataError unless that is above 0."""
    if not 0 < memory_gb < math.inf:
        raise DataError(f"--memory-gb must be above 0 and finite, not {memory_gb:g}.")
    return int(memory_gb * 1e9 / BYTES_PER_VALUE)


def describe_options(options: InputOptions) -> dict[str, Any]:
    """Those of the options that decide which values a file gives (plain JSON)."""
    symbols = json.dumps(sorted(options.symbols.items()))
    return {
        "layer": options.layer,
        "allow_normalised": options.allow_normalised,
        "symbols": hashlib.sha256(symbols.encode()).hexdigest() if options.symbols else None,
    }


class Tally:
    """Files, genes and values of a corpus. Genes have places from 1 on; 0 stands for none.

    options:    how the files were read (see describe_options)
    files:      what was seen of each
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
        """Adds what another worker saw of the same files, or of others."""
        number_of = {file.name: number for number, file in enumerate(self.files)}
        for part in seen:
            if part.name in number_of:
                number = number_of[part.name]
                rows = part.cells, part.values, part.digest
                self.files[number] = self.files[number].plus(*rows)
            else:
                self.add_file(part)

    def vocabulary(self) -> Vocabulary:
        """The genes that were expressed, with their medians, and how these came about.

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
            "id. Remedy: --symbols FILE with symbol -> id, or give var an `ensembl_id` column."
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
