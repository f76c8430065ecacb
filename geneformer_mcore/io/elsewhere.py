"""Parts of an HDF5 file that lie in other files, which are easily lost.

input   ->  check_sources: HDF5 reads zeros where the source of a virtual dataset is missing
output  ->  check_whole: a copy in another folder would not find what the links in it name
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

from geneformer_mcore.errors import DataError

_MOST_NESTED = 8


def check_sources(file: h5py.File, name: str) -> None:
    """Raise DataError if a source of a virtual dataset is missing, or smaller than it should be."""
    for place, _, item in _elements(file):
        if isinstance(item, h5py.Dataset):
            check_array(item, f"{name}: {place}")


def check_array(item: h5py.Dataset, name: str) -> None:
    """`check_sources` of one array."""
    fault = _fault_of(item) if item.is_virtual else ""
    if fault:
        raise DataError(
            f"{name} is a virtual dataset, whose sources must all be there, and {fault}. Remedy: "
            "put that file back, or write the data again as one file."
        )


def check_whole(path: Path) -> None:
    """Raise DataError if parts of an h5ad file lie in other files."""
    with h5py.File(path, "r") as file:
        parts = [place for place, link, item in _elements(file) if _is_elsewhere(link, item)]
    if parts:
        raise DataError(
            f"{path}: an h5ad output is a copy of this input, all of whose data must be in it, and "
            f"these lie in other files: {', '.join(parts[:5])}{', ...' if parts[5:] else ''}. "
            "Remedy: write it as a whole (anndata: read_h5ad, write_h5ad) and give that."
        )


def _elements(file: h5py.File) -> Iterator[tuple[str, Any, Any]]:
    """(path, link, group or dataset): all, those behind links too; None for one that is missing."""
    groups: list[tuple[str, h5py.Group]] = [("", file["/"])]
    seen = set()
    while groups:
        path, group = groups.pop()
        for key in group:
            item, place = group.get(key), f"{path}/{key}"
            yield place, group.get(key, getlink=True), item
            if isinstance(item, h5py.Group):
                info = h5py.h5o.get_info(item.id)
                if (info.fileno, info.addr) not in seen:
                    seen.add((info.fileno, info.addr))
                    groups.append((place, item))


def _is_elsewhere(link: Any, item: Any) -> bool:
    if isinstance(link, h5py.ExternalLink) or not isinstance(item, h5py.Dataset):
        return isinstance(link, h5py.ExternalLink)
    sources = item.virtual_sources() if item.is_virtual else ()
    return bool(item.external) or any(source.file_name != "." for source in sources)


def _fault_of(item: h5py.Dataset, depth: int = 0) -> str:
    """What is wrong with a source of a virtual dataset; "" if nothing is."""
    for source in item.virtual_sources():
        fault = _fault_of_source(source, item, depth)
        if fault:
            return f"{source.dset_name} of {source.file_name} {fault}"
    return ""


def _fault_of_source(source: Any, item: h5py.Dataset, depth: int) -> str:
    if source.file_name == ".":
        return _fault_in(item.file, source, depth)
    main = Path(item.file.filename)
    for folder in (main.parent, Path(), main.resolve().parent):  # As HDF5 looks for it.
        for place in (folder / source.file_name, folder / Path(source.file_name).name):
            with suppress(OSError), h5py.File(place, "r") as file:
                return _fault_in(file, source, depth)
    return "cannot be opened"


def _fault_in(file: h5py.File, source: Any, depth: int) -> str:
    found = file.get(source.dset_name)
    if not isinstance(found, h5py.Dataset) or depth == _MOST_NESTED:
        return "is no array" if depth < _MOST_NESTED else "is nested too deep"
    if _is_short(found, source):
        return f"holds less than is read of it: {found.shape}"
    return _fault_of(found, depth + 1) if found.is_virtual else ""


def _is_short(found: h5py.Dataset, source: Any) -> bool:
    with suppress(RuntimeError, ValueError):  # HDF5 keeps no bounds where all of it is read.
        last = source.src_space.get_select_bounds()[1]
        return any(number >= size for number, size in zip(last, found.shape, strict=False))
    with suppress(RuntimeError):  # Of a source that may grow, what there is.
        return found.size < source.vspace.get_select_npoints()
    return False
