"""The project's Python files, parsed once for all rules."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "geneformer_mcore"
LIBRARY_FILES = sorted(LIBRARY.rglob("*.py"))
COMMAND_FILES = sorted(
    path
    for folder in ("data_prep", "launch", "benchmarks", "image")
    for path in (ROOT / folder).rglob("*.py")
)


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(), filename=str(path))
