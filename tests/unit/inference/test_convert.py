"""Hugging Face's vocabulary and attention by ours; its model.safetensors, read whole or refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geneformer_mcore.convert import hf_folder, hf_keys, token_rows
from geneformer_mcore.convert.hf_folder import WEIGHTS, read_weights
from geneformer_mcore.errors import CheckpointError, DataError

GENES = ("ENSG1", "ENSG2", "ENSG3")


def rows_of(*names: str) -> torch.Tensor:
    tokens = {name: number for number, name in enumerate(names)}
    return token_rows.their_rows(tokens, GENES, len(names))


def test_rows_follow_names_in_any_order() -> None:
    """The ids of their first version are ours less three."""
    rows = rows_of("<pad>", "<mask>", *GENES)
    assert rows.tolist() == [-1, 1, 0, -1, -1, 2, 3, 4]
    rows = rows_of("ENSG3", "<eos>", "ENSG1", "<cls>", "ENSG2", "<pad>", "<mask>")
    assert rows.tolist() == [3, 6, 5, 1, -1, 2, 4, 0]


@pytest.mark.parametrize("specials", token_rows.LAYOUTS.values())
def test_a_layout_is_known_by_its_size(specials: tuple[str, ...]) -> None:
    found = token_rows.dictionary_by_size(len(specials) + 3, GENES)
    assert list(found) == [*specials, *GENES]
    assert list(found.values()) == list(range(len(specials) + 3))


def test_a_table_goes_there_and_back() -> None:
    rows = rows_of("<pad>", "<mask>", *GENES)
    theirs = torch.randn(5, 2)
    ours = token_rows.to_ours(theirs, rows, new=-7)
    assert (ours[[0, 3, 4]] == -7).all()
    assert torch.equal(token_rows.to_theirs(torch.cat([ours, torch.zeros(3, 2)]), rows), theirs)


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (("<pad>", "ENSG1", "ENSG2"), "lacks 1 of the vocabulary's 3 and has 0 others, ENSG3"),
        (("<pad>", *GENES, "ENSG4"), "has 1 others, ENSG4"),
        (("<pad>", "[PAD]", *GENES), r"two names for our \[PAD\]"),
    ],
)
def test_other_dictionaries_are_refused(names: tuple[str, ...], error: str) -> None:
    with pytest.raises(DataError, match=error):
        rows_of(*names)


@pytest.mark.parametrize("ids", [(0, 1, 1), (0, 1, 3), (0, 1, "2"), (0, 1)])
def test_every_row_needs_one_name(ids: tuple) -> None:
    tokens = dict(zip(GENES, ids, strict=False))
    with pytest.raises(DataError, match="each of the 3 rows"):
        token_rows.their_rows(tokens, GENES, 3)


def test_a_size_of_no_layout_is_refused_with_its_numbers() -> None:
    with pytest.raises(DataError, match=r"model has 99 tokens.*3 genes.*ours: 8"):
        token_rows.dictionary_by_size(99, GENES)


@pytest.mark.parametrize("shape", [(12, 5), (12,)])
def test_query_key_and_value_of_a_head_lie_together(shape: tuple[int, ...]) -> None:
    parts = [torch.randn(shape) for _ in range(3)]
    whole = hf_keys.fused(parts, heads=4)
    for head in range(4):
        for number, part in enumerate(parts):
            first = (head * 3 + number) * 3
            assert torch.equal(whole[first : first + 3], part[head * 3 : head * 3 + 3])
    for part, again in zip(parts, hf_keys.split(whole, heads=4), strict=True):
        assert torch.equal(part, again)


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
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


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


UNPLAIN = {
    "sparse": torch.eye(2).to_sparse(),
    "without content": torch.empty(2, device="meta"),
    "complex": torch.zeros(2, dtype=torch.complex64),
}


@pytest.mark.parametrize("tensor", UNPLAIN.values(), ids=UNPLAIN)
def test_tensors_that_are_no_plain_numbers_are_refused(
    tensor: torch.Tensor, tmp_path: Path
) -> None:
    torch.save({"w": tensor}, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match=r"w must be a plain tensor of real numbers.*Remedy"):
        hf_folder.read_state_dict(tmp_path / "m.bin")


def test_what_transformers_must_rewrite_is_named(tmp_path: Path) -> None:
    """Weights in several files, whole numbers for weights, and names of old versions."""
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"cut into several files.*save_pretrained"):
        hf_folder.weights_file(tmp_path)
    old = {"LayerNorm.gamma": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="gamma and beta are its old names"):
        hf_keys.check_shapes(old, {"LayerNorm.weight": (2,)})
    with pytest.raises(CheckpointError, match=r"1 not of floating point: w \(torch\.int64\)"):
        hf_keys.check_shapes({"w": torch.zeros(2, dtype=torch.int64)}, {"w": (2,)})
    with pytest.raises(CheckpointError, match="1,000,000 layers has more tensors than the 1 "):
        hf_keys.check_layers(1_000_000, old)
