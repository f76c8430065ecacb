"""Sizes, names, calls and texts that no linter knows of."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator

import pytest

from tests.rules.sources import COMMAND_FILES, LIBRARY_FILES, ROOT, tree_of

MOST_FILE_LINES = 350
MOST_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils.py", "util.py", "helpers.py", "helper.py", "misc.py", "common.py"}


def test_sizes_and_names() -> None:
    for path in LIBRARY_FILES:
        assert path.name not in VAGUE_NAMES, path
        assert len(path.read_text().splitlines()) <= MOST_FILE_LINES, path
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= MOST_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


def test_nothing_loaded_is_run() -> None:
    for path in [*LIBRARY_FILES, *COMMAND_FILES]:
        assert not list(unsafe_loads(tree_of(path))), path


def unsafe_loads(tree: ast.AST) -> Iterator[str]:
    """Calls of torch and numpy that run what a file holds; the others are ruff's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            options = {each.arg: ast.unparse(each.value) for each in node.keywords}
            weights_only = options.get("weights_only") == "True"
            torch_load = ast.unparse(node.func) == "torch.load" and not weights_only
            if torch_load or options.get("allow_pickle", "False") != "False":
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_unsafe_loads_are_found() -> None:
    for code in ("torch.load(f)", "torch.load(f, weights_only=0)", "np.load(f, allow_pickle=True)"):
        assert list(unsafe_loads(ast.parse(code)))
    for code in ("torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)"):
        assert not list(unsafe_loads(ast.parse(code)))


# In brackets, so that this file does not hold what it looks for.
@pytest.mark.parametrize(
    "pattern",
    [
        "[/]work/\\w|[/]tmp/\\w|[/]root\\b|[/]home/\\w",
        "pypi[.]org|python[h]osted|index-url[= ]+https?[:]",
    ],
    ids=["private path", "registry host"],
)
def test_no_text_of_one_machine(pattern: str) -> None:
    search = ["git", "grep", "--untracked", "-nIE", pattern]
    found = subprocess.run(search, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stdout + found.stderr
