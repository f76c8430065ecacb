"""Some benchmarks run where little is installed: torch, Megatron-Core, numpy and OmegaConf."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.rules.sources import LIBRARY, ROOT, tree_of

PRESENT = {"torch", "megatron", "numpy", "omegaconf", "yaml"}  # yaml comes with omegaconf
OURS = {"geneformer_mcore", "benchmarks", "tests"}
PARTS = ("tflops.py", "train_step.py", "gpu_session.py", "harness/peers/steps*.py")
PARTS += tuple(f"harness/{name}/*.py" for name in ("tflops", "train_step", "session"))
"""The commands, and what they import inside functions."""


def test_they_need_four_packages_only() -> None:
    assert not list(imported_at_start(LIBRARY / "__init__.py"))
    found = [sorted((ROOT / "benchmarks").glob(pattern)) for pattern in PARTS]
    assert all(found)
    absent = needed([path for paths in found for path in paths]) - PRESENT
    assert not absent


def needed(waiting: list[Path]) -> set[str]:
    """Third-party packages imported with these files, and with those of ours they lead to."""
    found, seen = set(), set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for name in imported_at_start(path):
            parts = name.split(".")
            found.add(parts[0])
            if parts[0] in OURS:
                folders = [ROOT.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
                waiting += [folder / "__init__.py" for folder in folders]
                waiting.append(folders[-1].with_suffix(".py"))
    return found - OURS - set(sys.stdlib_module_names)


def imported_at_start(path: Path) -> Iterator[str]:
    """What is imported with a file itself: not in its functions, and not for types alone."""
    later = (ast.FunctionDef, ast.ClassDef)
    for statement in tree_of(path).body:
        for_types = isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)
        for node in [] if for_types or isinstance(statement, later) else ast.walk(statement):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
                yield str(node.module)
