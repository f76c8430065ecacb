"""What the README tells people to type is there. tests/readme_commands.sh runs it."""

from __future__ import annotations

import re

from tests.rules.sources import ROOT

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
