"""Label columns of different files become one set of columns."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.ingest.labels import (
    INTEGER,
    NUMBER,
    TEXT,
    TRUTH,
    label_columns,
    label_kinds,
    unify_kinds,
    unify_labels,
)


def test_kinds() -> None:
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(["a", None, "b"]),
            "year": pd.Categorical([2001, 2002, 2001]),
            "count": np.array([1, 2, 3], dtype=np.uint8),
            "large": np.array([1, 2, 2**63], dtype=np.uint64),
            "score": np.array([0.5, np.nan, 1], dtype=np.float32),
            "doublet": [True, False, True],
            "maybe": pd.array([True, None, False], dtype="boolean"),
            "words": ["x", None, "y"],
            "nothing": [None, None, None],
            "day": pd.to_datetime(["2020-01-01"] * 3),
            "lists": [[1], [2], [3]],
            "mixed": [1, "a", (2,)],
            "n_counts": [1, 2, 3],
            "tokens": [1, 2, 3],
            "split": ["x"] * 3,
            "soma_x": [1, 2, 3],
            "__x": [1, 2, 3],
            "": [1, 2, 3],
            5: [1, 2, 3],
        }
    )
    kinds = label_kinds(obs)
    assert kinds == {
        "type": TEXT,
        "year": INTEGER,
        "count": INTEGER,
        "large": NUMBER,
        "score": NUMBER,
        "doublet": TRUTH,
        "maybe": TRUTH,
        "words": TEXT,
        "nothing": TEXT,
        "day": TEXT,
    }
    columns = label_columns(obs, kinds, "rows")
    assert {name: column.type for name, column in columns.items()} == kinds
    assert columns["type"].to_pylist() == ["a", None, "b"]
    assert columns["year"].to_pylist() == [2001, 2002, 2001]
    assert columns["score"].to_pylist() == [0.5, None, 1.0]
    assert columns["maybe"].to_pylist() == [True, None, False]


def test_files_that_disagree() -> None:
    kinds = unify_kinds(
        [
            {"a": INTEGER, "b": INTEGER, "c": TEXT},
            {"a": NUMBER, "b": TEXT, "d": TRUTH},
            {"d": INTEGER},
        ]
    )
    assert kinds == {"a": NUMBER, "b": TEXT, "c": TEXT, "d": TEXT}
    obs = pd.DataFrame({"a": [1], "b": [2], "d": [True]})
    cells = pa.table({"cell_id": ["x"], **label_columns(obs, label_kinds(obs), "rows")})
    unified = unify_labels(cells, kinds)
    assert unified.schema == pa.schema({"cell_id": pa.string(), **kinds})
    assert unified.to_pylist() == [{"cell_id": "x", "a": 1.0, "b": "2", "c": None, "d": "true"}]


def test_values_of_another_kind_are_refused() -> None:
    obs = pd.DataFrame({"age": ["one", "two"]})
    with pytest.raises(DataError, match=r"rows 0 to 1: obs column 'age' holds other .*int64"):
        label_columns(obs, {"age": INTEGER}, "rows 0 to 1")
    with pytest.raises(DataError, match="'year'"):
        label_columns(obs, {"year": TEXT}, "rows 0 to 1")
