"""The parts of a session on a borrowed machine: each a process of its own with a time of its own.

part -> process, its words in NAME.log -> ended | failed | out of time | not begun -> session.json
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geneformer_mcore.io.files import write_json

ENDED, FAILED, LATE, NOT_BEGUN = "ended", "failed", "out of time", "not begun"
_LEAST_S = 10.0
"""With less time than this left no part is begun: it would not get past its imports."""


@dataclass(frozen=True)
class Part:
    """One process. budget_s: when it is killed, with all that it has started."""

    name: str
    command: Sequence[str]
    budget_s: float


@dataclass(frozen=True)
class Outcome:
    """How a part went. code: its exit code, negative for a signal; None if it was not begun."""

    name: str
    state: str
    code: int | None
    seconds: float


def run_all(parts: Sequence[Part], out: Path, seconds: float) -> list[Outcome]:
    """All parts in turn, within `seconds` together. out/session.json is kept up to date."""
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for part in parts:
        left = deadline - time.monotonic()
        if left < _LEAST_S:
            outcomes.append(Outcome(part.name, NOT_BEGUN, None, 0.0))
        else:
            outcomes.append(run_part(part, out, min(left, part.budget_s)))
        print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
        write_json(out / "session.json", as_json(outcomes))
    return outcomes


def run_part(part: Part, out: Path, seconds: float) -> Outcome:
    """One part, killed after `seconds`."""
    began = time.monotonic()
    with (out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A group of its own: what it has started must go with it.
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            state = FAILED if code else ENDED
        except subprocess.TimeoutExpired:
            state = LATE
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return Outcome(part.name, state, code, time.monotonic() - began)


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What is kept of them."""
    return {"parts": [asdict(outcome) for outcome in outcomes]}
