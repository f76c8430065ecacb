"""A Hugging Face folder's model.safetensors: read whole, or refused with our error."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geneformer_mcore.convert.hf_folder import WEIGHTS, read_weights
from geneformer_mcore.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.tensor([1.5, -2.25], dtype=torch.float16),
    "brain": torch.tensor([[3.5]], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "nothing": torch.zeros(0, 4),
}


def test_what_is_saved_is_read_into_memory_of_its_own(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    found = read_weights(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


def file_of(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: object = (1,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_the_format_as_its_readme_describes_it(tmp_path: Path) -> None:
    content = file_of({"a": entry(0, 8, [2])}, struct.pack("<2f", 1.5, -2))
    (tmp_path / WEIGHTS).write_bytes(content)
    assert read_weights(tmp_path)["a"].tolist() == [1.5, -2]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        file_of(["a"]),
        file_of({"a": entry(0, 8, [2])})[:-1],  # cut short
        file_of({"a": entry(0, 4)}),  # four bytes are nobody's
        file_of({"a": entry(0, 4), "b": entry(0, 4), "c": entry(4, 8)}),
        file_of({"a": entry(4, 8)}),
        file_of({"a": entry(0, 8)}),  # a number of 4 bytes
        file_of({"a": entry(0, 8, [2]), "b": entry(8, 12)}),  # beyond the end
        file_of({"a": entry(-4, 4, [2])}),
        file_of({"a": entry(0, 8, [-1, -2])}),
        file_of({"a": entry(0, 8, "2")}),
        file_of({"a": entry(0, 8, [2], "F8")}),
        file_of({"a": entry(0, 8, [16], "F4")}),  # of the format, but no type of torch's
        file_of({"a": entry(0, 0, [0, 2**70]), "b": entry(0, 8, [2])}),
        file_of({"a": {"dtype": "F32"}}),
    ],
)
def test_what_is_no_such_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a safetensors file .* Remedy: fetch it again"):
        read_weights(tmp_path)
