"""No number is printed unchecked: a test asserts the value of every key of metrics.jsonl."""

from __future__ import annotations

import ast
import re

from tests.rules.sources import LIBRARY, ROOT, tree_of


def test_every_key_of_a_record_is_asserted() -> None:
    functions = [
        node
        for node in ast.walk(tree_of(LIBRARY / "metrics" / "meter.py"))
        if isinstance(node, ast.FunctionDef) and node.name == "record"
    ]
    (returned,) = (node.value for node in ast.walk(functions[0]) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    keys = {key.value for key in returned.keys if isinstance(key, ast.Constant)}
    assert len(keys) >= 12
    tests = tree_of(ROOT / "tests" / "unit" / "test_metrics_meter.py")
    assertions = [ast.unparse(node) for node in ast.walk(tests) if isinstance(node, ast.Assert)]
    unchecked = keys - set(re.findall(r"\['(\w+)'\]", " ".join(assertions)))
    assert not unchecked
