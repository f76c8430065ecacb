"""AnnData output: a copy of an input or a new file, with annotations of its cells.

a.h5ad, byte for byte  ->  + obsm, obs column, uns  ->  b.h5ad
obs alone (a store)    ->  + obsm, obs column, uns  ->  b.h5ad
numbers, obs, var      ->  an AnnData in memory
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.io.blocks import READ_FAILURES
from geneformer_mcore.io.elements import as_text, outside_hdf5
from geneformer_mcore.io.files import whole_file
from geneformer_mcore.io.frames import StoredFrame
from geneformer_mcore.io.memory import require
from geneformer_mcore.io.retry import raise_if_io_error

_TIMES = {"date", "datetime", "datetime64", "time", "timedelta", "timedelta64"}
"""pandas' names of their columns."""

_MOST_COMPACT = 4000
"""Columns whose names are one attribute of 64 KiB, the most that HDF5 keeps in a group's header."""

_NO_KEY = re.compile("[/\0\ud800-\udfff]")
"""HDF5 reads `/` as a group, ends a name at NUL, and holds UTF-8."""


def as_key(name: str) -> str:
    """The name as AnnData writes one to HDF5: what it cannot hold becomes `_`."""
    key = _NO_KEY.sub("_", name)
    return f"{key}_" if key in ("", ".", "..", "_index") else key


def require_key(parameter: str, name: Any) -> None:
    """Raises ConfigError for what as_key would change, or no text."""
    if not isinstance(name, str) or as_key(name) != name:
        raise ConfigError(
            f"`{parameter}=` must be a name that an h5ad file can hold (text without `/`, not "
            f"empty), and is {name!r}. Remedy: another name."
        )


def _as_keys(names: Iterable[Any]) -> list[str]:
    """as_key of each, told apart by `_` where two become one."""
    texts = [str(name) for name in names]
    taken = {text for text in texts if as_key(text) == text}
    keys = []
    for text in texts:
        key = as_key(text)
        while key != text and key in taken:
            key += "_"
        taken.add(key)
        keys.append(key)
    return keys


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a view does
            for name, values in self.obs.items():
                adata.obs[name] = values
            for name, values in self.obsm.items():
                adata.obsm[name] = values
            for name, values in self.uns.items():
                adata.uns[name] = values


def check_annotations(adata: Any, key: Any, copy: bool) -> None:
    """Raises a GeneformerError for an object that Beside.put cannot add to (a view of a backed
    AnnData), or a name in obsm that no file can hold."""
    require(adata)
    require_key("key_added", key)
    if not copy and adata.is_view and adata.isbacked:
        raise DataError(
            "the AnnData is a view of a backed one, which anndata lets nobody add to. Remedy: "
            "`copy=True`, or `adata.to_memory()`."
        )


def copy_of(adata: Any) -> Any:
    """A copy in memory, also of a backed AnnData."""
    return adata.to_memory() if adata.isbacked else adata.copy()


def write_copy(source: Path, target: Path, beside: Beside) -> None:
    """Copies the h5ad file `source` to `target` with `beside` in it; `source` is only read."""
    with whole_file(target) as partial:
        shutil.copyfile(source, partial)
        with h5py.File(partial, "r+") as file:
            is_current = _is_current(file)
            if is_current:
                _add(file, beside)
        if not is_current:
            _rewrite(source, partial, beside)


def check_copy(source: Path) -> None:
    """Raises DataError where write_copy could not write: a file of AnnData before 0.7, or with
    parts in other files, is written by anndata, and here for a trial in memory."""
    import anndata
    from anndata.io import read_elem, write_elem

    try:
        with h5py.File(source, "r") as file:
            if _is_current(file):
                return
        with (
            warnings.catch_warnings(action="ignore"),
            h5py.File("trial", "w", driver="core", backing_store=False) as trial,
        ):
            write_elem(trial, "/", anndata.read_h5ad(source))
            read_elem(trial)
    except READ_FAILURES as error:
        raise_if_io_error(str(source), error)
        raise DataError(
            f"{source}: a file of this age is written anew by anndata, and it cannot be: {error}. "
            "Remedy: correct what it names, or `output=` of another kind (.npy)."
        ) from error


def _is_current(file: h5py.File) -> bool:
    """Whether a copy of the file takes a column more: obs is a group, as since AnnData 0.7, and no
    part lies in other files, which a copy might not find."""
    obs = file.get("obs")
    is_group = isinstance(obs, h5py.Group)
    is_frame = is_group and as_text(obs.attrs.get("encoding-type")) == "dataframe"
    return is_frame and not any(outside_hdf5(file))


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
    some, else as categories; times as text; numbers that may be missing as floats. Names become
    keys (see as_key)."""
    keys = _as_keys(obs.columns)
    columns = {key: _writable_column(obs.iloc[:, place]) for place, key in enumerate(keys)}
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
    columns = StoredFrame(file["obs"], "obs").columns
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
