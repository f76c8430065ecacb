"""--help of every command: an example, and nothing imported that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("launch", "data_prep")
    for path in (ROOT / folder).glob("*.py")
)
HEAVY = ["torch", "megatron", "tiledbsoma", "anndata", "pandas", "scipy", "numba", "matplotlib"]
SUBCOMMANDS = {"launch/convert.py": ("from-hf", "to-hf")}

SCRIPT = """
import contextlib, io, json, pathlib, runpy, sys

found = {}
for line in json.loads(sys.argv[1]):
    sys.argv, printed = [*line, "--help"], io.StringIO()
    sys.path.insert(0, str(pathlib.Path(line[0]).parent))
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(line[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    del sys.path[0]
    found[" ".join(line)] = code, printed.getvalue(), sorted(sys.modules)
print(json.dumps(found))
"""
"""All commands in one interpreter that has imported nothing: a heavy import of one would show."""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str, list[str]]]:
    """{command: (exit status, what it prints, modules imported by then)}."""
    lines = [[command] for command in COMMANDS]
    lines += [[command, word] for command, words in SUBCOMMANDS.items() for word in words]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(lines)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, helps: dict[str, tuple[int, str, list[str]]]) -> None:
    code, printed, _ = helps[command]
    assert code in (0, None)
    usage, _, rest = printed.partition("\n\n")
    assert usage.startswith("usage: ")
    assert f"{command} " in rest
    for word in SUBCOMMANDS.get(command, ()):
        assert f"{command} {word} " in helps[f"{command} {word}"][1]


def test_no_help_imports_what_takes_seconds(helps: dict[str, tuple[int, str, list[str]]]) -> None:
    for command, (_, _, modules) in helps.items():
        assert not set(HEAVY) & set(modules), command
