"""Runs `make demo` once more, where it has run before, and checks what came of it.

    .venv/bin/python tests/check_demo.py

It must install nothing, train from step 0 in a run folder of its own, and end with a validation
loss at least 0.3 nats below the unigram baseline: exit code 1 and a list if not. It should take
under 3 minutes; more is only remarked on, since machines are noisy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 200
MOST_SECONDS = 180
LEAST_MARGIN = 0.3
"""Nats per masked gene below the unigram baseline."""
INSTALLING = ("Setting up .venv", "-m pip", "-m venv")
"""What `make` prints only when it installs."""


def main() -> int:
    """Runs, checks, prints what was found."""
    before = _run_folders()
    began = time.monotonic()
    exit_code, output = _make_demo()
    seconds = time.monotonic() - began
    remark = "" if seconds <= MOST_SECONDS else f": more than the {MOST_SECONDS} s it should"
    print(f"the second `make demo` took {seconds:.0f} s{remark}")
    found = [f"`make demo` ended with {exit_code}"] if exit_code else []
    if not before:
        found.append("no run of an earlier `make demo` is there to compare with")
    new = sorted(_run_folders() - before)
    found += installed(output)
    found += unlearned(_numbers(new[0])) if len(new) == 1 else [f"new run folders: {new}, not one"]
    for problem in found:
        print(f"problem: {problem}")
    return 1 if found else 0


def installed(output: str) -> list[str]:
    """The lines of `output` of an installation, as problems."""
    lines = [line for line in output.splitlines() if any(word in line for word in INSTALLING)]
    return [f"it installed something: {line}" for line in lines]


def unlearned(numbers: dict[str, Any]) -> list[str]:
    """What is wrong with a run by its `launch/report.py --json`."""
    steps = numbers["curves"]["train"]["steps"] or [STEPS]
    loss, unigram = numbers["val_loss"], (numbers["baselines"] or {}).get("unigram")
    found = []
    if (numbers["outcome"], numbers["logged_step"]) != ("finished", STEPS):
        found.append(f"{numbers['outcome']} at step {numbers['logged_step']}, not {STEPS}")
    if numbers["restart"] != 0 or steps[0] * 2 > STEPS:
        found.append(f"restart {numbers['restart']}, logged from step {steps[0]} on: not from 0")
    if loss is None or unigram is None or not loss <= unigram - LEAST_MARGIN:
        found.append(f"validation loss {loss} is not {LEAST_MARGIN} below the unigram's {unigram}")
    print(f"validation loss {loss}, unigram baseline {unigram}")
    return found


def _run_folders() -> set[Path]:
    return set((ROOT / "runs").glob("demo_*"))


def _make_demo() -> tuple[int, str]:
    """(exit code, output), which is also shown as it comes."""
    lines = []
    with subprocess.Popen(
        ["make", "demo"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def _numbers(run: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "numbers.json")
        command = [sys.executable, "launch/report.py", str(run), "--json", str(out)]
        subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())


if __name__ == "__main__":
    sys.exit(main())
