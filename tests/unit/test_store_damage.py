"""Damage to any file of a store is seen: no flipped bit, missing, cut or added file is read over.

Bits at random places, many of them: tests/soak/store_flips.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiledbsoma

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.layout import list_files
from geneformer_mcore.store.reader import TokenStore
from tests.small_store import write_small_store

NUM_CELLS, NUM_GENES, SEQ_LENGTH = 1500, 400, 48
FRAGMENT = "__fragments/*"
KINDS = (
    "manifest.json",
    "vocabulary.json",
    "__group/*",
    "__meta/*",
    "obs/__schema/*",
    "tokens/__schema/*",
    "tokens/__meta/*",
    f"tokens/{FRAGMENT}/__fragment_metadata.tdb",
    f"tokens/{FRAGMENT}/a0.tdb",
    f"tokens/{FRAGMENT}/a0_validity.tdb",
    f"tokens/{FRAGMENT}/a0_var.tdb",
    f"tokens/{FRAGMENT}/d0.tdb",
    f"obs/{FRAGMENT}/a1.tdb",
    f"obs/{FRAGMENT}/a1_var.tdb",
    f"obs/{FRAGMENT}/d0.tdb",
)
"""Files of a store, one of each kind: data, offsets, validity, dimensions, metadata, JSON."""


def write_some_cells(path: Path) -> None:
    """A store of NUM_CELLS made-up cells."""
    rng = np.random.default_rng(1)
    cells = [
        [0, *(5 + rng.permutation(NUM_GENES)[: rng.integers(1, SEQ_LENGTH)]).tolist()]
        for _ in range(NUM_CELLS)
    ]
    write_small_store(path, cells, NUM_GENES, SEQ_LENGTH)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "store"
    write_some_cells(path)
    return path


@pytest.fixture
def copy(tmp_path: Path, path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def read_all(path: Path) -> tuple[object, ...]:
    """All that a training run reads of a store."""
    with TokenStore.open(path) as store:
        block = store.read(0, len(store))
        arrays = (block.tokens_T, block.offsets, block.keys_N)
        manifest = store.manifest
        return (*(array.tobytes() for array in arrays), manifest, store.vocabulary.checksum)


def read_obs(path: Path) -> list[dict[str, object]]:
    with tiledbsoma.open(str(path / "obs")) as obs:
        return obs.read().concat().to_pylist()


def refusal(path: Path) -> str:
    """What reading all of it is refused with; "" if it is not."""
    try:
        read_all(path)
    except DataError as error:
        return str(error) if "Remedy" in str(error) else ""
    return ""


def is_seen_flipped(store: Path, sound: Path, file: Path, byte: int, bit: int) -> bool:
    """Whether check_store sees that bit of a file of `store` flipped, a copy of `sound`; where it
    does not, the bit must be harmless. It is put back."""
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[byte] ^= 1 << bit
    file.write_bytes(flipped)
    problems = check_store(store)
    where = (file.relative_to(store), byte, bit)
    # The trainer reads tokens, keys, manifest and vocabulary: those are right, or refused.
    assert refusal(store) or read_all(store) == read_all(sound), where
    if not problems:
        assert read_all(store) == read_all(sound), where
        assert read_obs(store) == read_obs(sound), where
    file.write_bytes(content)
    return bool(problems)


def test_a_flipped_bit_in_any_kind_of_file_is_seen(copy: Path, path: Path) -> None:
    for kind in KINDS:
        file = next(file for file in sorted(copy.glob(kind)) if file.is_file())
        assert is_seen_flipped(copy, path, file, file.stat().st_size // 2, 3), kind
    assert check_store(copy) == []


@pytest.mark.parametrize("part", ["tokens", "obs"])
def test_every_file_is_missed(copy: Path, part: str) -> None:
    for name, file in list_files(copy).items():
        if not name.startswith(part):
            continue
        away = copy.parent / "away"
        file.rename(away)
        assert f"{name} is missing" in refusal(copy)
        assert f"{name} is missing" in check_store(copy)[0]
        away.rename(file)
    assert check_store(copy) == []


def test_every_file_of_another_length_is_seen(copy: Path) -> None:
    """Empty ones, by which TileDB commits, cannot be cut, but lengthened."""
    for name, file in list_files(copy).items():
        sound = file.read_bytes()
        other = sound[:-1] if sound else b"x"
        file.write_bytes(other)
        assert f"{name} has {len(other):,} bytes of {len(sound):,}" in refusal(copy)
        assert check_store(copy)
        file.write_bytes(sound)


def test_a_manifest_of_no_use_is_refused(copy: Path) -> None:
    manifest = copy / "manifest.json"
    sound = manifest.read_bytes()
    for damaged in (b"", sound[: len(sound) // 2], b"[]", b"\xff" + sound):
        manifest.write_bytes(damaged)
        assert "damaged manifest" in refusal(copy)
        assert check_store(copy)


@pytest.mark.parametrize("frame", ["tokens", "obs"])
def test_an_uncommitted_or_added_fragment_is_seen(copy: Path, frame: str) -> None:
    folder = copy / frame / "__fragments"
    fragment = next(folder.iterdir())
    added = fragment.with_name(fragment.name.replace("_22", "0_22"))
    shutil.copytree(fragment, added)
    assert f"{frame}/__fragments/{added.name}/" in refusal(copy)
    assert "is not of the store" in check_store(copy)[0]
    commit = next((copy / frame / "__commits").iterdir())
    shutil.copy(commit, commit.with_name(f"{added.name}.wrt"))
    assert "is not of the store" in refusal(copy)


def test_an_added_row_is_seen(copy: Path) -> None:
    with tiledbsoma.open(str(copy / "tokens"), "w") as frame:
        row = tiledbsoma.open(str(copy / "tokens")).read((slice(7, 7),)).concat()
        frame.write(row)
    assert "is not of the store" in refusal(copy)
    assert check_store(copy)


def test_a_file_that_cannot_be_read_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "tokens/x")

    monkeypatch.setattr("geneformer_mcore.store.reader.find_changes", fail)
    assert "tokens/x cannot be read: Permission denied" in refusal(copy)
