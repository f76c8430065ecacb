"""The library is built in floors: a package imports from lower floors and from itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.sources import imports_of, library_files, name_of, package_of, tree_of

FLOORS = (
    {"errors"},
    {"contracts", "backends", "commands"},
    {"config"},
    {"cells"},
    {"store"},
    {"feed", "parallel"},
    {"model"},
    {"optim"},
    {"checkpoint", "metrics"},
    {"train", "downstream"},
    {"preflight"},
)
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def imported_at_start(path: Path) -> Iterator[str]:
    """What is imported with the module itself, not inside its functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree_of(path).body:
        if not isinstance(node, functions):
            yield from imports_of(node)


@pytest.mark.parametrize("path", library_files(), ids=name_of)
def test_imports_point_down(path: Path) -> None:
    package = package_of(path)
    if package == "":
        assert not list(imported_at_start(path)), "the library's __init__ imports nothing at once"
        return
    imported = {
        name.split(".")[1]
        for name in imports_of(tree_of(path))
        if name.startswith("geneformer_mcore.")
    } - {package, "__version__"}
    upward = {other for other in imported if FLOOR_OF[other] >= FLOOR_OF[package]}
    assert not upward, f"{name_of(path)} is on floor {FLOOR_OF[package]} and imports {upward}"


def test_every_package_has_a_floor() -> None:
    assert {package_of(path) for path in library_files()} - {""} <= set(FLOOR_OF)
