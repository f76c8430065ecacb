"""No number is printed unchecked: a test asserts the value of every key of metrics.jsonl."""

from __future__ import annotations

import ast

from tests.rules.sources import LIBRARY, ROOT, tree_of


def test_every_key_of_a_record_is_asserted() -> None:
    keys = _keys_of_record()
    assert len(keys) >= 12
    asserted = _subscripts_in_assertions()
    assert not keys - asserted, f"no assertion on {keys - asserted}"


def _keys_of_record() -> set[str]:
    """The keys of the dict that Meter.record returns."""
    (record,) = (
        node
        for node in ast.walk(tree_of(LIBRARY / "metrics" / "meter.py"))
        if isinstance(node, ast.FunctionDef) and node.name == "record"
    )
    (returned,) = (node.value for node in ast.walk(record) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    return {key.value for key in returned.keys if isinstance(key, ast.Constant)}


def _subscripts_in_assertions() -> set[str]:
    """Every "name" that stands as ["name"] in an assertion of the meter's tests."""
    tests = tree_of(ROOT / "tests" / "unit" / "test_metrics_meter.py")
    return {
        node.slice.value
        for statement in ast.walk(tests)
        if isinstance(statement, ast.Assert)
        for node in ast.walk(statement)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    }
