"""The second tier of tests: the faults of `make test` again, many times and at random places.

    python -m tests.soak [--only NAME ...] [--short] [--results FILE] [--list]

    parts, one after the other  ->  shares, each a process with a time limit  ->  results, a table

All parts together take about two hours on two cores. A share that has passed is not run again for
the same commit: an interrupted soak resumes when it is started again. What the processes
print is in build/soak/NAME_NUMBER.log. Needs strace; SLURM's events need root, slurm-wlm and munge,
and are skipped elsewhere. Exit code 1 on any failure; a share that has done nothing, and was not
skipped, is one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.soak.parts import FOLDER, PARTS, ROOT, Part, Results, commit, counted, skipped

NO_TESTS = 5
"""pytest's exit code where nothing is selected."""
SHOWN_LINES = 30
CLEARING_S = 60.0
_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl."""
Result = dict[str, Any]


def main() -> int:
    """Runs what was asked for, and prints a line for each share and a table of all parts."""
    arguments = _arguments()
    parts = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    if arguments.list:
        print("\n".join(f"{part.name:<20} {part.what}" for part in parts))
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    adopt_orphans()
    results = Results(arguments.results, commit(ROOT))
    for part in parts:
        run_part(part, arguments.short, results)
    table, is_failed = summary(parts, arguments.short, results)
    print(table)
    return int(is_failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Runs the soak.")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--short", action="store_true", help="a few repetitions of each part")
    parser.add_argument("--results", type=Path, default=FOLDER / "results.json", metavar="FILE")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    return parser.parse_args()


def has_passed(name: str, results: Results) -> bool:
    """Whether that share need not be run."""
    found = results.of.get(name)
    return found is not None and not found["failures"] and not found["skipped"]


def names_of(part: Part, is_short: bool) -> list[str]:
    """Of its shares."""
    kind = "_short" if is_short else ""
    return [f"{part.name}{kind}_{n}" for n in range(1, len(part.commands(is_short)) + 1)]


def run_part(part: Part, is_short: bool, results: Results) -> None:
    """Runs the shares of a part that have not passed."""
    commands = part.commands(is_short)
    for name, command in zip(names_of(part, is_short), commands, strict=True):
        if has_passed(name, results):
            print(f"{name}: passed before", flush=True)
            continue
        result = run_share(name, command, part.limit_s, 0 if is_short else 1)
        results.keep(name, result)
        print(f"{name}: {result['failures']} failures, {result['seconds']} s", flush=True)


def run_share(name: str, command: Sequence[str], limit_s: float, least: int) -> Result:
    """{"repetitions", "failures", "seconds", "skipped": why} of one process.

    least: repetitions; with fewer it has failed, unless all was skipped
    """
    log, began = FOLDER / f"{name}.log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GENEFORMER_GENCODE": "off"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = ended(process, limit_s)
    printed = log.read_text()
    seconds = round(time.monotonic() - began)
    result, why = judged(printed, code, least)
    if result["failures"]:
        why = why or f"did not end in {limit_s:g} s"
        print(f"{name} {why}: {log}", *printed.splitlines()[-SHOWN_LINES:], sep="\n")
    return result | {"seconds": seconds}


def judged(printed: str, code: int | None, least: int) -> tuple[Result, str]:
    """(what a process comes to, why it has failed); the code is None if it did not end in time."""
    code = 0 if code == NO_TESTS else code
    repetitions, failures = counted(printed, code)
    is_idle = repetitions == failures == 0
    reason = skipped(printed) if is_idle else ""
    why = "" if code is None else f"ended with {code}"
    if not failures and not reason and repetitions < least:
        failures, why = 1, "nothing ran"
    return {"repetitions": repetitions, "failures": failures, "skipped": reason}, why


def ended(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Its exit code, or None if it did not end in time. Nothing that it has started is left."""
    started: list[psutil.Process] = []
    try:
        return process.wait(limit_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
        # So that pytest puts away what a test has started, such as a cluster.
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CLEARING_S)
        if isinstance(stopped, KeyboardInterrupt):
            raise
        return None
    finally:
        process.kill()
        process.wait()
        kill_all(started)


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """Those, and whatever else this process has inherited: daemons leave their session."""
    while found := [*processes, *psutil.Process().children(recursive=True)]:
        for each in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(found, timeout=10)
        processes = ()


def adopt_orphans() -> None:
    """From here on a process whose parent has ended becomes this process's child, not init's."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())


def summary(parts: Sequence[Part], is_short: bool, results: Results) -> tuple[str, bool]:
    """(a row for each part, whether one has failed)."""
    columns = ("repetitions", "failures", "seconds")
    line = "{:<20} {:>11} {:>8} {:>8}".format
    lines = ["", line("part", *columns)]
    total = [0, 0, 0]
    for part in parts:
        found = [results.of[name] for name in names_of(part, is_short)]
        row = [sum(each[column] for each in found) for column in columns]
        total = [before + more for before, more in zip(total, row, strict=True)]
        reasons = "; ".join(dict.fromkeys(each["skipped"] for each in found if each["skipped"]))
        lines.append(line(part.name, *row) + (f"  skipped: {reasons}" if reasons else ""))
    return "\n".join([*lines, line("all", *total)]), total[1] > 0


if __name__ == "__main__":
    sys.exit(main())
