"""Safe reading of torch's description of a checkpoint, a pickle, which could run code.

    .metadata (a pickle)  ->  an unpickler that builds descriptions of tensors only
                          ->  names of files within the checkpoint  ->  torch's reader

A checkpoint with objects other than tensors, which torch would unpickle, too, is refused.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as descriptions
from torch.distributed.checkpoint.api import CheckpointException

from geneformer_mcore.errors import CheckpointError

FileSystemReader = filesystem.FileSystemReader
METADATA = ".metadata"

_HARMLESS = frozenset(
    (kind.__module__, kind.__qualname__)
    for kind in (
        descriptions.Metadata,
        descriptions.MetadataIndex,
        descriptions.StorageMeta,
        descriptions.TensorStorageMetadata,
        descriptions.TensorProperties,
        descriptions._MEM_FORMAT_ENCODING,
        descriptions.ChunkStorageMetadata,
        filesystem._StorageInfo,
        planner.SavePlan,
        planner.WriteItem,
        planner.WriteItemType,
        planner.TensorWriteData,
        torch.serialization._get_layout,
    )
) | {("torch", "Size")}


class _PlainUnpickler(pickle.Unpickler):
    """Builds descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _HARMLESS:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _enum_member(kind: Any, name: Any) -> Enum:
    """`getattr` as in the pickle of an enum's member by Python before 3.11.4."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of {kind!r}")


def load(folder: Path) -> descriptions.Metadata:
    """The description of `folder`. CheckpointError if not of tensors in files of that folder."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        _check(metadata, folder)
    # A damaged pickle can raise nearly anything; a hostile one must end here too.
    except Exception as error:
        raise CheckpointError(_refusal(path, f"{type(error).__name__}: {error}")) from None
    return metadata


def _check(metadata: Any, folder: Path) -> None:
    if not isinstance(metadata, descriptions.Metadata):
        raise ValueError("it describes no checkpoint")
    here = {path.name: path.stat().st_size for path in folder.iterdir()}
    stored: Counter[str] = Counter()
    for part, place in metadata.storage_data.items():
        if place.relative_path not in here:
            raise ValueError(f"{place.relative_path!r} is no file of it")
        if not 0 <= place.offset <= place.offset + place.length <= here[place.relative_path]:
            raise ValueError(f"{place.relative_path} ends before a part of {part.fqn}")
        stored[part.fqn] += place.length
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, descriptions.TensorStorageMetadata):
            raise ValueError(f"{key} is no tensor")
        # Before memory is taken for it.
        if math.prod(entry.size) * entry.properties.dtype.itemsize > stored[key]:
            raise ValueError(f"{key} is larger than its files: {list(entry.size)}")


def _refusal(path: Path, why: str) -> str:
    return (
        f"{path} is not what this program writes: {why}. It is not read, as reading it could run "
        "code. Take a checkpoint from a source that you trust."
    )


@contextlib.contextmanager
def read_by_torch() -> Iterator[None]:
    """Within it torch's readers load descriptions by `load`; that tensors are not as wanted or
    cannot be read is a CheckpointError."""
    theirs = FileSystemReader.read_metadata

    def read_metadata(reader: FileSystemReader, *_args: Any, **_kwargs: Any) -> Any:
        metadata = load(Path(reader.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = descriptions.StorageMeta()
        metadata.storage_meta.load_id = reader.load_id
        return metadata

    FileSystemReader.read_metadata = read_metadata  # type: ignore[assignment,method-assign]
    try:
        yield
    # torch has an exception for what fails on any rank; it is no Exception.
    except (CheckpointException, CheckpointingException) as error:
        why = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"the tensors of the checkpoint cannot be read: {why} Remedy: take another checkpoint, "
            "or a good copy of it."
        ) from error
    finally:
        FileSystemReader.read_metadata = theirs  # type: ignore[method-assign]
