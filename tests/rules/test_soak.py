"""The soak: its planted faults fit the code as it is, and nothing of its processes is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.rules.sources import LIBRARY, LIBRARY_FILES, ROOT
from tests.soak.__main__ import judged as judged_share
from tests.soak.faults import FAULTS, PACKAGE_TESTS, Fault, read
from tests.soak.planted_faults import CAUGHT, MISSED, Results, judged

PARTS = [path.relative_to(LIBRARY).parts for path in LIBRARY_FILES]
PACKAGES = {"top" if len(parts) == 1 else parts[0] for parts in PARTS}
SKIPPED = "sss\nSKIPPED [2] tests/soak/slurm/conftest.py:23: no slurmctld\n2 skipped in 0.1s\n"


def test_every_package_has_faults_and_tests() -> None:
    counted = Counter(fault.package for fault in FAULTS)
    assert counted.total() >= 40
    assert counted.keys() == PACKAGES == PACKAGE_TESTS.keys()
    assert min(counted.values()) >= 2, counted
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    patterns = {name for fault in FAULTS for name in fault.tests}
    patterns |= {name for names in PACKAGE_TESTS.values() for name in names}
    assert [each for each in sorted(patterns) if not list(ROOT.glob(each))] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    text = (LIBRARY / fault.file).read_text()
    assert text.count(fault.old) == 1
    assert fault.new != fault.old
    # It must not be caught as a module that cannot be imported.
    compile(text.replace(fault.old, fault.new), fault.file, "exec")


FAULT = "{name: a, package: io, file: f, old: x, new: y}"


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (FAULT.replace("}", ", line: 1}"), "unexpected keyword argument 'line'"),
        (FAULT.replace(", new: y", ""), "missing 1 required positional argument: 'new'"),
        (FAULT.replace("new: y", "new: x"), "nothing is replaced"),
        (FAULT.replace("old: x", "old: 1"), "not all are texts"),
        (FAULT.replace("package: io", "package: oi"), "packages without tests: .'oi'"),
        (f"{FAULT}, {FAULT}", "of one name: .'io: a'"),
    ],
)
def test_a_wrong_record_is_refused(faults: str, message: str) -> None:
    assert len(read(f"packages: {{io: [t]}}\nfaults: [{FAULT}]")[1]) == 1
    with pytest.raises((AssertionError, TypeError), match=message):
        read(f"packages: {{io: [t]}}\nfaults: [{faults}]")


@pytest.mark.parametrize(
    ("why", "outcome", "if_it_hangs"),
    [
        ("assert 1 == 2", CAUGHT, CAUGHT),
        ("AssertionError: two runs did not end in the same state", CAUGHT, CAUGHT),
        ("AssertionError: ranks [0, 1] did not end in time", MISSED, CAUGHT),
        ("AssertionError: not ended in time: [0, None] ... assert None not in", MISSED, CAUGHT),
        ("AssertionError: ['a.py'] did not end in 1e+03 s:", MISSED, CAUGHT),
        ("subprocess.TimeoutExpired: Command", MISSED, CAUGHT),
        ("Failed: Timeout (>300.0s) from pytest-timeout.", MISSED, MISSED),
        ("ModuleNotFoundError: No module named 'a'", MISSED, MISSED),
    ],
)
def test_a_test_that_waits_in_vain_catches_what_hangs_alone(
    why: str, outcome: str, if_it_hangs: str
) -> None:
    ended = {"code": 1, "failures": [("a test", why)]}
    fault = replace(FAULTS[0], hangs=False)
    assert judged(ended, fault)["outcome"] == outcome
    assert judged(ended, replace(fault, hangs=True))["outcome"] == if_it_hangs


def test_results_hold_for_one_commit_and_what_was_missed_is_tried_again(tmp_path: Path) -> None:
    caught, missed = FAULTS[:2]
    for commit, is_open in (("a commit", False), ("", True)):
        results = Results(tmp_path / "results", commit)
        results.add(caught, {"outcome": CAUGHT, "by": "a test", "why": ""})
        results.add(missed, {"outcome": MISSED, "by": "", "why": ""})
        again = Results(tmp_path / "results", commit)
        assert (again.is_open(caught), again.is_open(missed)) == (is_open, True)
    assert Results(tmp_path / "results", "another").is_open(caught)


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
    assert judged_share(printed, code, least)[0] == expected


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
"""Its share reaches its limit, or Ctrl-C is pressed, once both have printed who they are."""


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
    printed = "" if by_hand else "None\n"
    assert ("KeyboardInterrupt" in ended.stderr, ended.stdout) == (by_hand, printed)
    *started, last = (tmp_path / "out").read_text().split()
    assert (len(started), last) == (2, "interrupted")
    assert not [pid for pid in map(int, started) if psutil.pid_exists(pid)]
