"""Elements of an input that are refused before they are read, by name.

encoding      another type or version than is known         )
HDF5          links and arrays that lie in other files      )  ->  DataError
zarr, SOMA    symbolic links that lead out of the folder    )
SOMA          members at other addresses than the group's   )

An input made by somebody else may name any file that its reader may read, which would then be in
stores and outputs. Archives (.zarr.zip) are read in place: what an entry is called leads nowhere.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

from geneformer_mcore.errors import DataError

_VERSIONS = {
    "anndata": ("0.1.0",),
    "dataframe": ("0.1.0", "0.2.0"),
    "csr_matrix": ("0.1.0",),
    "csc_matrix": ("0.1.0",),
    "array": ("0.2.0",),
}
"""Of AnnData's encodings, those that anndata 0.12 and 0.13 read. Files before 0.7 name none."""

_MOST_LISTED = 5
_MOST_NESTED = 8
_REMEDY = "get or write it again as a whole, or, if these files are your own, `allow_external=True`"


def check_encoding(item: Any, name: str, *kinds: str) -> None:
    """Raise DataError where `item` names an encoding that is none of `kinds`, or of a version that
    is not known: its values may mean something else."""
    kind = as_text(item.attrs.get("encoding-type"))
    version = as_text(item.attrs.get("encoding-version"))
    known = sorted({each for kind in kinds for each in _VERSIONS[kind]})
    if kind not in (None, *kinds) or version not in (None, *known):
        raise DataError(
            f"{name}: its encoding must be {' or '.join(kinds)} of version {' or '.join(known)}, "
            f"and it is {kind} of version {version}. Remedy: open it with the package that wrote "
            "it, and write an AnnData with anndata's write_h5ad."
        )


def as_text(value: Any) -> Any:
    """An attribute of a file: text that may be stored as bytes."""
    return value.decode() if isinstance(value, bytes) else value


# What lies outside


def check_hdf5(file: h5py.File, name: str) -> None:
    """Raises DataError if any element of the file lies in another one."""
    _refuse(name, outside_hdf5(file), _REMEDY)


def check_folder(folder: Path, remedy: str = _REMEDY) -> None:
    """Raises DataError if a symbolic link in the folder leads out of it; OSError if unreadable."""
    _refuse(str(folder), _outside_folder(folder), remedy)


def check_members(group: Any, address: str, remedy: str = _REMEDY) -> None:
    """Raises DataError if a member of an open SOMA collection does not lie below `address`."""
    root, members = _place(address), group.members().items()
    outside = (f"{key} ({uri})" for key, (uri, _) in members if not _is_in(_place(uri), root))
    _refuse(address, outside, remedy)


def _refuse(name: str, elements: Iterable[str], remedy: str) -> None:
    found = list(elements)
    if found:
        more = f" and {len(found) - _MOST_LISTED:,} more" if len(found) > _MOST_LISTED else ""
        raise DataError(
            f"{name}: all of its data must be in it, and these are elsewhere: "
            f"{', '.join(found[:_MOST_LISTED])}{more}. Remedy: {remedy}."
        )


def outside_hdf5(file: h5py.File) -> Iterator[str]:
    """The elements of the file that lie in other ones. A soft link leads through one of them, or
    stays in the file."""
    seen: set[int] = set()
    groups: list[tuple[str, h5py.h5g.GroupID]] = [("", file["/"].id)]
    while groups:
        path, group = groups.pop()
        for key in group:
            place, kind = f"{path}/{key.decode(errors='replace')}", group.links.get_info(key).type
            if kind not in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT):
                yield f"{place} (a link)"
            if kind != h5py.h5l.TYPE_HARD:
                continue
            item = h5py.h5o.open(group, key)
            address = h5py.h5o.get_info(item).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(item, h5py.h5g.GroupID):
                groups.append((place, item))
            elif isinstance(item, h5py.h5d.DatasetID):
                yield from _outside_array(item, place)


def _outside_array(item: h5py.h5d.DatasetID, place: str) -> Iterator[str]:
    settings = item.get_create_plist()
    if settings.get_external_count():
        yield f"{place} (external storage)"
    if settings.get_layout() == h5py.h5d.VIRTUAL:
        names = [settings.get_virtual_filename(i) for i in range(settings.get_virtual_count())]
        if any(name != "." for name in names):
            yield f"{place} (a virtual dataset)"


def _outside_folder(folder: Path) -> Iterator[str]:
    root, folders = os.path.realpath(folder), [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    if not _is_in(os.path.realpath(entry.path), root):
                        yield f"{os.path.relpath(entry.path, folder)} (a symbolic link)"
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


def _place(address: str) -> str:
    """A path without links, of a folder on this machine; another address as it is."""
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "file"):
        return f"{scheme}://{posixpath.normpath(rest)}"
    return os.path.realpath(rest if scheme else address)  # TileDB quotes nothing in it.


def _is_in(place: str, root: str) -> bool:
    return place == root or place.startswith(root.rstrip("/") + "/")


# Virtual datasets: HDF5 reads zeros where a source of one is missing


def check_sources(file: h5py.File, name: str) -> None:
    """Raise DataError if a source of a virtual dataset is missing, or smaller than it should be."""
    for place, item in _every_element(file):
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


def _every_element(file: h5py.File) -> Iterator[tuple[str, Any]]:
    """(path, group or dataset): all, those behind links too; None for one that is missing."""
    groups: list[tuple[str, h5py.Group]] = [("", file["/"])]
    seen = set()
    while groups:
        path, group = groups.pop()
        for key in group:
            item, place = group.get(key), f"{path}/{key}"
            yield place, item
            if isinstance(item, h5py.Group):
                info = h5py.h5o.get_info(item.id)
                if (info.fileno, info.addr) not in seen:
                    seen.add((info.fileno, info.addr))
                    groups.append((place, item))


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
