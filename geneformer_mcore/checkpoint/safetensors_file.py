"""Tensors in the safetensors format, whose reading runs nothing and trusts nothing.

    8 bytes   N, the length of the header, little-endian
    N bytes   JSON: {name: {"dtype", "shape", "data_offsets": [begin, end)}, "__metadata__": {...}}
    the rest  the tensors' bytes, row by row, little-endian, without holes; offsets count from here

As the format's README describes it (github.com/huggingface/safetensors). Of its rules those are
checked that keep a damaged or hostile file from being read wrongly.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from geneformer_mcore.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000
_ALIGNMENT = 8


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes all tensors, in the order of their names."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    ordered = [(name, tensors[name].detach().cpu().contiguous()) for name in sorted(tensors)]
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read(path: Path) -> dict[str, torch.Tensor]:
    """{name: tensor}, in memory of their own. Raises CheckpointError for what is no such file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length))
            _check(header, size - 8 - length)
            header.pop(_METADATA, None)
            data = file.seek(8 + length)
            return {name: _tensor(file, data, entry) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file as its format says: {error}. Remedy: fetch it again, "
            "whole."
        ) from error


def _tensor(file: Any, data: int, entry: dict[str, Any]) -> torch.Tensor:
    begin, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    if begin == end:
        return torch.zeros(entry["shape"], dtype=dtype)
    file.seek(data + begin)
    return torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype).reshape(entry["shape"])


def _check(header: dict[str, Any], num_bytes: int) -> None:
    """Every tensor has bytes of its own, as many as its shape says, and no byte is left over."""
    spans = []
    for name, entry in header.items():
        if name == _METADATA:
            continue
        begin, end = entry["data_offsets"]
        shape, dtype = entry["shape"], entry["dtype"]
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is of type {dtype}, and {', '.join(_DTYPES)} are read")
        if not all(isinstance(each, int) and each >= 0 for each in (begin, end, *shape)):
            raise ValueError(f"{name} has shape {shape} and offsets {begin}, {end}")
        if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError(f"{name} has {end - begin} bytes for shape {shape} of {dtype}")
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ValueError(f"tensors leave a hole, or overlap, at byte {min(begin, at)}")
        at = end
    if at != num_bytes:
        raise ValueError(f"its tensors have {at:,} bytes, and the file {num_bytes:,}")
