"""A checkpoint's pickle can name tensors and files of its own folder, and do nothing else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem
from torch.distributed.checkpoint import metadata as descriptions

from geneformer_mcore.checkpoint import safe_metadata
from geneformer_mcore.errors import CheckpointError


def described(path: str = "a.distcp", **entries: Any) -> descriptions.Metadata:
    index = descriptions.MetadataIndex("w", torch.Size([0]))
    properties = descriptions.TensorProperties(dtype=torch.bfloat16)
    tensor = descriptions.TensorStorageMetadata(properties, torch.Size([3]), [])
    return descriptions.Metadata(
        state_dict_metadata={"w": tensor, **entries},
        storage_data={index: filesystem._StorageInfo(path, 0, 8)},
    )


def write(folder: Path, content: Any) -> Path:
    folder.mkdir()
    (folder / "a.distcp").write_bytes(b"tensors")
    pickled = content if isinstance(content, bytes) else pickle.dumps(content)
    (folder / safe_metadata.METADATA).write_bytes(pickled)
    return folder


def test_a_plain_description_is_read_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "step", described())
    assert safe_metadata.load(folder).state_dict_metadata == described().state_dict_metadata
    theirs = FileSystemReader.read_metadata
    with safe_metadata.read_by_torch():
        read = FileSystemReader(folder).read_metadata()
    assert read.storage_data == described().storage_data
    assert FileSystemReader.read_metadata is theirs


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("nested", [False, True])
def test_code_in_it_is_refused_and_not_run(tmp_path: Path, nested: bool) -> None:
    mine = Malicious(tmp_path / "hacked")
    folder = write(tmp_path / "step", described(extra=mine) if nested else mine)
    with safe_metadata.read_by_torch(), pytest.raises(CheckpointError, match="asks for posix"):
        FileSystemReader(folder).read_metadata()
    assert not (tmp_path / "hacked").exists()


NO_PICKLES = (b"", b"\x80", b"nonsense", pickle.dumps(described())[:-20])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (described("../secret"), "'../secret' is no file of it"),
        (described("/etc/passwd"), "is no file of it"),
        (described("missing.distcp"), "is no file of it"),
        (described(x=descriptions.BytesStorageMetadata()), "asks for .*BytesStorageMetadata"),
        ({"w": 1}, "describes no checkpoint"),
        *((content, "is not what this program writes") for content in NO_PICKLES),
    ],
)
def test_any_other_content_is_refused(tmp_path: Path, content: Any, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        safe_metadata.load(write(tmp_path / "step", content))
