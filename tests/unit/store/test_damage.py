"""Damage to any file of a store is seen: no flipped bit, missing, cut or added file is read over.

Bits at random places, many of them: tests/soak/store_flips.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.check import check_store
from geneformer_mcore.store.layout import Manifest, list_files
from geneformer_mcore.store.reader import TokenStore
from tests.support.small_cells import flip_bit, vocabulary_of
from tests.support.small_store import write_small_store

NUM_CELLS, NUM_GENES, SEQ_LENGTH = 1500, 400, 48
KINDS = """
manifest.json vocabulary.json __group/* __meta/* obs/__schema/* tokens/__schema/* tokens/__meta/*
tokens/__fragments/*/__fragment_metadata.tdb tokens/__fragments/*/a0.tdb
tokens/__fragments/*/a0_validity.tdb tokens/__fragments/*/a0_var.tdb tokens/__fragments/*/d0.tdb
obs/__fragments/*/a1.tdb obs/__fragments/*/a1_var.tdb obs/__fragments/*/d0.tdb
"""
"""Files of a store, one of each kind: data, offsets, validity, dimensions, metadata, JSON."""


def write_some_cells(path: Path) -> None:
    """A store of NUM_CELLS made-up cells."""
    rng = np.random.default_rng(1)
    genes = (rng.permutation(NUM_GENES)[: rng.integers(1, SEQ_LENGTH)] for _ in range(NUM_CELLS))
    write_small_store(path, [[0, *(5 + g).tolist()] for g in genes], NUM_GENES, SEQ_LENGTH)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    write_some_cells(path := tmp_path_factory.mktemp("stores") / "store")
    return path


@pytest.fixture
def copy(tmp_path, path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def read_all(path: Path) -> tuple[object, ...]:
    """All that a training run reads of a store."""
    with TokenStore.open(path) as store:
        block = store.read(0, len(store))
        arrays = [array.tobytes() for array in (block.tokens_T, block.offsets, block.keys_N)]
        return (*arrays, store.manifest, store.vocabulary.checksum)


def read_obs(path: Path) -> list[dict[str, object]]:
    with tiledbsoma.open(str(path / "obs")) as obs:
        return obs.read().concat().to_pylist()


def refusal(path: Path) -> str:
    """The message with which reading all of it is refused; "" if it is not."""
    try:
        read_all(path)
    except DataError as error:
        return str(error) if "Remedy" in str(error) else ""
    return ""


def opening(path: Path) -> str:
    """The message with which it is not even opened."""
    with pytest.raises(DataError, match="Remedy") as error:
        TokenStore.open(path)
    return str(error.value)


def unlist_files(store: Path) -> None:
    """Make it one that was built before a manifest listed the store's files."""
    replace(Manifest.load(store), files={}).save(store)


def write_row(store: Path, frame: str, **values: object) -> None:
    """Write row 7 again, with other values in some columns."""
    with tiledbsoma.open(str(store / frame), "w") as written:
        row = tiledbsoma.open(str(store / frame)).read((slice(7, 7),)).concat()
        for name, value in values.items():
            place = row.schema.get_field_index(name)
            row = row.set_column(place, name, pa.array([value], row.schema.field(name).type))
        written.write(row)


def is_seen_flipped(store: Path, sound: Path, file: Path, byte: int, bit: int) -> bool:
    """Whether check_store sees that bit of a file of `store` flipped, a copy of `sound`; where it
    does not, the bit must be harmless. It is put back."""
    content = flip_bit(file, byte, bit)
    problems = check_store(store)
    where = (file.relative_to(store), byte, bit)
    # The trainer reads tokens, keys, manifest and vocabulary: those are right, or refused.
    assert refusal(store) or read_all(store) == read_all(sound), where
    if not problems:
        assert read_all(store) == read_all(sound), where
        assert read_obs(store) == read_obs(sound), where
    file.write_bytes(content)
    return bool(problems)


def test_a_flipped_bit_in_any_kind_of_file_is_seen(copy, path) -> None:
    seen: list[int] = []
    assert check_store(copy, lambda what, done, total: seen.append(done)) == []
    assert seen == [NUM_CELLS]
    for kind in KINDS.split():
        file = next(file for file in sorted(copy.glob(kind)) if file.is_file())
        assert is_seen_flipped(copy, path, file, file.stat().st_size // 2, 3), kind
    assert check_store(copy) == []


def test_flip_in_the_tokens_names_the_rows(copy) -> None:
    data = max((copy / "tokens/__fragments").rglob("*.tdb"), key=lambda file: file.stat().st_size)
    flip_bit(data, data.stat().st_size - 2000)
    with TokenStore.open(copy) as store:
        store.read(0, 1024)
        with pytest.raises(DataError, match="rows 1,400 to 1,499 of tokens cannot be read"):
            store.read(1400, 1500)
    assert any("cannot be read" in problem for problem in check_store(copy))


def test_every_file_is_missed_and_seen_if_of_another_length(copy) -> None:
    """Empty ones, by which TileDB commits, cannot be cut, but lengthened."""
    for name, file in list_files(copy).items():
        if name.startswith(("tokens", "obs")):
            away = file.rename(copy.parent / "away")
            assert f"{name} is missing" in refusal(copy)
            assert f"{name} is missing" in check_store(copy)[0]
            away.rename(file)
        sound = file.read_bytes()
        other = sound[:-1] if sound else b"x"
        file.write_bytes(other)
        assert f"{name} has {len(other):,} bytes of {len(sound):,}" in refusal(copy)
        assert check_store(copy)
        file.write_bytes(sound)
    assert check_store(copy) == []


def test_missing_part_is_seen_at_opening(copy) -> None:
    (copy.parent / "file").write_text("x")
    for name in ("missing", "file"):
        assert "not a finished store" in opening(copy.parent / name)
    for part in ("tokens", "obs", "manifest.json", "vocabulary.json"):
        away = (copy / part).rename(copy.parent / "away")
        assert opening(copy), part
        assert check_store(copy), part
        away.rename(copy / part)


@pytest.mark.parametrize("frame", ["tokens", "obs"])
def test_missing_commits_and_added_fragments_are_seen(copy, frame: str) -> None:
    (commit,) = (copy / frame / "__commits").iterdir()
    fragment = next((copy / frame / "__fragments").iterdir())
    added = fragment.with_name(fragment.name.replace("_22", "0_22"))
    shutil.copytree(fragment, added)
    assert f"{frame}/__fragments/{added.name}/" in refusal(copy)
    assert "is not of the store" in check_store(copy)[0]
    shutil.copy(commit, commit.with_name(f"{added.name}.wrt"))
    assert "is not of the store" in refusal(copy)
    shutil.rmtree(added)
    commit.with_name(f"{added.name}.wrt").unlink()
    commit.unlink()
    assert f"{frame}/__commits/{commit.name} is missing" in opening(copy)
    unlist_files(copy)
    assert f"{frame} holds 0 rows, the manifest says 1,500" in opening(copy)


UNFIT = {"n_tokens": 1, "split": "test", "cell_id": "z"}


@pytest.mark.parametrize(
    ("frame", "values", "problems"),
    [
        ("tokens", {}, []),
        ("obs", {"number": 123_456}, ["content hash"]),
        ("obs", UNFIT, ["another n_tokens", "another split", "cell_key that is not", "at row 7"]),
    ],
)
def test_rows_changed_behind_the_manifest_are_found(copy, frame, values, problems) -> None:
    write_row(copy, frame, **values)
    assert "is not of the store" in opening(copy)
    assert check_store(copy)
    if problems:
        unlist_files(copy)
        text = "\n".join(check_store(copy))
        assert [part for part in problems if part not in text] == []


def test_exchanged_vocabulary_is_seen(copy) -> None:
    vocabulary_of(NUM_GENES, np.full(NUM_GENES, 3.0)).save(copy / "vocabulary.json")
    size = (copy / "vocabulary.json").stat().st_size
    assert f"vocabulary.json has {size:,} bytes of" in opening(copy)
    unlist_files(copy)
    assert "the manifest is of vocabulary" in opening(copy)


WRONG_ROWS = (
    {"train": [0, 1500]},  # two splits missing
    {"train": [0, 10], "validation": [11, 20], "test": [20, 1500]},  # a gap
    {"train": [0, 10], "validation": [10, 5], "test": [5, 1500]},  # backwards
    {"train": [0, 10], "validation": [10, 20], "test": [20, 1000]},  # too few
)
CHANGES = (
    ({"cells": 1499}, "checksum"),
    ({"tokens": 0}, "checksum"),
    ({"schema_version": 2}, "store schema 2"),
    ({"rows": None}, "checksum"),
)


def test_a_manifest_of_no_use_is_refused(copy) -> None:
    manifest, loaded = copy / "manifest.json", Manifest.load(copy)
    sound = manifest.read_bytes()
    for damaged in (b"", sound[: len(sound) // 2], b"[]", b"\xff" + sound):
        manifest.write_bytes(damaged)
        assert "manifest.json" in opening(copy)
        assert check_store(copy)
    for changes, message in CHANGES:
        changed = json.loads(sound) | changes
        kept = {name: value for name, value in changed.items() if value is not None}
        manifest.write_text(json.dumps(kept))
        assert message in opening(copy)
    for rows in WRONG_ROWS:
        replace(loaded, rows=rows).save(copy)
        assert "damaged manifest" in opening(copy), rows


def test_a_file_that_cannot_be_read_is_named(copy, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "tokens/x")

    monkeypatch.setattr("geneformer_mcore.store.reader.find_changes", fail)
    assert "tokens/x cannot be read: Permission denied" in refusal(copy)


UNSOUND = (
    ([5, 6], "do not start with [CLS]"),
    ([0, 405], "hold token ids beyond the vocabulary"),
    ([0, 6, 1], "hold special tokens among the genes"),
    ([0, 6, 7, 6], "hold a gene twice"),
    ([0], "hold no gene"),
    ([0, *range(5, 5 + SEQ_LENGTH)], f"are longer than seq_length {SEQ_LENGTH}"),
)


def test_unsound_cells_are_found(tmp_path) -> None:
    cells = [[0, 9, 8]] * 20 + [cell for cell, _ in UNSOUND] + [[0, 5]] * 5
    write_small_store(tmp_path / "store", cells, NUM_GENES, SEQ_LENGTH)
    problems = "\n".join(check_store(tmp_path / "store"))
    assert [problem for _, problem in UNSOUND if f"1 cells {problem}" not in problems] == []
