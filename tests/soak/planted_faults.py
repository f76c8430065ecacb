"""Plants faults into copies of the project, one at a time, and sees whether the tests catch them.

    python -m tests.soak.planted_faults [--only NAME] [--package P] [--jobs N] [--results FILE]

    working tree -> copy -> one replacement (faults.py) -> pytest of its package, up to the first
    failure -> caught | missed

A fault is caught if a test fails that passes without it: at the end those tests are run once more
in a copy without any fault. First of all the whole selection must pass so (--no-control: not).
Exit code 1 if a fault is missed. Anything but a failing test, such as a module that cannot be
imported or a test that does not end, catches nothing; nor does a test whose ranks or commands do
not end in its time, but for faults that make a job hang (Fault.hangs).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tests.soak.faults import FAULTS, PACKAGE_TESTS, Fault
from tests.soak.tree import commit

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "geneformer_mcore"
WARM = Path(__file__).with_name("warm_pytest.py")
LIMIT_S = 900.0
"""How long the tests of one fault may take."""
CONTROL_LIMIT_S = 7200.0
CAUGHT, MISSED, NOT_APPLICABLE = "caught", "missed", "not applicable"
UNDECIDED = "undecided"
"""Its likeliest tests pass, and those of its package are still to come."""
_LASTING = (CAUGHT, UNDECIDED)
PASSED = "all passed"
_NO_CATCH = re.compile(r"Timeout \(>|ImportError|ModuleNotFoundError|SyntaxError")
_LATE = re.compile(r"TimeoutExpired|(did not end|not ended) in (time|[\d.e+]+ s)")
"""A test has waited in vain for what it had started (ranks.py, forked.py, commands.py)."""
_MOST_SAID = 40
_PLUGIN = """
import os

def pytest_sessionstart(session):
    # To look for the smallest example of a failure takes longer than to find it.
    from hypothesis import Phase, settings
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("planted", settings(settings.default, phases=phases))
    settings.load_profile("planted")

def pytest_runtest_logreport(report):
    if report.failed:
        words = str(report.longreprtext).splitlines() or [""]
        crash = getattr(report.longrepr, "reprcrash", None)
        said = (crash.message.splitlines() if crash else []) or [""]
        with open(os.environ["PLANTED_FAILURES"], "a") as file:
            file.write(f"{report.nodeid}\\t{said[0]} ... {words[-1]}\\n")
"""
"""A pytest plugin that writes down which tests fail, and the first and last line of why."""


class Copy:
    """A copy of a checkout, in which one fault at a time is planted. Compiled files are kept."""

    def __init__(self, tree: Path, folder: Path) -> None:
        self.tree, self.folder = tree, folder
        self.project = folder / "project"
        (folder / "tmp").mkdir(parents=True)
        (folder / "plugin").mkdir()
        (folder / "plugin" / "planted_report.py").write_text(_PLUGIN)
        self.restore()
        (self.project / ".venv").symlink_to(tree / ".venv")
        if (tree.parent / "shared").exists():
            (folder / "shared").symlink_to(tree.parent / "shared")
        self._check_import()
        self._warm = subprocess.Popen(
            [str(tree / ".venv" / "bin" / "python"), str(WARM)],
            cwd=self.project,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def restore(self) -> None:
        """Makes the copy as the tree is: changed files are copied, unknown ones removed."""
        # Compiled loops hold for the same files, wherever they lie.
        compiled = (self.tree / LIBRARY).rglob("*.nb[ci]")
        names = [
            *files_of(self.tree),
            *(path.relative_to(self.tree).as_posix() for path in compiled),
        ]
        wanted = {self.project / name: self.tree / name for name in names}
        for path in sorted(self.project.rglob("*"), reverse=True):
            if path in wanted or ".venv" in path.parts or "__pycache__" in path.parts:
                continue
            if path.is_file() or path.is_symlink():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
        for path, source in wanted.items():
            if not path.exists() or _stamp(path) != _stamp(source):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, path)
        shutil.rmtree(self.folder / "tmp")
        (self.folder / "tmp").mkdir()

    def plant(self, fault: Fault) -> None:
        """Replaces the fault's text, which must be there once."""
        path = self.project / LIBRARY / fault.file
        text = path.read_text()
        assert text.count(fault.old) == 1, f"{fault.name}: its text is not in {path} once"
        path.write_text(text.replace(fault.old, fault.new))
        # numba's cache goes by time and size of the file.
        for cached in path.parent.glob(f"__pycache__/{path.stem}.*"):
            cached.unlink()

    def run(self, tests: Sequence[str], limit_s: float, more: Sequence[str] = ()) -> dict[str, Any]:
        """pytest in the copy: {"code", "failures": [(test, why)], "said", "seconds"}; the code is
        negative where it did not end in time."""
        failures = self.folder / "failures"
        failures.unlink(missing_ok=True)
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "planted_report", *more]
        # Some of what the warm process has imported brings plugins for pytest.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        if "--dist" in (self.project / "pyproject.toml").read_text():
            options += ["-n", "0"]
        began = time.monotonic()
        request = {
            "arguments": [*options, *tests],
            "log": str(self.folder / "log.txt"),
            "failures": str(failures),
        }
        code = self._ended(request, limit_s)
        lines = failures.read_text().splitlines() if failures.exists() else []
        pairs = [tuple(line.split("\t", 1)) for line in lines]
        said = (self.folder / "log.txt").read_text(errors="replace").splitlines()[-_MOST_SAID:]
        seconds = round(time.monotonic() - began, 1)
        return {"code": code, "failures": pairs, "said": said, "seconds": seconds}

    def _ended(self, request: dict[str, Any], limit_s: float) -> int:
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        self._warm.stdin.write(json.dumps(request) + "\n")
        self._warm.stdin.flush()
        pid = int(self._warm.stdout.readline())
        late = threading.Timer(limit_s, _kill, [pid])
        late.start()
        code = int(self._warm.stdout.readline())
        late.cancel()
        _kill(pid)  # what it has started may still be there
        return code

    def close(self) -> None:
        """Ends its process."""
        assert self._warm.stdin is not None
        self._warm.stdin.close()
        self._warm.wait()

    def _environment(self) -> dict[str, str]:
        path = f"{self.project}:{self.folder / 'plugin'}"
        return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(self.folder / "tmp")}

    def _check_import(self) -> None:
        """The environment knows the project by its own place: the copy must come before it."""
        code = (
            f"import {LIBRARY};"
            f"assert {LIBRARY}.__file__.startswith({str(self.project)!r}), {LIBRARY}.__file__"
        )
        python = str(self.tree / ".venv" / "bin" / "python")
        subprocess.run([python, "-c", code], check=True, cwd=self.folder, env=self._environment())


def _kill(session: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def files_of(tree: Path) -> list[str]:
    """What git knows or would take in; without what was removed."""
    command = ["git", "-C", str(tree), "ls-files", "-z", "--cached", "--others"]
    ended = subprocess.run([*command, "--exclude-standard"], check=True, capture_output=True)
    names = [name for name in ended.stdout.decode().split("\0") if name]
    return [name for name in names if (tree / name).is_file()]


def tests_of(tree: Path, patterns: Iterable[str], must_match: bool) -> list[str]:
    """The files of `tree` that match, each once, in this order."""
    found: list[str] = []
    for pattern in patterns:
        names = sorted(path.relative_to(tree).as_posix() for path in tree.glob(pattern))
        assert names or not must_match, f"no test file matches {pattern}: correct faults.py"
        found += names
    return list(dict.fromkeys(found))


def stages_of(tree: Path, fault: Fault, must_match: bool) -> list[list[str]]:
    """The tests for a fault: the likeliest, then the others of its package."""
    first = tests_of(tree, fault.first, must_match)
    package = tests_of(tree, PACKAGE_TESTS[fault.package], must_match)
    return [each for each in (first, [name for name in package if name not in first]) if each]


def try_fault(copy: Copy, fault: Fault, tests: list[str]) -> dict[str, Any]:
    """{"outcome", "by", "why", "seconds"}."""
    path = copy.tree / LIBRARY / fault.file
    number = path.read_text().count(fault.old) if path.exists() else 0
    if number != 1:
        why = f"text found {number} times"
        return {"outcome": NOT_APPLICABLE, "by": "", "why": why, "seconds": 0.0}
    copy.plant(fault)
    try:
        ended = copy.run(tests, LIMIT_S, ["-x"])
    finally:
        copy.restore()
    return judged(ended, fault) | {"seconds": ended["seconds"]}


def judged(ended: dict[str, Any], fault: Fault) -> dict[str, Any]:
    """What a run of tests comes to."""
    if ended["code"] == 0:
        return {"outcome": MISSED, "by": "", "why": PASSED}
    if ended["code"] < 0:
        return {"outcome": MISSED, "by": "", "why": f"not ended in {LIMIT_S:g} s"}
    if ended["code"] != 1 or not ended["failures"]:
        print("\n".join(ended["said"]))
        return {"outcome": MISSED, "by": "", "why": f"pytest ended with {ended['code']}"}
    by, why = ended["failures"][0]
    if _NO_CATCH.search(why) or (_LATE.search(why) and not fault.hangs):
        return {"outcome": MISSED, "by": by, "why": why}
    return {"outcome": CAUGHT, "by": by, "why": why}


class Results:
    """What was found, in a file that the next start goes on from if the commit is the same. Only
    what was caught, or is undecided, is not tried from the start again."""

    def __init__(self, path: Path | None, commit: str) -> None:
        self.content: dict[str, Any] = {"commit": commit, "faults": {}}
        self._path, self._lock = path, threading.Lock()
        if path is not None and path.exists():
            before = json.loads(path.read_text())
            if commit and before["commit"] == commit:
                found = before["faults"].items()
                kept = {name: each for name, each in found if each["outcome"] in _LASTING}
                self.content["faults"] = kept

    def of(self, fault: Fault) -> dict[str, Any] | None:
        """What is known of this very fault."""
        found = self.content["faults"].get(fault.name)
        return found if found and found["digest"] == _digest(fault) else None

    def is_open(self, fault: Fault) -> bool:
        """Whether it is still to be tried, or to be tried on."""
        found = self.of(fault)
        return found is None or found["outcome"] == UNDECIDED

    def add(self, fault: Fault, result: dict[str, Any]) -> None:
        """Keeps it, and prints a line."""
        with self._lock:
            self.content["faults"][fault.name] = result | {"digest": _digest(fault)}
            self.save()
            print(line_of(fault, result), flush=True)

    def save(self) -> None:
        """Writes the file, if there is one."""
        if self._path is not None:
            part = self._path.with_name(f".{self._path.name}.part")
            part.write_text(json.dumps(self.content, indent=1) + "\n")
            part.replace(self._path)


def _digest(fault: Fault) -> str:
    return hashlib.sha256(repr(astuple(fault)).encode()).hexdigest()[:16]


def line_of(fault: Fault, result: dict[str, Any]) -> str:
    """A line of the table."""
    seconds = result.get("seconds", 0.0)
    by = result["by"] or result["why"]
    return f"{result['outcome']:<14} {seconds:>6.1f} s  {fault.name:<62} {by}"


def control(copy: Copy, tests: list[str]) -> bool:
    """The fault "none": all that is selected must pass."""
    ended = copy.run(tests, CONTROL_LIMIT_S)
    for by, why in ended["failures"]:
        print(f"fails without a fault: {by}: {why}")
    print(f"none: {len(tests)} test files, code {ended['code']}, {ended['seconds']} s", flush=True)
    copy.restore()
    return ended["code"] == 0


def confirm(copy: Copy, results: Results, faults: Sequence[Fault]) -> None:
    """Runs the tests that caught faults without any: those that fail then have caught nothing."""
    found = {fault.name: results.content["faults"].get(fault.name) for fault in faults}
    caught = [each for each in found.values() if each and each["outcome"] == CAUGHT]
    asked = sorted({each["by"] for each in caught if not each.get("confirmed")})
    if not asked:
        return
    ended = copy.run(asked, CONTROL_LIMIT_S)
    copy.restore()
    failing = {by for by, _ in ended["failures"]}
    print(f"{len(asked)} catching tests without a fault: {len(failing)} fail, {ended['seconds']} s")
    if ended["code"] not in (0, 1):
        raise SystemExit(f"they could not be run: pytest ended with {ended['code']}")
    for each in caught:
        if each["by"] in failing:
            each |= {"outcome": MISSED, "why": f"{each['by']} fails without the fault, too"}
        each["confirmed"] = each["outcome"] == CAUGHT
    results.save()


def run_all(
    tree: Path, folder: Path, faults: Sequence[Fault], results: Results, settings: Any
) -> bool:
    """Tries every fault that is not known yet; whether the control passed."""
    must_match = tree == ROOT
    stages = {fault.name: stages_of(tree, fault, must_match) for fault in faults}
    copies: queue.Queue[Copy] = queue.Queue()
    for number in range(settings.jobs):
        copies.put(Copy(tree, folder / str(number)))
    if not settings.no_control:
        every = [name for each in stages.values() for tests in each for name in tests]
        copy = copies.get()
        if not control(copy, list(dict.fromkeys(every))):
            return False
        copies.put(copy)
    try_all(copies, faults, stages, results, settings.jobs)
    copy = copies.get()
    confirm(copy, results, faults)
    for each in (copy, *(copies.get() for _ in range(copies.qsize()))):
        each.close()
    return True


def try_all(
    copies: queue.Queue[Copy],
    faults: Sequence[Fault],
    stages: dict[str, list[list[str]]],
    results: Results,
    jobs: int,
) -> None:
    """Tries faults in as many copies at once, until each is caught or has passed all its tests."""

    def one(fault: Fault) -> None:
        before = results.of(fault) or {"stages": 0, "seconds": 0.0}
        tests = stages[fault.name][before["stages"]]
        copy = copies.get()
        try:
            found = try_fault(copy, fault, tests)
        finally:
            copies.put(copy)
        found |= {"stages": before["stages"] + 1}
        found["seconds"] = round(found["seconds"] + before["seconds"], 1)
        if found["why"] == PASSED and found["stages"] < len(stages[fault.name]):
            found["outcome"] = UNDECIDED
        results.add(fault, found)

    # The quick ones first, and of each its likeliest tests: a stop in between leaves the most.
    ordered = sorted(faults, key=lambda each: not stages[each.name][0][0].startswith("tests/unit"))
    while todo := [each for each in ordered if results.is_open(each)]:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, todo))


def chosen(settings: Any) -> list[Fault]:
    """The faults that were asked for."""
    found = [
        fault
        for fault in FAULTS
        if (not settings.only or settings.only in fault.name)
        and (not settings.package or fault.package == settings.package)
    ]
    assert found, "no fault has such a name"
    return found


def main() -> int:
    """Prints a line for each fault as it is done, and a table of all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="faults whose name has this")
    parser.add_argument("--package", default="", choices=["", *PACKAGE_TESTS])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, help="JSON; what is in it is not done again")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another checkout to plant into")
    parser.add_argument("--no-control", action="store_true")
    settings = parser.parse_args()
    tree, faults = settings.tree.resolve(), chosen(settings)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS), "two faults have one name"
    results = Results(settings.results, commit(tree))
    with tempfile.TemporaryDirectory(prefix="faults_", ignore_cleanup_errors=True) as folder:
        if not run_all(tree, Path(folder), faults, results, settings):
            return 1
    found = [(fault, results.content["faults"][fault.name]) for fault in faults]
    print("\n" + "\n".join(line_of(*each) for each in found))
    for outcome in (CAUGHT, MISSED, NOT_APPLICABLE):
        print(f"{outcome}: {sum(result['outcome'] == outcome for _, result in found)}")
    wrong = [MISSED, NOT_APPLICABLE] if tree == ROOT else [MISSED]
    return int(any(result["outcome"] in wrong for _, result in found))


if __name__ == "__main__":
    sys.exit(main())
