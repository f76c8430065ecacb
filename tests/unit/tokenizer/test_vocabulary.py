"""Vocabulary: what it refuses, and that its file is whole or refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from tests.support.small_cells import vocabulary_of

PLAIN = Vocabulary(("a", "b"), ("A", "B"), (1.5, 2.5))


def test_genes_are_sorted_and_numbered_after_the_specials() -> None:
    vocabulary = Vocabulary.from_medians({"b": 2.0, "a": 1.0}, names={"a": "Gene A"})
    assert vocabulary.feature_ids == ("a", "b")
    assert vocabulary.names == ("Gene A", "b")
    assert vocabulary.token_ids == {"a": 5, "b": 6}
    assert vocabulary.size == 7
    assert vocabulary.medians_of_token.tolist() == [1, 1, 1, 1, 1, 1.0, 2.0]


def test_file_round_trip(tmp_path) -> None:
    vocabulary = vocabulary_of(100)
    vocabulary.save(tmp_path / "v.json")
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert (loaded, loaded.medians) == (vocabulary, vocabulary.medians)
    assert os.listdir(tmp_path) == ["v.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        vocabulary.save(tmp_path / "file" / "v.json")
    with pytest.raises(DataError, match="no such file"):
        Vocabulary.load(tmp_path / "missing.json")


def test_checksum_depends_on_every_part() -> None:
    changes = {"feature_ids": ("a", "c"), "names": ("A", "C"), "medians": (1.5, 2.5000000000000004)}
    others = [replace(PLAIN, **{part: values}) for part, values in changes.items()]
    assert len({vocabulary.checksum for vocabulary in (PLAIN, *others)}) == 4


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("medians", [1.5, 9.0], "checksum"),
        ("names", ["x", "y"], "checksum"),
        ("checksum", "0" * 64, "checksum"),
        ("medians", [1.5], "2 ids, 2 names, 1 medians"),
        ("feature_ids", ["b", "a"], "sorted"),
        ("specials", ["[PAD]", "[CLS]"], "special tokens"),
        ("schema_version", 99, "schema 99"),
        ("medians", "many", "must be a list"),
    ],
)
def test_changed_file_is_refused(tmp_path, place, value, message) -> None:
    path = tmp_path / "v.json"
    PLAIN.save(path)
    content = json.loads(path.read_text())
    assert content[place] != value
    path.write_text(json.dumps(content | {place: value}))
    with pytest.raises(DataError, match=message):
        Vocabulary.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1.5}', b"\xff", b"\x80\x04\x95"])
def test_file_that_is_no_vocabulary_is_refused(tmp_path, content) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(
        DataError,
        match=r"v\.json.*(not valid JSON|the content (must be|has)).* Remedy: write it again",
    ):
        Vocabulary.load(path)


def test_what_no_vocabulary_holds() -> None:
    for median in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"above 0.*of gene b"):
            Vocabulary.from_medians({"a": 1.0, "b": median})
    for ids in ((), ("a", "a"), ("b", "a"), ("", "a")):
        with pytest.raises(DataError):
            Vocabulary(ids, ids, (1.0,) * len(ids))
    assert vocabulary_of(65_530).size == 65_535
    with pytest.raises(DataError, match="65,536 tokens"):
        vocabulary_of(65_531)
