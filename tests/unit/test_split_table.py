"""split.json: how it deals cells, and that a wrong one is not believed."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.split.table import SplitTable

TABLE = SplitTable(
    "card",
    7,
    0.01,
    {"a": "train", "b": "held-out", "c": "test"},
    {"a": 900, "b": 50, "c": 50},
    {"assay": 3},
)


def cells_of(dataset: str, number: int) -> tuple[np.ndarray, list[str]]:
    names = [f"c{place}" for place in range(number)]
    return cell_keys(dataset, names), [dataset] * number


def test_roles_become_splits() -> None:
    for dataset, expected in (("a", {0}), ("c", {2}), ("b", {1, 2})):
        codes_N = TABLE.assign(*cells_of(dataset, 4_000))
        assert codes_N.dtype == np.int8
        assert set(codes_N.tolist()) == expected
    in_validation = (TABLE.assign(*cells_of("b", 4_000)) == 1).mean()
    assert 0.47 < in_validation < 0.53
    most = replace(TABLE, validation_share=0.9).assign(*cells_of("b", 4_000))
    assert 0.88 < (most == 1).mean() < 0.92


def test_a_cell_s_split_depends_on_the_cell_alone(rng: np.random.Generator) -> None:
    parts = [cells_of(dataset, 50) for dataset in "abc"]
    keys_N = np.concatenate([keys for keys, _ in parts])
    datasets = [name for _, names in parts for name in names]
    codes_N = TABLE.assign(keys_N, datasets)
    order = rng.permutation(150)
    shuffled_N = TABLE.assign(keys_N[order], [datasets[place] for place in order])
    np.testing.assert_array_equal(shuffled_N, codes_N[order])
    again: SplitTable = pickle.loads(pickle.dumps(TABLE))
    np.testing.assert_array_equal(again.assign(keys_N, datasets), codes_N)
    # Golden: a store built again must have the same split.
    assert "".join(map(str, codes_N[50:80])) == GOLDEN_CODES


GOLDEN_CODES = "121211112111221211212222111111"


def test_unlisted_datasets() -> None:
    with pytest.raises(DataError, match=r"names 3 data sets, and 1 of the input .*: x\."):
        TABLE.assign(*cells_of("x", 2))
    lenient = replace(TABLE, unlisted="train")
    assert lenient.assign(*cells_of("x", 2)).tolist() == [0, 0]
    lenient.check(["x"])
    assert TABLE.assign(np.empty(0, np.uint64), []).tolist() == []


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    TABLE.save(path)
    assert SplitTable.load(path) == TABLE
    assert SplitTable.load(path).checksum == TABLE.checksum
    counted = json.loads(path.read_text())["counted"]
    assert counted["cells"] == {"train": 900, "held-out": 50, "test": 50}
    told = TABLE.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["checksum"] == TABLE.checksum
    other = replace(TABLE, roles={**TABLE.roles, "a": "test"})
    assert other.describe() != told


def test_damage_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    with pytest.raises(DataError, match=r"no such file. Remedy: data_prep/make_split.py"):
        SplitTable.load(path)
    TABLE.save(path)
    text = path.read_text()
    for old, new in (('"train"', '"test"'), ("900", "901"), ("}", ""), ("0.01", "0.02")):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=r"not a whole split\.json, or changed"):
            SplitTable.load(path)
    path.write_text('{"format": "x"}')
    with pytest.raises(DataError, match=r"not a whole split\.json"):
        SplitTable.load(path)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geneformer_mcore.store.split.table.VERSION", 2)
    TABLE.save(tmp_path / "split.json")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"version 2 of split.json, this program reads 1"):
        SplitTable.load(tmp_path / "split.json")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("roles", {"a": "trian", "b": "test", "c": "test"}, "role is one of train, held-out, test"),
        ("roles", {"a": "train"}, "of the same data sets"),
        ("validation_share", 1.5, "in 0 to 1, not 1.5"),
        ("validation_share", float("nan"), "in 0 to 1, not nan"),
        ("unlisted", "drop", "refuse or train, not 'drop'"),
    ],
)
def test_impossible_tables(field: str, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(TABLE, **{field: value})
