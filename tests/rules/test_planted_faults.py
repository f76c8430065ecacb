"""The planted faults of the soak fit the code and the tests as they are."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.rules.sources import LIBRARY, LIBRARY_FILES, ROOT
from tests.soak.faults import FAULTS, PACKAGE_TESTS, Fault

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
