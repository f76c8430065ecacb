"""Vocabulary: what it refuses, and that its file is whole or refused."""

from __future__ import annotations

import json
import os

import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer.vocabulary import MAX_TOKENS, Vocabulary
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
    others = [
        Vocabulary(("a", "c"), ("A", "B"), (1.5, 2.5)),
        Vocabulary(("a", "b"), ("A", "C"), (1.5, 2.5)),
        Vocabulary(("a", "b"), ("A", "B"), (1.5, 2.5000000000000004)),
    ]
    assert len({PLAIN.checksum, *(other.checksum for other in others)}) == 4


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
def test_changed_file_is_refused(tmp_path, place: str, value: object, message: str) -> None:
    path = tmp_path / "v.json"
    PLAIN.save(path)
    content = json.loads(path.read_text())
    assert content[place] != value
    path.write_text(json.dumps(content | {place: value}))
    with pytest.raises(DataError, match=message):
        Vocabulary.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": 1.5}', b"\xff"])
def test_file_that_is_no_vocabulary_is_refused(tmp_path, content: bytes) -> None:
    path = tmp_path / "v.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"v\.json"):
        Vocabulary.load(path)


@pytest.mark.parametrize("median", [0.0, -1.0, float("nan"), float("inf")])
def test_median_that_cannot_divide_is_refused(median: float) -> None:
    with pytest.raises(DataError, match=r"above 0.*of gene b"):
        Vocabulary.from_medians({"a": 1.0, "b": median})


def test_as_many_tokens_as_uint16_holds() -> None:
    most = MAX_TOKENS - 5
    assert vocabulary_of(most).size == 65_535
    with pytest.raises(DataError, match="65,536 tokens"):
        vocabulary_of(most + 1)


@pytest.mark.parametrize("ids", [(), ("a", "a"), ("b", "a"), ("", "a")])
def test_ids_must_be_unique_sorted_and_there(ids: tuple[str, ...]) -> None:
    with pytest.raises(DataError):
        Vocabulary(ids, ids, (1.0,) * len(ids))
