"""Shell scripts are sound: to bash, and to shellcheck where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.rules.sources import ROOT, name_of

SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "tests").glob("*.sh"))]


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts(path: Path) -> None:
    checks = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for check in checks:
        checked = subprocess.run([*check, str(path)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "set -euo pipefail" in path.read_text()
