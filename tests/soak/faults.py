"""The faults that planted_faults.py plants, of faults.yaml, and the tests that must catch each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("faults.yaml")


@dataclass(frozen=True)
class Fault:
    """A replacement of a text of the library, `old`, by `new`.

    file: within geneformer_mcore
    tests: files that are run before those of the package, as the likeliest to catch it
    hangs: a user would see a job that does not end, so a test that waited for one in vain has
    caught it
    """

    name: str
    package: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    hangs: bool = False

    def __post_init__(self) -> None:
        texts = (self.name, self.package, self.file, self.old, self.new, *self.tests)
        assert all(isinstance(text, str) for text in texts), f"{self.name}: not all are texts"
        assert isinstance(self.hangs, bool), f"{self.name}: hangs is true or false"
        assert self.old.strip(), f"{self.name}: no old text"
        assert self.old != self.new, f"{self.name}: nothing is replaced"


def read(text: str) -> tuple[dict[str, tuple[str, ...]], tuple[Fault, ...]]:
    """({package: its test files or globs}, faults). A key that a fault has not is a TypeError."""
    content = yaml.safe_load(text)
    assert content.keys() == {"packages", "faults"}, sorted(content)
    packages = {name: tuple(tests) for name, tests in content["packages"].items()}
    faults = tuple(_fault(**row) for row in content["faults"])
    twice = [name for name, times in Counter(fault.name for fault in faults).items() if times > 1]
    assert not twice, f"of one name: {twice}"
    unknown = {fault.package for fault in faults} - packages.keys()
    assert not unknown, f"packages without tests: {sorted(unknown)}"
    return packages, faults


def _fault(name: str, package: str, tests: Sequence[str] = (), **others: Any) -> Fault:
    return Fault(f"{package}: {name}", package, tests=tuple(tests), **others)


PACKAGE_TESTS, FAULTS = read(FILE.read_text())
