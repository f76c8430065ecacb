"""The short form of tests/kill_points.py, which kills a save at every system call on files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EVERY = int(os.environ.get("GENEFORMER_KILL_EVERY", "24"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_save_killed_at_any_call_loses_nothing(repository: Path) -> None:
    """GENEFORMER_KILL_EVERY=1 for every single call."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kill_points", "--every", str(EVERY)]
    ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    found = re.fullmatch(r"(\d+) calls, (\d+) of them tried; afterwards: .*\n", ended.stdout)
    assert found is not None
    assert int(found[1]) > 100
    assert int(found[2]) >= int(found[1]) // EVERY - 1
