"""Counts of a SOMA Experiment, the Census' among them, as validated CSR blocks.

    path | s3://...  ->  Experiment (of a Census: its human one)  ->  which layer of X?
    obs (filter | joinids)  ->  the cells, in ascending order of soma_joinid
                            ->  rows a..b: one query of X by joinids  ->  CSR  ->  checked

Row i is the i-th of the chosen cells, whatever gaps their joinids have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from geneformer_mcore.cells.faults import check_counts, looks_normalised
from geneformer_mcore.cells.genes import NAME_COLUMNS
from geneformer_mcore.cells.joinids import JoinIds
from geneformer_mcore.cells.normalise import BLOCK_ENTRIES, CountBlock
from geneformer_mcore.cells.soma import FAILURES, last_write_ms, open_experiment, unreadable
from geneformer_mcore.cells.soma_frame import JOINID, SomaFrame, as_pandas, texts
from geneformer_mcore.cells.soma_matrix import SomaMatrix
from geneformer_mcore.errors import DataError

ROWS_PER_BLOCK = 4096

CELL_ID_COLUMNS = ("observation_joinid", "obs_id", "cell_id")
"""Where the ids of cells are looked for in obs, in this order; where missing, the soma_joinid."""

LAYERS = ("raw", "counts", "data")
"""Layers of X that may hold the counts, in this order; else the only one there is."""

_FIRST_ROWS = 512
_PROBED_PLACES = 16


class ExperimentCounts:
    """A SOMA Experiment, open for reading; see inputs.Counts for what it gives.

    name:         the address, as given; stem: the last part of it
    location:     "X/LAYER"; passed_over: layers before it whose values are plainly no counts
    num_columns:  up to the last gene of var; X's shape may be far wider
    """

    is_sequential = False

    def __init__(
        self,
        address: str | Path,
        layer: str | None = None,
        allow_normalised: bool = False,
        value_filter: str | None = None,
        joinids: np.ndarray | None = None,
    ) -> None:
        """Opens the Experiment at `address`, a path or URI, or the human one of a Census there.

        layer:         of X ("raw" or "X/raw"); None: see LAYERS
        value_filter:  SOMA's, over obs: only cells for which it holds
        joinids:       int64, ascending: only these cells
        Raises DataError if it cannot be read, or has no such layer or cells.
        """
        self.name = str(address)
        self.stem = self.name.rstrip("/").rsplit("/", 1)[-1]
        self._whole_numbers = not allow_normalised
        self._longest = 0.0  # Entries per row of the longest block read so far.
        self._experiment = open_experiment(self.name)
        try:
            self._open(layer, value_filter, joinids)
        except BaseException as error:
            self.close()
            if isinstance(error, FAILURES):
                raise unreadable(self.name, "cannot be read", error) from error
            raise

    def _open(self, layer: str | None, where: str | None, among: np.ndarray | None) -> None:
        measurement = self._measurement()
        self._obs = SomaFrame(self._experiment["obs"], f"{self.name}: obs")
        self._var = SomaFrame(measurement["var"], f"{self.name}: var")
        self._ids = JoinIds(self._obs.joinids(where, among))
        self.num_cells = len(self._ids)
        if among is not None and where is None and self.num_cells != len(among):
            raise DataError(
                f"{self.name}: obs holds {self.num_cells:,} of the {len(among):,} cells asked for."
            )
        if not self.num_cells:
            chosen = " for which the filter holds" if where else ""
            raise DataError(
                f"{self.name}: no cells{chosen}: there is nothing to encode. Remedy: leave it out."
            )
        self._layers = list(measurement["X"]) if "X" in measurement else []
        self.location, self.passed_over, self._matrix = self._find_counts(measurement, layer)
        genes = self._var.joinids(None, None)
        if not len(genes):
            raise DataError(
                f"{self.name}: var names no genes: there is nothing to encode. Remedy: leave it "
                "out."
            )
        # tiledbsoma.io once gave every X room for 2,147,483,646 genes.
        self.num_columns = min(self._matrix.num_columns, int(genes[-1]) + 1)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The cells chosen and, where it lies on this machine, the time of the last write in ms.

        A Census in S3 is never written again.
        """
        written = [last_write_ms(part.address) for part in (self._obs, self._matrix)]
        return {
            "cells": self.num_cells,
            "chosen": sha256(self._ids.describe()).hexdigest()[:16],
            "written_ms": max(written),
        }

    @property
    def obs_columns(self) -> list[str]:
        """The columns of obs, soma_joinid left out."""
        return list(self._obs.kinds)

    def read_obs(self, start: int, stop: int) -> pd.DataFrame:
        """Rows start..stop-1 of obs, indexed by cell id."""
        if start == stop:
            return self.read_obs(0, 1).iloc[:0]  # With the categories of the others.
        ids = self._ids.read(start, stop)
        table = self._obs.read(ids, self.obs_columns)
        columns = {name: as_pandas(table[name]) for name in table.column_names}
        index = pd.Index(self._cell_ids(table, ids), dtype=object)
        return pd.DataFrame({n: c for n, c in columns.items() if c is not None}, index=index)

    def read_cell_ids(self, start: int, stop: int) -> list[str]:
        """The ids of rows start..stop-1 (see CELL_ID_COLUMNS)."""
        ids = self._ids.read(start, stop)
        there = [name for name in CELL_ID_COLUMNS if name in self._obs.kinds]
        return self._cell_ids(self._obs.read(ids, there), ids)

    def read_dataset_ids(self, start: int, stop: int) -> list[str]:
        """The dataset of each cell: obs' `dataset_id`, else the stem."""
        if "dataset_id" not in self._obs.kinds:
            return [self.stem] * (stop - start)
        table = self._obs.read(self._ids.read(start, stop), ["dataset_id"])
        return [name or self.stem for name in texts(table["dataset_id"])]

    def gene_columns(self) -> dict[str, Sequence[object]]:
        """The columns of var that hold text; `var_id` (else `feature_id`) under "index" too."""
        return dict(self._gene_texts)

    def gene_names(self) -> list[str]:
        """One name (symbol) per column, from var's column of symbols, else its ids."""
        found = (name for name in NAME_COLUMNS if name in self._gene_texts)
        return self._gene_texts[next(found, "index")]

    def blocks(
        self, num_rows: int = ROWS_PER_BLOCK, start: int = 0, stop: int | None = None
    ) -> Iterator[CountBlock]:
        """Rows start..stop-1 in blocks of at most `num_rows`, every value checked.

        How long rows are shows once some were read: blocks have BLOCK_ENTRIES at most if none of
        their cells has twice the genes of the longest block before.
        """
        stop = self.num_cells if stop is None else stop
        while start < stop:
            fitting = max(1, int(BLOCK_ENTRIES / self._longest)) if self._longest else _FIRST_ROWS
            block = self.read_rows(start, min(start + num_rows, start + fitting, stop))
            yield block
            start += len(block)
            self._longest = max(self._longest, len(block.data) / len(block), 1.0)

    def read_rows(self, start: int, stop: int) -> CountBlock:
        """Rows start..stop-1, every value checked.

        Raises DataError with row, gene, value and remedy at a value that is no count.
        """
        block = self._matrix.read(self._ids.read(start, stop), start)
        check_counts(block, self, self._matrix.name, self._whole_numbers, self._layers)
        return block

    def close(self) -> None:
        """Closes the Experiment; blocks already read stay good."""
        self._experiment.close()

    def __enter__(self) -> ExperimentCounts:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def _gene_texts(self) -> dict[str, list[str]]:
        table = self._var.read_all()
        places = table[JOINID].to_numpy()
        columns = {}
        for name in self._var.kinds:
            if self._var.holds_text(name):
                by_place = dict(zip(places.tolist(), texts(table[name]), strict=True))
                columns[name] = [by_place.get(i, "") for i in range(self.num_columns)]
        plain = [str(place) for place in range(self.num_columns)]
        index = columns.get("var_id", columns.get("feature_id", plain))
        return columns | {"index": index}

    def _cell_ids(self, table: pa.Table, ids: np.ndarray) -> list[str]:
        there = (name for name in CELL_ID_COLUMNS if name in table.column_names)
        name = next(there, None)
        found = texts(table[name]) if name else [""] * len(ids)
        return [text or str(joinid) for text, joinid in zip(found, ids.tolist(), strict=True)]

    def _measurement(self) -> Any:
        names = list(self._experiment["ms"]) if "ms" in self._experiment else []
        name = "RNA" if "RNA" in names or len(names) != 1 else names[0]
        if name not in names:
            raise DataError(
                f"{self.name}: no measurement RNA in ms; it has: {', '.join(names) or 'none'}. "
                "Remedy: name an Experiment of gene counts."
            )
        return self._experiment["ms"][name]

    def _find_counts(
        self, measurement: Any, layer: str | None
    ) -> tuple[str, tuple[str, ...], SomaMatrix]:
        """(location, places passed over, matrix)."""
        wanted = LAYERS if layer is None else (layer.removeprefix("X/"),)
        places = [name for name in wanted if name in self._layers]
        if not places and layer is None and len(self._layers) == 1:
            places = self._layers
        for i, name in enumerate(places):
            matrix = SomaMatrix(measurement["X"][name], f"{self.name}: X/{name}")
            if name == places[-1] or not self._whole_numbers or not self._is_normalised(matrix):
                return f"X/{name}", tuple(f"X/{place}" for place in places[:i]), matrix
        raise DataError(
            f"{self.name}: no layer X/{' or X/'.join(wanted)}; it has: "
            f"{', '.join(self._layers) or 'none'}. Remedy: name the layer of the raw counts with "
            "--layer."
        )

    def _is_normalised(self, matrix: SomaMatrix) -> bool:
        step = max(1, self.num_cells // _PROBED_PLACES)
        ids = np.array([self._ids.read(row, row + 1)[0] for row in range(0, self.num_cells, step)])
        return looks_normalised(matrix.read(ids, 0).data)
