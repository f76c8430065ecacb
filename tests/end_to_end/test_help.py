"""--help of every command: at once, and with an example."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("launch", "data_prep")
    for path in (ROOT / folder).glob("*.py")
)


def cpu_s() -> float:
    """Of all children so far: wall time would be that of whatever else runs here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_at_once_with_an_example(command: str) -> None:
    before = cpu_s()
    done = subprocess.run(
        [sys.executable, command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert cpu_s() - before < 1.5
    usage, _, rest = done.stdout.partition("\n\n")
    assert usage.startswith("usage: ")
    assert f"{command} " in rest
