"""Files of which parts lie in other files: used whole, or refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.io.counts import open_counts
from tests.support.small_cells import random_counts, write_h5ad

COUNTS = random_counts(np.random.default_rng(4), 6, 20, density=0.4)


def make_virtual(path: Path, place: str, *sources: str) -> None:
    """Moves an array of `path` into files beside it, in equal parts."""
    with h5py.File(path, "r+") as file:
        values, attributes = file[place][:], dict(file[place].attrs)
        layout = h5py.VirtualLayout(values.shape, file[place].dtype)
        bounds = np.linspace(0, len(values), len(sources) + 1).astype(int)
        for name, first, last in zip(sources, bounds[:-1], bounds[1:], strict=True):
            with h5py.File(path.parent / name, "a") as source:
                source[place] = values[first:last]
            layout[first:last] = h5py.VirtualSource(name, place, (last - first,))
        del file[place]
        file.create_virtual_dataset(place, layout).attrs.update(attributes)


@pytest.fixture
def virtual(tmp_path: Path) -> Path:
    path = write_h5ad(tmp_path / "v.h5ad", COUNTS)
    for place in ("X/data", "X/indices", "obs/_index"):
        make_virtual(path, place, "one.h5", "two.h5")
    return path


def test_a_whole_virtual_dataset_is_read(virtual: Path) -> None:
    make_virtual(virtual.with_name("one.h5"), "X/data", "deeper.h5")
    with open_counts(virtual, allow_external=True) as counts:
        np.testing.assert_array_equal(counts.read_rows(0, 6).data, COUNTS.data)


def gone(folder: Path) -> None:
    (folder / "two.h5").rename(folder / "three.h5")


def no_file_of_hdf5(folder: Path) -> None:
    (folder / "two.h5").write_bytes(b"not whole")


def without(place: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with h5py.File(folder / "two.h5", "r+") as file:
            del file[place]

    return change


def short(folder: Path) -> None:
    with h5py.File(folder / "two.h5", "r+") as file:
        values = file["X/data"][:-1]
        del file["X/data"]
        file["X/data"] = values


def gone_deeper(folder: Path) -> None:
    make_virtual(folder / "one.h5", "X/data", "deeper.h5")
    (folder / "deeper.h5").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone, "of two.h5 cannot be opened"),
        (no_file_of_hdf5, "of two.h5 cannot be opened"),
        (without("X/data"), "X/data of two.h5 is no array"),
        (without("obs/_index"), "obs/_index of two.h5 is no array"),
        (short, "X/data of two.h5 holds less than is read of it"),
        (gone_deeper, "X/data of one.h5 X/data of deeper.h5 cannot be opened"),
    ],
)
def test_no_missing_source_is_read_as_zeros(
    virtual: Path, change: Callable[[Path], None], message: str
) -> None:
    change(virtual.parent)
    with pytest.raises(DataError, match=rf"v\.h5ad: /(X|obs)/\w+ is a virtual dataset.*{message}"):
        open_counts(virtual, allow_external=True)
