"""Parts of the soak: processes with a time limit each, and the counts in their output."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "soak"


@dataclass(frozen=True)
class Part:
    """One kind of fault, repeated by commands: a module of the soak, or pytest, with arguments.

    limit_s:      for one process
    short:        a few repetitions, to try the runner
    full, shares: so many processes; {share} is the number of one, from 1
    """

    name: str
    what: str
    limit_s: float
    short: str
    full: str
    shares: int = 1

    def commands(self, is_short: bool) -> list[list[str]]:
        """Arguments of Python for each process; those that have passed are not run again."""
        if is_short:
            return [_arguments(self.short)]
        shares = range(1, self.shares + 1)
        return [_arguments(self.full.format(share=share)) for share in shares]


def _arguments(command: str) -> list[str]:
    name, *more = shlex.split(command)
    if name == "pytest":
        return ["-m", "pytest", "-q", "-rs", *more]
    return ["-W", "ignore", "-m", f"tests.soak.{name}", *more]


PARTS = (
    Part(
        "kills",
        "SIGKILL at random instants of a training",
        900,
        "kills --kills 2 --steps 20",
        "kills --kills 25 --steps 120",
        shares=4,
    ),
    Part(
        "kills-asynchronous",
        "the same, saves written while it trains",
        900,
        "kills --kills 2 --steps 20 --asynchronous",
        "kills --kills 25 --steps 120 --asynchronous",
        shares=4,
    ),
    Part(
        "kill-points",
        "SIGKILL at every system call of a save",
        900,
        "kill_points --every 60",
        "kill_points --every 4 --first {share}",
        shares=4,
    ),
    Part(
        "ingest-kills",
        "SIGKILL at random instants of a build",
        900,
        "ingest_kills --kills 2",
        "ingest_kills --kills 25",
        shares=2,
    ),
    Part(
        "store-flips",
        "a flipped bit of a store",
        600,
        "damage store --times 10",
        "damage store --times 200",
    ),
    Part(
        "checkpoint-damage",
        "a flipped bit, a truncated or lost file of a checkpoint",
        600,
        "damage checkpoint --times 5",
        "damage checkpoint --times 100",
    ),
    Part(
        "parity",
        "loss curves of every layout against plain PyTorch",
        2400,
        "parity_table --json build/soak/parity_short.json 'tp1 pp1 dp1'",
        "parity_table --json build/soak/parity.json",
    ),
    Part(
        "reshard",
        "checkpoints of every layout loaded under every other",
        1800,
        "reshard --most 2",
        "reshard",
    ),
    Part(
        "slurm",
        "the events of a job on a cluster",
        2400,
        "pytest tests/soak/slurm -k requeued",
        "pytest tests/soak/slurm",
    ),
    Part(
        "cases",
        "cases marked `soak` of the other tests",
        2400,
        "pytest -m soak tests/unit",
        "pytest -m soak tests",
    ),
    Part(
        "planted-faults",
        "faults planted into the code, one at a time, that tests must catch",
        3600,
        "planted_faults --package cells",
        "planted_faults --results build/soak/planted_faults.json",
    ),
)

_COUNTED = (
    re.compile(r"^(\d+) (?:kills|bits flipped|damages|layouts|pairs)\b", re.MULTILINE),
    re.compile(r"^\d+ calls, (\d+) of them tried", re.MULTILINE),
    re.compile(r"\b(\d+) passed\b.* in "),
    re.compile(r"^caught: (\d+)$", re.MULTILINE),
)
_FAILED = (
    re.compile(r"\b(\d+) failed\b.* in "),
    re.compile(r"\b(\d+) errors?\b.* in "),
    re.compile(r"^missed: (\d+)$", re.MULTILINE),
)
_SKIPPED = re.compile(r"^SKIPPED \[\d+\] [^ ]+: (.*)$", re.MULTILINE)


def skipped(printed: str) -> str:
    """Why pytest has skipped tests; empty if it has not."""
    return "; ".join(dict.fromkeys(_SKIPPED.findall(printed)))


def counted(printed: str, code: int | None) -> tuple[int, int]:
    """(repetitions, failures) of a process, by what it has printed and by its exit code, which is
    None if it did not end in time."""
    passed = sum(int(found[-1]) for pattern in _COUNTED if (found := pattern.findall(printed)))
    failed = sum(int(found[-1]) for pattern in _FAILED if (found := pattern.findall(printed)))
    return passed + failed, max(failed, int(code != 0))
