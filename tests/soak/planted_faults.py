"""Plant faults into copies of the project, one at a time, and see whether the tests catch them.

    python -m tests.soak.planted_faults [--only NAME] [--package P] [--jobs N] [--results FILE]

    working tree -> copy -> one replacement (faults.yaml) -> pytest of its package, up to the first
    failure -> caught | missed

A fault is caught if a test fails that passes without it: at the end those tests are run once more
in a copy without any fault. Exit code 1 if a fault is missed. Anything but a failing test, such as
a module that cannot be imported or a test that does not end, catches nothing; nor does a test whose
ranks or commands do not end in its time, but for faults that make a job hang (Fault.hangs).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
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
from pathlib import Path
from typing import Any

from tests.soak import parts
from tests.soak.faults import FAULTS, PACKAGE_TESTS, Fault

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "geneformer_mcore"
WARM = Path(__file__).with_name("warm_pytest.py")
PYTHON = ROOT / ".venv" / "bin" / "python"
LIMIT_S = 900.0
"""For the likeliest tests of a fault, and for the others of its package."""
CONFIRM_LIMIT_S = 7200.0
CAUGHT, MISSED = "caught", "missed"
PASSED = "all passed"
_NO_CATCH = re.compile(r"Timeout \(>|ImportError|ModuleNotFoundError|SyntaxError")
_LATE = re.compile(r"TimeoutExpired|(did not end|not ended) in (time|[\d.e+]+ s)")
"""A test has waited in vain for what it had started (ranks.py, forked.py, commands.py)."""
_MOST_LINES = 40
_PLUGIN = f"""
import os

def pytest_sessionstart(session):
    # The environment knows the project by its own place: the copy must come before it.
    import {LIBRARY}
    assert {LIBRARY}.__file__.startswith(os.getcwd()), {LIBRARY}.__file__
    # To look for the smallest example of a failure takes longer than to find it.
    from hypothesis import Phase, settings
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("planted", settings(settings.default, phases=phases))
    settings.load_profile("planted")

def pytest_runtest_logreport(report):
    if report.failed:
        words = str(report.longreprtext).splitlines() or [""]
        crash = getattr(report.longrepr, "reprcrash", None)
        first = (crash.message.splitlines() if crash else []) or [""]
        with open(os.environ["PLANTED_FAILURES"], "a") as file:
            file.write(f"{{report.nodeid}}\\t{{first[0]}} ... {{words[-1]}}\\n")
"""
"""A pytest plugin that writes down the tests that fail, and the first and last line of why."""


class Copy:
    """A copy of the working tree, in which one fault at a time is planted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.project = folder, folder / "project"
        self._log, self._failures = folder / "log.txt", folder / "failures"
        (folder / "plugin").mkdir(parents=True)
        (folder / "plugin" / "planted_report.py").write_text(_PLUGIN)
        self.restore()
        (self.project / ".venv").symlink_to(ROOT / ".venv")
        if (ROOT.parent / "shared").exists():
            (folder / "shared").symlink_to(ROOT.parent / "shared")
        path = f"{self.project}:{folder / 'plugin'}"
        self._warm = subprocess.Popen(
            [PYTHON, WARM],
            cwd=self.project,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder / "tmp")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def restore(self) -> None:
        """Copies whatever differs from the working tree, with the compiled loops: they hold for the
        same files in any folder."""
        for name in files_to_copy():
            path, source = self.project / name, ROOT / name
            if not path.exists() or _stamp(path) != _stamp(source):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, path)
        shutil.rmtree(self.folder / "tmp", ignore_errors=True)
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

    def run(self, tests: Sequence[str], limit_s: float, *more: str) -> dict[str, Any]:
        """pytest in the copy: {"code", "failures": [(test, why)]}; the code is negative where it
        did not end in time. Prints the end of its log if it is neither 0 nor 1."""
        self._failures.unlink(missing_ok=True)
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "planted_report", *more]
        # Some of what the warm process has imported brings plugins for pytest.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        files = {"log": str(self._log), "failures": str(self._failures)}
        code = self._ended({"arguments": [*options, *tests], **files}, limit_s)
        if code not in (0, 1):
            print(*self._log.read_text(errors="replace").splitlines()[-_MOST_LINES:], sep="\n")
        lines = self._failures.read_text().splitlines() if self._failures.exists() else []
        return {"code": code, "failures": [tuple(line.split("\t", 1)) for line in lines]}

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
        self._warm.communicate()


def _kill(session: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def files_to_copy() -> list[str]:
    """The files that git knows or would take in, and numba's compiled loops."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / LIBRARY).rglob("*.nb[ci]")]
    return [name for name in [*ended.stdout.split("\0"), *compiled] if (ROOT / name).is_file()]


def tests_of(patterns: Iterable[str]) -> list[str]:
    """The test files that match, each once, in this order."""
    found: list[str] = []
    for pattern in patterns:
        names = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
        assert names, f"no test file matches {pattern}: correct faults.yaml"
        found += names
    return list(dict.fromkeys(found))


def try_fault(copy: Copy, fault: Fault) -> dict[str, Any]:
    """{"outcome", "by", "why", "seconds"}, by the likeliest tests and then by the others of its
    package."""
    began = time.monotonic()
    first = tests_of(fault.tests)
    others = [name for name in tests_of(PACKAGE_TESTS[fault.package]) if name not in first]
    copy.plant(fault)
    try:
        for tests in filter(None, (first, others)):
            found = judged(copy.run(tests, LIMIT_S, "-x"), fault)
            if found["why"] != PASSED:
                break
    finally:
        copy.restore()
    return found | {"seconds": round(time.monotonic() - began, 1)}


def judged(ended: dict[str, Any], fault: Fault) -> dict[str, Any]:
    """The verdict on a run of tests."""
    if ended["code"] == 0:
        return {"outcome": MISSED, "by": "", "why": PASSED}
    if ended["code"] < 0:
        return {"outcome": MISSED, "by": "", "why": f"not ended in {LIMIT_S:g} s"}
    if ended["code"] != 1 or not ended["failures"]:
        return {"outcome": MISSED, "by": "", "why": f"pytest ended with {ended['code']}"}
    by, why = ended["failures"][0]
    is_missed = _NO_CATCH.search(why) or (_LATE.search(why) and not fault.hangs)
    return {"outcome": MISSED if is_missed else CAUGHT, "by": by, "why": why}


class Results(parts.Results):
    """Faults that were caught are not tried again for the same commit."""

    def is_open(self, fault: Fault) -> bool:
        """Whether it is still to be tried."""
        return self.of.get(fault.name, {}).get("outcome") != CAUGHT

    def add(self, fault: Fault, result: dict[str, Any]) -> None:
        """Keeps it, and prints a line."""
        self.keep(fault.name, result)
        print(line_of(fault.name, result), flush=True)


def line_of(name: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    seconds, by = result.get("seconds", 0.0), result["by"] or result["why"]
    return f"{result['outcome']:<8} {seconds:>6.1f} s  {name:<62} {by}"


def try_all(copies: Sequence[Copy], faults: Sequence[Fault], results: Results) -> None:
    """Tries the open faults, in as many copies at once; those that end soon come first, so that an
    interruption leaves the most."""
    opened = [fault for fault in faults if results.is_open(fault)]
    opened.sort(key=lambda fault: not str(fault.tests).startswith("('tests/unit"))
    remaining = iter(opened)

    def work(copy: Copy) -> None:
        for fault in remaining:
            results.add(fault, try_fault(copy, fault))

    with ThreadPoolExecutor(len(copies)) as pool:
        list(pool.map(work, copies))


def confirm(copy: Copy, results: Results, faults: Sequence[Fault]) -> None:
    """Runs the tests that caught faults without any: those that fail then have caught nothing."""
    caught = {fault.name: results.of[fault.name] for fault in faults if not results.is_open(fault)}
    tests = sorted({each["by"] for each in caught.values() if not each.get("confirmed")})
    if not tests:
        return
    ended = copy.run(tests, CONFIRM_LIMIT_S)
    failing = {by for by, _ in ended["failures"]}
    print(f"{len(tests)} catching tests without a fault: {len(failing)} fail")
    if ended["code"] not in (0, 1):
        raise SystemExit(f"they could not be run: pytest ended with {ended['code']}")
    for name, each in caught.items():
        if each["by"] in failing:
            why = f"{each['by']} fails without the fault, too"
            results.keep(name, each | {"outcome": MISSED, "why": why})
        else:
            results.keep(name, each | {"confirmed": True})


def main() -> int:
    """Prints a line for each fault as it is done, and a table of all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="faults whose name has this")
    parser.add_argument("--package", default="", choices=["", *PACKAGE_TESTS])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, help="JSON; what is in it is not done again")
    chosen = parser.parse_args()
    faults = [fault for fault in FAULTS if chosen.only in fault.name]
    faults = [fault for fault in faults if chosen.package in ("", fault.package)]
    assert faults, "no fault has such a name"
    results = Results(chosen.results, parts.commit(ROOT))
    with tempfile.TemporaryDirectory(prefix="faults_", ignore_cleanup_errors=True) as folder:
        copies = [Copy(Path(folder, str(number))) for number in range(chosen.jobs)]
        try_all(copies, faults, results)
        confirm(copies[0], results, faults)
        for copy in copies:
            copy.close()
    print("", *(line_of(fault.name, results.of[fault.name]) for fault in faults), sep="\n")
    missed = sum(map(results.is_open, faults))
    print(f"{CAUGHT}: {len(faults) - missed}\n{MISSED}: {missed}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
