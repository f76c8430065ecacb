"""Geneformer's dictionaries come in; code in a pickle does not."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.tokenizer.dictionary import import_dictionary, read_dictionary
from tests.support.small_cells import gene_id

MEDIANS = {gene_id(1): 2.5, gene_id(3): 0.5, gene_id(2): 1.0}
TOKENS = {"<pad>": 0, "<mask>": 1, **{gene_id(i): i + 1 for i in (1, 2, 3)}}


class Hostile:
    """Calls a function when it is unpickled."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.arguments


def dump(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def big_endian(value: float) -> object:
    return np.array([value], dtype=">f8")[0]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.int64, big_endian])
def test_pickle_of_numbers(tmp_path, protocol, kind) -> None:
    content = OrderedDict((gene, kind(median * 2)) for gene, median in MEDIANS.items())
    read = read_dictionary(dump(tmp_path / "m.pkl", content, protocol))
    assert read == {gene: median * 2 for gene, median in MEDIANS.items()}
    assert {type(value) for value in read.values()} <= {int, float}


def test_json_and_pickle_give_the_same_vocabulary(tmp_path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(MEDIANS))
    from_json = import_dictionary(tmp_path / "m.json")
    pickles = dump(tmp_path / "m.pkl", MEDIANS), dump(tmp_path / "t.pkl", TOKENS)
    assert from_json == import_dictionary(*pickles)
    assert from_json.medians == (2.5, 1.0, 0.5)


@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch mark"),
        (eval, "open('mark', 'w')"),
        (open, "mark", "w"),
        (np.fromfile, "mark"),
        (getattr, "text", "upper"),
    ],
    ids=lambda call: call[0].__name__,
)
def test_hostile_pickle_is_refused_and_does_nothing(tmp_path, monkeypatch, call) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"refused as a pickle.*asks for"):
        import_dictionary(dump(tmp_path / "m.pkl", {gene_id(1): Hostile(*call)}))
    assert os.listdir() == ["m.pkl"]


@pytest.mark.parametrize(
    "value", [np.array([1.0]), np.datetime64("2020-01-01"), np.str_("text"), object, 1 + 2j]
)
def test_other_types_are_refused(tmp_path, value) -> None:
    with pytest.raises(DataError, match="refused as a pickle"):
        read_dictionary(dump(tmp_path / "m.pkl", {"a": value}))


DEEP = 100_000 * b'{"a":'


@pytest.mark.parametrize(
    "raw", [b"", b"\x80", b"no pickle", b"{broken", b"\x80\x04K\x01.", DEEP], ids=range(6)
)
def test_damaged_file_is_refused(tmp_path, raw) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(raw)
    message = "not valid JSON" if raw == DEEP else r"m\.pkl"
    with pytest.raises(DataError, match=message):
        read_dictionary(path)


@pytest.mark.parametrize(
    ("medians", "message"),
    [
        ({"a": "high"}, "must be a number"),
        ({"a": True}, "must be a number"),
        ({"a": 10**400}, "1,329 bits"),
        ({"a": -(10**5000)}, "must be below"),
        ({"a": float("nan")}, "above 0"),
        ({"a": 0}, "above 0"),
        ({}, "no gene"),
        ({1: 2.0}, "keys are gene ids"),
        (["a"], "keys are gene ids"),
    ],
)
def test_wrong_medians(tmp_path, medians, message) -> None:
    with pytest.raises(DataError, match=message):
        import_dictionary(dump(tmp_path / "m.pkl", medians))


def test_tokens_choose_the_genes_and_must_follow_their_order(tmp_path) -> None:
    medians, tokens = dump(tmp_path / "m.pkl", MEDIANS), tmp_path / "t.pkl"
    fewer = {gene: token for gene, token in TOKENS.items() if token != 3}
    kept = import_dictionary(medians, dump(tokens, fewer))
    assert kept.feature_ids == (gene_id(1), gene_id(3))
    for changes, message in (
        ({gene_id(1): 3, gene_id(2): 2}, "must follow the sorted gene ids"),
        ({gene_id(9): 9}, "1 of 4 genes have no median"),
        ({gene_id(1): 10**5000}, r"from 0 to 2\^63"),
    ):
        with pytest.raises(DataError, match=message):
            import_dictionary(medians, dump(tokens, TOKENS | changes))


def test_real_medians(shared_data) -> None:
    vocabulary = import_dictionary(shared_data / "dicts" / "gc30m_gene_medians.json")
    assert vocabulary.size == 25_429
    assert vocabulary.feature_ids[0] == "ENSG00000000003"
    assert vocabulary.medians_of_token[5] == 2.001186019549122
