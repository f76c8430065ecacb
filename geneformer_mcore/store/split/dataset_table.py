"""The data sets of a corpus for a split by data set: cells, assays and tissues of each.

token store | CSV or Parquet table | Census plan | h5ad | zarr | SOMA Experiment
    ->  (dataset_id, assay, tissue_general): cells, by slices  ->  DatasetTable
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.census import TABLE_COLUMNS
from geneformer_mcore.store.census_download import PLAN_FILE, CensusPlan
from geneformer_mcore.store.layout import MANIFEST_FILE, OBS
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.soma_io import SomaReader
from geneformer_mcore.tokenizer.genes import InputOptions

COVERED = ("assay", "tissue_general")
"""Columns of obs every value of which must occur in the training split."""

CELLS_COLUMN = "n_cells"
"""Column of a table with a row for several cells: their number."""

_ROWS = 262_144
_NO_LABEL = frozenset({"", "nan", "na", "none", "<na>"})
_TEXT_TABLES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Dataset:
    """labels: the values of each of the covered columns that its cells have."""

    dataset_id: str
    cells: int
    labels: dict[str, frozenset[str]]


@dataclass(frozen=True)
class DatasetTable:
    """datasets: sorted by id; missing: {covered column: a source that lacks it}."""

    datasets: tuple[Dataset, ...]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> int:
        """Of all data sets."""
        return sum(dataset.cells for dataset in self.datasets)


class DatasetCounter:
    """Counts cells by data set and labels, from any number of slices."""

    def __init__(self) -> None:
        self._cells: Counter[str] = Counter()
        self._labels: dict[str, dict[str, set[str]]] = {}
        self._missing: dict[str, str] = {}

    def add(self, rows: pd.DataFrame, source: str) -> None:
        """rows: `dataset_id`, those of the covered columns there are, `n_cells` if not 1 each."""
        columns = [name for name in COVERED if name in rows]
        for name in set(COVERED) - set(columns):
            self._missing.setdefault(name, source)
        names = ["dataset_id", *columns]
        weights = rows[CELLS_COLUMN].to_numpy() if CELLS_COLUMN in rows else 1
        frame = rows[names].assign(**{CELLS_COLUMN: weights})
        found = frame.groupby(names, observed=True, dropna=False, sort=False)
        for key, number in found[CELLS_COLUMN].sum().items():
            dataset_id, *labels = map(_text, key if isinstance(key, tuple) else (key,))
            if not dataset_id:
                raise DataError(
                    f"{source}: {int(number):,} cells name no data set (dataset_id is blank). "
                    "Remedy: name it, or leave them out."
                )
            self._cells[dataset_id] += int(number)
            of_dataset = self._labels.setdefault(dataset_id, {name: set() for name in COVERED})
            for name, label in zip(columns, labels, strict=True):
                if label and number:
                    of_dataset[name].add(label)

    def table(self) -> DatasetTable:
        """The data sets that have cells."""
        datasets = [
            Dataset(
                dataset_id,
                cells,
                {name: frozenset(found) for name, found in self._labels[dataset_id].items()},
            )
            for dataset_id, cells in sorted(self._cells.items())
            if cells
        ]
        return DatasetTable(tuple(datasets), dict(sorted(self._missing.items())))


def _text(value: object) -> str:
    text = str(value).strip()
    return "" if text.lower() in _NO_LABEL else text


def read_dataset_table(
    sources: Sequence[str | Path], options: InputOptions | None = None
) -> DatasetTable:
    """The data sets of all sources together. Raises DataError for one that cannot be read.

    A file of counts without a `dataset_id` is one data set, named by the file.
    """
    counter = DatasetCounter()
    for source in dict.fromkeys(map(str, sources)):
        for rows in _slices(source, options or InputOptions()):
            counter.add(rows, source)
    table = counter.table()
    if not table.datasets:
        raise DataError(f"no cells in {', '.join(map(str, sources))}: there is nothing to split.")
    return table


def _slices(source: str, options: InputOptions) -> Iterator[pd.DataFrame]:
    path = Path(source)
    if (path / MANIFEST_FILE).is_file():
        return _of_store(path)
    if (path / PLAN_FILE).is_file():
        plan = CensusPlan.load(path)
        return iter([pd.DataFrame(plan.table, columns=[*TABLE_COLUMNS, CELLS_COLUMN])])
    if path.suffix in _TEXT_TABLES or path.suffix == ".parquet":
        return _of_table(path)
    return _of_counts(source, options)


def _of_store(path: Path) -> Iterator[pd.DataFrame]:
    with TokenStore.open(path) as store, SomaReader(path) as reader:
        columns = ["dataset_id", *(name for name in COVERED if name in store.manifest.labels)]
        for start in range(0, len(store), _ROWS):
            yield reader.read(OBS, start, min(start + _ROWS, len(store)), columns).to_pandas()


def _of_counts(source: str, options: InputOptions) -> Iterator[pd.DataFrame]:
    with options.open(source) as counts:
        for start in range(0, counts.num_cells, _ROWS):
            stop = min(start + _ROWS, counts.num_cells)
            obs = counts.read_obs(start, stop)
            columns = {name: obs[name].to_numpy() for name in COVERED if name in obs}
            yield pd.DataFrame({"dataset_id": counts.read_dataset_ids(start, stop), **columns})


def _of_table(path: Path) -> Iterator[pd.DataFrame]:
    try:
        frame = _read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}.") from error
    if "dataset_id" not in frame:
        raise DataError(
            f"{path}: a table of data sets needs the column dataset_id, and has none. Remedy: one "
            f"row per cell, or per data set with the column {CELLS_COLUMN}; also "
            f"{' and '.join(COVERED)}."
        )
    if CELLS_COLUMN in frame:
        numbers = pd.to_numeric(frame[CELLS_COLUMN], errors="coerce")
        wrong = ~(numbers >= 0) | (numbers % 1 != 0)
        if wrong.any():
            first = frame[CELLS_COLUMN][wrong].iloc[0]
            raise DataError(f"{path}: {CELLS_COLUMN} must be whole numbers >= 0, not {first!r}.")
        frame = frame.assign(**{CELLS_COLUMN: numbers.astype("int64")})
    yield frame


def _wanted(name: str) -> bool:
    return name in ("dataset_id", CELLS_COLUMN, *COVERED)


def _read_table(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        with pa.parquet.ParquetFile(path) as file:
            return file.read([*filter(_wanted, file.schema_arrow.names)]).to_pandas()
    separator = _TEXT_TABLES[path.suffix]
    # As text: a dataset_id of digits alone keeps its zeros.
    return pd.read_csv(path, sep=separator, usecols=_wanted, dtype=str, keep_default_na=False)
