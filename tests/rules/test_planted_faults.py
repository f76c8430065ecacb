"""The planted faults of the soak fit the code and the tests as they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rules.sources import LIBRARY, LIBRARY_FILES, ROOT
from tests.soak.faults import FAULTS, PACKAGE_TESTS, Fault
from tests.soak.planted_faults import CAUGHT, MISSED, Results, judged

LEAST = 40
LEAST_PER_PACKAGE = 2
FOLDERS = {path.parent.relative_to(LIBRARY).as_posix() for path in LIBRARY_FILES}
PACKAGES = {"top" if folder == "." else folder for folder in FOLDERS}


def test_every_package_has_faults_and_tests() -> None:
    counted = Counter(fault.package for fault in FAULTS)
    assert counted.total() >= LEAST
    assert counted.keys() == PACKAGES == PACKAGE_TESTS.keys()
    assert min(counted.values()) >= LEAST_PER_PACKAGE, counted


def test_no_two_faults_have_one_name() -> None:
    assert Counter(fault.name for fault in FAULTS).most_common(1)[0][1] == 1


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    text = (LIBRARY / fault.file).read_text()
    assert text.count(fault.old) == 1
    assert fault.new != fault.old
    # It must not be caught as a module that cannot be imported.
    compile(text.replace(fault.old, fault.new), fault.file, "exec")


def test_every_named_test_file_exists() -> None:
    patterns = {name for fault in FAULTS for name in fault.first}
    patterns |= {name for names in PACKAGE_TESTS.values() for name in names}
    assert [each for each in sorted(patterns) if not list(ROOT.glob(each))] == []


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


def test_results_hold_for_the_same_commit_and_what_was_missed_is_tried_again(
    tmp_path: Path,
) -> None:
    caught, missed = FAULTS[:2]
    for commit, is_open in (("a commit", False), ("", True)):
        results = Results(tmp_path / "results", commit)
        results.add(caught, {"outcome": CAUGHT, "by": "a test", "why": ""})
        results.add(missed, {"outcome": MISSED, "by": "", "why": ""})
        again = Results(tmp_path / "results", commit)
        assert (again.is_open(caught), again.is_open(missed)) == (is_open, True)
    assert Results(tmp_path / "results", "another").is_open(caught)
