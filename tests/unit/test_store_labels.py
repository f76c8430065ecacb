"""Label columns of different files become one set of columns."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from geneformer_mcore.store.labels import (
    INTEGER,
    NUMBER,
    TEXT,
    TRUTH,
    label_columns,
    label_kinds,
    unify_kinds,
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
    columns = label_columns(obs, kinds)
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
    columns = label_columns(pd.DataFrame({"a": [1], "b": [2], "d": [True]}), kinds)
    assert columns["a"].to_pylist() == [1.0]
    assert columns["b"].to_pylist() == ["2"]
    assert columns["c"] == pa.nulls(1, TEXT)
    assert columns["d"].to_pylist() == ["true"]
