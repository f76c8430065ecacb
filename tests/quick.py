"""`make quick`: the tests of what differs from the branch main, committed or not.

    python tests/quick.py [--list]

Of tests/unit those files count that import a changed module, or are in the folder of its package
(geneformer_mcore/store/keys.py: tests/unit/store). Where there is none of either, those that import
anything of the package. Changed test files count themselves, and with any change tests/rules.
Tests marked as slow, and those of clusters and soaks, are left to `make test` and `make soak`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"geneformer_mcore.errors", "geneformer_mcore.types", "geneformer_mcore"}
"""Nearly all tests import them: those are `make test`."""
BY_FOLDER = {
    "slurm/": {"tests/unit/training/test_job_script.py"},
    "configs/": {"tests/unit/top/test_config.py"},
}
"""Tests of files that no test imports."""
PYTEST = ("-q", "-x", "-n", "2", "--dist", "loadscope", "-m", "not slow and not soak")


def main() -> int:
    """Runs them: the exit code is pytest's."""
    changed = changed_files()
    tests = sorted(tests_of(changed, imports_of_tests()))
    if not changed:
        print("nothing differs from main: no test to run")
        return 0
    for name in sorted(SHARED & set(map(module_of, changed))):
        print(f"{name} is used everywhere: make test")
    print("tests:", *tests)
    command = [sys.executable, "-m", "pytest", *PYTEST, *tests]
    return 0 if "--list" in sys.argv else subprocess.run(command, cwd=ROOT, check=False).returncode


def changed_files() -> list[str]:
    """What was committed since the branch left main, and what is not committed yet."""
    bases = [git("merge-base", "HEAD", main, check=False) for main in ("main", "origin/main")]
    base = next((found[0] for found in bases if found), "HEAD")
    differing = git("diff", "--name-only", "--no-renames", base)
    return differing + git("ls-files", "--others", "--exclude-standard")


def git(*arguments: str, check: bool = True) -> list[str]:
    """The lines that it prints."""
    command = ["git", *arguments]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=check)
    return ended.stdout.splitlines()


def imports_of_tests() -> dict[str, set[str]]:
    """The modules that each file of tests/unit imports."""
    paths = (ROOT / "tests" / "unit").glob("*/test_*.py")
    return {path.relative_to(ROOT).as_posix(): set(_imports(path)) for path in paths}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tests_of(changed: list[str], imports: dict[str, set[str]]) -> set[str]:
    """The test files, and folders of them, for the files that have changed."""
    found = {"tests/rules"} if changed else set()
    for name in changed:
        found |= next((BY_FOLDER[each] for each in BY_FOLDER if name.startswith(each)), set())
        if name.startswith("tests/") and Path(name).name.startswith("test_"):
            if name.split("/")[1] not in ("soak", "rules") and (ROOT / name).exists():
                found.add(name)
        elif name.endswith(".py") and module_of(name) not in SHARED:
            package = ".".join(Path(name).parent.parts)
            found |= _tests_of_module(module_of(name), package, imports)
    return found


def _tests_of_module(module: str, package: str, imports: dict[str, set[str]]) -> set[str]:
    named = f"tests/unit/{package.split('.')[1] if '.' in package else package}/"
    direct = {test for test, names in imports.items() if module in names or test.startswith(named)}
    if direct or package.split(".")[0] == "tests":
        return direct
    inside = f"{package}."
    return {test for test, names in imports.items() if any(n.startswith(inside) for n in names)}


def module_of(name: str) -> str:
    """geneformer_mcore.tokenizer.rank_encoder of geneformer_mcore/tokenizer/rank_encoder.py"""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


if __name__ == "__main__":
    sys.exit(main())
