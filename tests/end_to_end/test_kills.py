"""The short form of tests/kills.py, which kills runs at random instants."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NUM_KILLS = int(os.environ.get("GENEFORMER_RUN_KILLS", "8"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("more", [(), ("--asynchronous",)], ids=["synchronous", "asynchronous"])
def test_nothing_is_lost(repository: Path, more: tuple[str, ...]) -> None:
    """GENEFORMER_RUN_KILLS=200 for more than the usual few; `-s` tells where they fell."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kills", "--kills", str(NUM_KILLS)]
    ended = subprocess.run(
        [*command, "--steps", "40", *more],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    inside = re.search(r"(\d+)% inside a save", ended.stdout)
    assert inside is not None
    assert int(inside[1]) >= 30 or NUM_KILLS < 30
