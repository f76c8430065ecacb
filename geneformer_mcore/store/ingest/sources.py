"""Inputs of a store, each opened and checked before any work, as far as without reading counts.

name  ->  opens?  counts, gene ids, labels found?  names unique?  ->  InputSource | Refusal
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.h5ad import Counts
from geneformer_mcore.store.ingest.buckets import duplicate_error
from geneformer_mcore.store.ingest.labels import label_kinds
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.split.table import SplitRule
from geneformer_mcore.tokenizer.genes import GeneMap, InputOptions, find_genes, map_genes
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

MOST_CELLS_NAMED_EARLY = 4 << 20
"""In a larger input, two cells of one name are found by the merge: here it would take memory."""

_ROWS = 65_536
_LABEL_ROWS = 1024


@dataclass(frozen=True, eq=False)
class InputSource:
    """An input that was found fit to be stored.

    name:         as given
    address:      independent of the working directory
    stem, fingerprint, is_sequential, location, passed_over:  see h5ad.Counts
    kinds:        {label column of obs: its type}
    left_out:     columns of obs that are not kept
    """

    name: str
    address: str
    stem: str
    fingerprint: dict[str, Any]
    num_cells: int
    is_sequential: bool
    location: str
    passed_over: tuple[str, ...]
    kinds: Mapping[str, pa.DataType]
    left_out: tuple[str, ...]
    gene_map: GeneMap

    @property
    def short_name(self) -> str:
        """A file's name without its folder."""
        return short_name(self.name)

    @cached_property
    def identity(self) -> list[Any]:
        """Changes whenever the cells may: plain JSON."""
        tokens = self.gene_map.token_of_column.astype("<i4").tobytes()
        genes = hashlib.sha256(tokens).hexdigest()
        return [self.fingerprint, self.stem, self.num_cells, self.location, genes]


@dataclass(frozen=True)
class Refusal:
    """An input that is left out of the store, and the reason."""

    name: str
    reason: str

    def describe(self) -> dict[str, str]:
        """Its entry in the manifest."""
        return {"name": short_name(self.name), "reason": self.reason}


def short_name(name: str) -> str:
    """The name of a file without its folder; a URI as it is."""
    return name if "://" in name else Path(name).name


def address_of(name: str) -> str:
    """A file's absolute path; a URI as it is."""
    return name if "://" in name else str(Path(name).absolute())


def in_order(names: Sequence[str | Path]) -> list[str]:
    """The inputs' names, sorted by their addresses. DataError if there is none, or one twice."""
    if not names:
        raise DataError("no input given. Remedy: name one h5ad or zarr file or more.")
    by_address: dict[str, str] = {}
    for name in map(str, names):
        if address_of(name) in by_address:
            raise DataError(f"{name}: is given twice. Remedy: name each input once.")
        by_address[address_of(name)] = name
    return [name for _, name in sorted(by_address.items())]


@dataclass(frozen=True)
class Inspection:
    """Opens and checks one input (a workers.Work)."""

    vocabulary: Vocabulary
    options: InputOptions
    split_rule: SplitRule

    def __call__(self, job: str, advance: Callable[[int], None]) -> InputSource:
        """Raises DataError if the input `job` cannot be used."""
        with self.options.open(job) as counts:
            genes = find_genes(counts, self.options, self.vocabulary)
            gene_map = map_genes(genes, self.vocabulary, counts, self.options)
            self._check_cells(counts)
            counts.check()
            kinds = label_kinds(counts.read_obs(0, min(_LABEL_ROWS, counts.num_cells)))
            return InputSource(
                name=job,
                address=address_of(job),
                stem=counts.stem,
                fingerprint=counts.fingerprint,
                num_cells=counts.num_cells,
                is_sequential=counts.is_sequential,
                location=counts.location,
                passed_over=tuple(counts.passed_over),
                kinds=kinds,
                left_out=tuple(str(name) for name in counts.obs_columns if name not in kinds),
                gene_map=gene_map,
            )

    def _check_cells(self, counts: Counts) -> None:
        """Raises DataError if two cells have one name, or one has no split."""
        num_cells = counts.num_cells
        if num_cells > MOST_CELLS_NAMED_EARLY:
            return
        keys_N = np.empty(num_cells, np.uint64)
        for start in range(0, num_cells, _ROWS):
            rows = start, min(start + _ROWS, num_cells)
            datasets = counts.read_dataset_ids(*rows)
            keys_N[slice(*rows)] = cell_keys(datasets, counts.read_cell_ids(*rows))
            assign_splits(self.split_rule, keys_N[slice(*rows)], datasets, counts.name)
        _check_names(counts, keys_N)


def assign_splits(
    rule: SplitRule, keys_N: np.ndarray, datasets: Sequence[str], source: str
) -> np.ndarray:
    """int8 [N], the code of each cell's split. DataError, naming the source, where one has none."""
    try:
        return rule.assign(keys_N, datasets)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _check_names(counts: Counts, keys_N: np.ndarray) -> None:
    """Raises DataError if two cells of the input have one name."""
    order = np.argsort(keys_N, kind="stable")
    equal = np.flatnonzero(np.diff(keys_N[order]) == 0)
    for place in equal.tolist():
        first, second = (
            (*counts.read_dataset_ids(row, row + 1), *counts.read_cell_ids(row, row + 1))
            for row in order[place : place + 2].tolist()
        )
        # Two cells may share a key, but not their names.
        if first == second:
            raise DataError(f"{counts.name}: {duplicate_error(*first)}")
