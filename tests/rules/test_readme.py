"""What the README tells people to type is there. tests/readme_commands.sh runs it."""

from __future__ import annotations

import re

from tests.rules.sources import ROOT
from tests.soak.parts import PARTS

FOLDERS = "data_prep|launch|benchmarks|slurm|configs|tests"


def test_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown = "".join(blocks)
    files = set(re.findall(rf"(?:^|[ =])((?:{FOLDERS})/[\w./-]+\.(?:py|sh|yaml))", shown, re.M))
    assert len(files) >= 5
    assert not [name for name in files if not (ROOT / name).is_file()]
    targets = set(re.findall(r"^(?:\$ )?make (?:[A-Z_]+=\S+ )*([\w-]+)", shown, re.M))
    assert targets
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_every_promise_is_held_by_tests_that_exist() -> None:
    """The table of CONTRIBUTING.md: rows R1 to R10, with files of tests and parts of the soak."""
    rows = re.findall(r"^\| (R\d+) \|(.*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert [name for name, _ in rows] == [f"R{number}" for number in range(1, 11)]
    for name, row in rows:
        _, tests, soak = row.split("|")
        folder, files = "", []
        for word in re.findall(r"`([\w./-]+)`", tests):
            # A folder holds for the files that follow it.
            folder = word.removeprefix("tests/").rpartition("/")[0] if "/" in word else folder
            files.append(ROOT / "tests" / folder / word.rpartition("/")[2])
        assert files, name
        assert not [file for file in files if not file.is_file()], name
        parts = {part.name for part in PARTS}
        assert set(re.findall(r"`([\w-]+)`", soak)) <= parts, name
