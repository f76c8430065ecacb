"""AnnData output: a copy of an input or a new file, with annotations of its cells.

a.h5ad, byte for byte  ->  + obsm, obs column, uns  ->  b.h5ad
obs alone (a store)    ->  + obsm, obs column, uns  ->  b.h5ad
numbers, obs, var      ->  an AnnData in memory
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.elements import outside_hdf5
from geneformer_mcore.io.files import whole_file
from geneformer_mcore.io.retry import raise_if_io_error

_TIMES = {"date", "datetime", "datetime64", "time", "timedelta", "timedelta64"}
"""pandas' names of their columns."""

_MOST_COMPACT = 4000
"""Columns whose names are one attribute of 64 KiB, the most that HDF5 keeps in a group's header."""


@dataclass(frozen=True)
class Beside:
    """Annotations of cells, under AnnData's names for them.

    obsm:  name -> [cells, ...]    obs: name -> [cells]    uns: name -> plain values
    """

    obsm: Mapping[str, np.ndarray]
    obs: Mapping[str, np.ndarray | pd.Categorical]
    uns: Mapping[str, Any]

    def put(self, adata: Any) -> None:
        """Adds them to an AnnData in memory, replacing those of these names. A view becomes an
        AnnData of its own, as with scanpy's functions."""
        if adata.is_view:
            adata._init_as_actual(adata.copy())
        for name, values in self.obs.items():
            adata.obs[name] = values
        for name, values in self.obsm.items():
            adata.obsm[name] = values
        for name, values in self.uns.items():
            adata.uns[name] = values


def write_copy(source: Path, target: Path, beside: Beside) -> None:
    """Copies the h5ad file `source` to `target` with `beside` in it; `source` is only read."""
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)
        with h5py.File(partial, "r+") as file:
            obs = file.get("obs")  # a table before AnnData 0.7
            is_current = (
                isinstance(obs, h5py.Group) and obs.attrs.get("encoding-type") == "dataframe"
            )
            # A copy may lie where the other files of its source are not found.
            is_current = is_current and not any(outside_hdf5(file))
            if is_current:
                _add(file, beside)
        if not is_current:
            _rewrite(source, partial, beside)


def read_obsm(path: Path, name: str) -> np.ndarray:
    """float32 [cells, width], obsm[name] of an h5ad file, with NaN where it has it. DataError if it
    is no h5ad file, or has no such array of numbers that float32 can hold."""
    try:
        with h5py.File(path, "r") as file:
            values = _obsm_of(path, file.get("obsm", {}), name)
    except OSError as error:
        raise_if_io_error(str(path), error)
        raise DataError(
            f"{path}: obsm {name} can be read from an h5ad file only, and this cannot be read as "
            f"one: {error}. Remedy: check the path, or write the cells as h5ad."
        ) from error
    with np.errstate(over="ignore"):
        values_NH = values.astype(np.float32)
    if np.isinf(values_NH).any():
        raise DataError(
            f"{path}: obsm {name} must be finite numbers (NaN for cells without any), and "
            f"{int(np.isinf(values_NH).any(axis=1).sum()):,} cells have infinite ones. Remedy: "
            "embed these cells again."
        )
    return values_NH


def _obsm_of(path: Path, group: Any, name: str) -> np.ndarray:
    found = group.get(name) if isinstance(group, Mapping | h5py.Group) else None
    if isinstance(found, h5py.Dataset) and found.ndim == 2 and found.dtype.kind in "fiu":
        return found[:]
    there = ", ".join(group) if isinstance(group, Mapping | h5py.Group) else ""
    raise DataError(
        f"{path}: obsm has no array {name!r} of numbers; it holds {there or 'nothing'}. Remedy: "
        "launch/embed.py writes X_geneformer."
    )


def write_new(obs: pd.DataFrame, target: Path, beside: Beside) -> None:
    """Writes an AnnData file of cells without counts."""
    import anndata

    adata = anndata.AnnData(obs=_writable(obs))
    beside.put(adata)
    with whole_file(target) as partial, _roomy(adata.obs):
        adata.write_h5ad(partial)


def of_matrix(
    values: np.ndarray,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    layers: Mapping[str, np.ndarray],
    uns: Mapping[str, Any],
) -> Any:
    """An AnnData in memory of [cells, columns] numbers, and layers of the same shape."""
    import anndata

    return anndata.AnnData(values, obs=_writable(obs), var=var, layers=dict(layers), uns=dict(uns))


def _writable(obs: pd.DataFrame) -> pd.DataFrame:
    """The same values in column types that AnnData writes: text as objects where every cell has
    some, else as categories; times as text; numbers that may be missing as floats."""
    columns = {name: _writable_column(obs[name]) for name in obs.columns}
    return pd.DataFrame(columns, index=obs.index)


def _writable_column(column: pd.Series) -> pd.Series:
    kind = column.dtype
    if isinstance(kind, pd.Float32Dtype | pd.Float64Dtype):
        return column.astype(kind.numpy_dtype)
    if isinstance(kind, pd.CategoricalDtype) or kind.kind not in "OmM":
        return column  # which leaves objects, text of any kind, and times
    values = column.astype(object)
    if pd.api.types.infer_dtype(column, skipna=True) in _TIMES:
        values = values.map(str, na_action="ignore")
    return values.astype("category") if values.isna().any() else values


def _add(file: h5py.File, beside: Beside) -> None:
    from anndata.io import write_elem

    groups: dict[str, Mapping[str, Any]] = {"obsm": beside.obsm, "uns": beside.uns}
    for group, values in groups.items():
        if group not in file:
            write_elem(file, group, {})
        for name, value in values.items():
            write_elem(file[group], name, value)
    columns = [str(name) for name in file["obs"].attrs["column-order"]]
    for name, column in beside.obs.items():
        write_elem(file["obs"], name, column)
        columns += [name] if name not in columns else []
    if len(columns) > _MOST_COMPACT:
        _make_roomy(file, "obs")
    file["obs"].attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype())


def _make_roomy(file: h5py.File, name: str) -> None:
    """Lets attributes of a group be of any size: those of groups that track no order are not."""
    old, new = file[name], file.create_group(f".{name}", track_order=True)
    for attribute, value in old.attrs.items():
        new.attrs[attribute] = value
    for key in old:
        file.move(f"{name}/{key}", f".{name}/{key}")
    del file[name]
    file.move(f".{name}", name)


@contextmanager
def _roomy(obs: pd.DataFrame) -> Iterator[None]:
    """The same for what anndata writes: it does so by itself from 5,001 columns on."""
    config = h5py.get_config()
    before, config.track_order = config.track_order, obs.shape[1] > _MOST_COMPACT
    try:
        yield
    finally:
        config.track_order = before


def _rewrite(source: Path, target: Path, beside: Beside) -> None:
    import anndata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file is old
        adata = anndata.read_h5ad(source)
        beside.put(adata)
        with _roomy(adata.obs):
            adata.write_h5ad(target)
