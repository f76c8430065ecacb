"""The safetensors format: what is written is read, also by its own library; damage is told."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from geneformer_mcore.checkpoint import safetensors_file
from geneformer_mcore.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3).T,
    "half": torch.tensor([1.5, -2.25], dtype=torch.float16),
    "brain": torch.tensor([[3.5]], dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "nothing": torch.zeros(0, 4),
}


def equal(found: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == TENSORS.keys()
    return all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "a", TENSORS)
    assert equal(safetensors_file.read(tmp_path / "a"))


def test_its_own_library_agrees(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors_file.write(tmp_path / "ours", TENSORS)
    assert equal(library.load_file(tmp_path / "ours"))
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    library.save_file(contiguous, tmp_path / "theirs")
    assert equal(safetensors_file.read(tmp_path / "theirs"))


def file_of(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: object = (1,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        file_of(["a"]),
        file_of({"a": entry(0, 4)}),  # four bytes are nobody's
        file_of({"a": entry(0, 4), "b": entry(0, 4), "c": entry(4, 8)}),
        file_of({"a": entry(4, 8)}),
        file_of({"a": entry(0, 8)}),  # a number of 4 bytes
        file_of({"a": entry(0, 8, [2]), "b": entry(8, 12)}),  # beyond the end
        file_of({"a": entry(-4, 4, [2])}),
        file_of({"a": entry(0, 8, [-1, -2])}),
        file_of({"a": entry(0, 8, "2")}),
        file_of({"a": entry(0, 8, [2], "F8")}),
        file_of({"a": entry(0, 0, [0, 2**70]), "b": entry(0, 8, [2])}),
        file_of({"a": {"dtype": "F32"}}),
    ],
)
def test_what_is_no_such_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors"):
        safetensors_file.read(tmp_path / "a")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    safetensors_file.write(tmp_path / "a", TENSORS)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="Remedy"):
        safetensors_file.read(tmp_path / "a")
