"""Sizes, names and calls that linters do not know of."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rules.sources import ROOT, command_files, library_files, name_of, tree_of

MOST_FILE_LINES = 350
MOST_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils.py", "util.py", "helpers.py", "helper.py", "misc.py", "common.py"}

TEXT_FOLDERS = (
    "geneformer_mcore",
    "data_prep",
    "launch",
    "slurm",
    "configs",
    "benchmarks",
    "image",
    "tests",
    "docs",
    ".ci",
)
TEXT_SUFFIXES = {"", ".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".lock", ".json", ".svg"}

# Put together from pieces, so that this file does not hold what it looks for.
PRIVATE = re.compile(
    "|".join(("/" + r"work/\w", "/" + r"tmp/\w", "/" + r"root\b", "/" + r"home/\w"))
)
REGISTRY = re.compile("py" + r"pi\.org|python" + r"hosted|index-url[= ]+https" + "?:")


@pytest.mark.parametrize("path", library_files(), ids=name_of)
def test_sizes(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_FILE_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_no_vague_file_names() -> None:
    assert not [name_of(path) for path in library_files() if path.name in VAGUE_NAMES]


@pytest.mark.parametrize("path", [*library_files(), *command_files()], ids=name_of)
def test_no_dangerous_calls(path: Path) -> None:
    assert not list(dangerous_calls(tree_of(path)))


@pytest.mark.parametrize(
    "code",
    [
        "pickle.load(f)",
        "pickle.loads(b)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "numpy.load(f, allow_pickle=True)",
    ],
)
def test_dangerous_calls_are_found(code: str) -> None:
    assert list(dangerous_calls(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["model.eval()", "yaml.safe_load(f)", "json.load(f)", "torch.load(f, weights_only=True)"],
)
def test_harmless_calls_are_left_alone(code: str) -> None:
    assert not list(dangerous_calls(ast.parse(code)))


def dangerous_calls(tree: ast.AST) -> Iterator[str]:
    """Calls in `tree` that run code found in data, or a shell."""
    refused = {
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "yaml.unsafe_load",
        "eval",
        "exec",
        "os.system",
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            called in refused
            or keywords.get("shell") == "True"
            or keywords.get("allow_pickle") == "True"
            or (called == "torch.load" and keywords.get("weights_only") != "True")
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("pattern", [PRIVATE, REGISTRY], ids=["private path", "registry host"])
def test_no_text_of_one_machine(pattern: re.Pattern[str]) -> None:
    hits = [
        f"{name_of(path)}:{number}: {line.strip()[:80]}"
        for path in _text_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits


def _text_files() -> list[Path]:
    # In a worktree of git .git is a file: it says where the repository lies.
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    files += [path for folder in TEXT_FOLDERS for path in (ROOT / folder).rglob("*")]
    return [
        path
        for path in files
        if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts
    ]
