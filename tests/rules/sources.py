"""The project's source files, parsed once for all rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "geneformer_mcore"
COMMAND_FOLDERS = ("data_prep", "launch", "benchmarks", "image")


def library_files() -> list[Path]:
    """Every Python file of the library."""
    return sorted(LIBRARY.rglob("*.py"))


def command_files() -> list[Path]:
    """Every Python file of the command folders."""
    return sorted(path for folder in COMMAND_FOLDERS for path in (ROOT / folder).glob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(), filename=str(path))


def name_of(path: Path) -> str:
    """The path as messages show it."""
    return path.relative_to(ROOT).as_posix()


def package_of(path: Path) -> str:
    """The package of the library that a file belongs to; "" for the library's own __init__."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return "" if parts[0] == "__init__" else parts[0]


def imports_of(node: ast.AST) -> Iterator[str]:
    """Full dotted names imported anywhere inside `node`, in functions too: `a.b` and `a.b.c` for
    `from a.b import c`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
            argument = child.args[0]
            assert isinstance(argument, ast.Constant), "import_module takes a literal name"
            yield str(argument.value)


def is_type_checking(node: ast.AST) -> bool:
    """Whether `node` is `if TYPE_CHECKING:`, whose imports never happen."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
