"""What the soak makes of the processes that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.rules.sources import ROOT
from tests.soak.__main__ import judged

SKIPPED = "sss\nSKIPPED [2] tests/soak/slurm/conftest.py:23: no slurmctld\n2 skipped in 0.1s\n"


@pytest.mark.parametrize(
    ("printed", "code", "least", "repetitions", "failures", "skipped"),
    [
        ("25 kills, by phase", 0, 1, 25, 0, ""),
        ("25 kills, by phase", 1, 1, 25, 1, ""),
        ("25 kills, by phase", None, 1, 25, 1, ""),
        ("", 0, 1, 0, 1, ""),
        ("", 0, 0, 0, 0, ""),
        ("4 deselected in 0.1s", 5, 1, 0, 1, ""),
        ("247 calls, 0 of them tried; afterwards: {}", 0, 1, 0, 1, ""),
        (SKIPPED, 0, 1, 0, 0, "no slurmctld"),
        (SKIPPED, 1, 1, 0, 1, ""),
        ("caught: 3\nmissed: 2\n", 1, 1, 5, 2, ""),
    ],
)
def test_a_share_that_has_done_nothing_has_failed_unless_it_was_skipped(
    printed: str, code: int | None, least: int, repetitions: int, failures: int, skipped: str
) -> None:
    expected = {"repetitions": repetitions, "failures": failures, "skipped": skipped}
    assert judged(printed, code, least)[0] == expected


STARTER = """
import subprocess, sys, time
daemon = "import os, time; os.fork() and os._exit(0); os.setsid(); " \\
    "print(os.getpid(), flush=True); time.sleep(600)"
child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
try:
    for code in (daemon, child):
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
"""Starts a daemon and a process of another session, and leaves both."""
RUNNER = """
import subprocess, sys, time
from tests.soak import __main__ as soak

class Share(subprocess.Popen):
    def wait(self, timeout=None):
        while len(open("out").read().split()) < 2:
            time.sleep(0.02)
        if timeout != 600:
            return super().wait(timeout)
        if sys.argv[2] == "interrupted":
            raise KeyboardInterrupt
        raise subprocess.TimeoutExpired("", timeout)

soak.adopt_orphans()
command = [sys.executable, "-c", sys.argv[1]]
share = Share(command, stdout=open("out", "w"), start_new_session=True)
print(soak.ended(share, 600))
"""
"""Its share comes to its limit, or Ctrl-C is pressed, once both have said who they are."""


@pytest.mark.parametrize("how", ["late", "interrupted"])
def test_nothing_of_a_share_is_left(tmp_path: Path, how: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", RUNNER, STARTER, how],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    by_hand = how == "interrupted"
    assert ("KeyboardInterrupt" in ended.stderr, ended.stdout) == (
        by_hand,
        "" if by_hand else "None\n",
    )
    *started, said = (tmp_path / "out").read_text().split()
    assert (len(started), said) == (2, "interrupted")
    assert not [pid for pid in map(int, started) if psutil.pid_exists(pid)]
