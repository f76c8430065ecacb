"""What the README tells people to type is there."""

from __future__ import annotations

import re

from tests.rules.sources import ROOT


def test_commands_exist() -> None:
    commands = _commands((ROOT / "README.md").read_text())
    assert commands, "the README shows no command"
    missing = [line for line in commands for name in _files(line) if not (ROOT / name).is_file()]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing += [
        line
        for line in commands
        for target in re.findall(r"^make (?:[A-Z_]+=\S+ )*(\w+)", line)
        if target not in targets
    ]
    assert not missing


def test_finds_what_is_missing() -> None:
    text = "```bash\n# a comment\npython data_prep/no_such.py --out \\\n    x\n```\n`inline`\n"
    (line,) = _commands(text)
    assert line == "python data_prep/no_such.py --out x"
    assert _files(line) == ["data_prep/no_such.py"]


def _commands(text: str) -> list[str]:
    """Lines of the shell blocks, continued lines joined, prompts and comments off."""
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    stripped = [line.removeprefix("$ ").strip() for line in lines]
    return [line for line in stripped if line and not line.startswith("#")]


def _files(line: str) -> list[str]:
    """The project's own files that a command line names."""
    folders = "data_prep|launch|benchmarks|slurm|configs|tests"
    return re.findall(rf"(?:^|[ =])((?:{folders})/[\w./-]+\.(?:py|sh|yaml))", line)
