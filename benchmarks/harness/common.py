"""Shared by all benchmarks: arguments, goals, results, child processes, turns, memory."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.io import files

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

CONFIGS = {name: ROOT / "configs" / f"geneformer_{name}.yaml" for name in ("10m", "106m")}
"""The model card's models, by the names that commands take."""
VOCABULARY = 25_429
"""Tokens of the card's models, specials included."""
SEQ_LENGTH = 2048

NOT_INSTALLED = "not installed"
TURN = "turn.json"
"""Measurements of a child process."""
MIB = 2**20


# Arguments and results


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, unchanged."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def too_small(arguments: argparse.Namespace, **lows: float) -> list[str]:
    """A problem for each number below the least value of its option; None counts as in range."""
    given = {name: getattr(arguments, name) for name in lows}
    return [
        f"--{name.replace('_', '-')} must be at least {lows[name]}, and is {each}."
        for name, value in given.items()
        for each in (value if isinstance(value, list) else [value])
        if each is not None and each < lows[name]
    ]


def unknown_names(option: str, names: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """A problem if some of `names` are not known."""
    unknown = sorted(set(names or ()) - set(known))
    return [f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}."] if unknown else []


def refuse(problems: Sequence[str], places: Iterable[Path | None] = ()) -> None:
    """Raise ConfigError with all problems, if any, and DataError for a place not writable."""
    if problems:
        raise ConfigError("\n".join(problems))
    for path in filter(None, places):
        files.check_output(path, overwrite=True)


def save_results(path: Path | None, content: dict[str, Any]) -> None:
    """Write numbers as JSON, with machine, versions and commit, if there is a path."""
    from geneformer_mcore.metrics.provenance import provenance

    if path:
        files.write_json(path, content | provenance())


def goal(
    what: str, value: float | None, bar: float, unit: str = "x", at_most: bool = False
) -> dict[str, Any]:
    """A ratio or amount, what it must reach (or stay under), and whether it does.

    value: None where a side of it was not measured; then `met` is None
    """
    met = None if value is None else value < bar if at_most else value >= bar
    return {"what": what, "value": value, "bar": bar, "unit": unit, "at_most": at_most, "met": met}


def goal_text(goal: dict[str, Any]) -> str:
    found = "-" if goal["value"] is None else f"{goal['value']:.3g} {goal['unit']}"
    word = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
    sign = "<" if goal["at_most"] else ">="
    return f"{goal['what']}: {found} (bar {sign} {goal['bar']:g} {goal['unit']}): {word}"


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def named(name: str, kind: Any, not_measured: str | None) -> dict[str, Any]:
    """Start of a contestant's row. kind: its class, with label and package."""
    peer = kind.package and f"{kind.package} {version_of(kind.package)}"
    return {"name": name, "label": kind.label, "peer": peer, "not_measured": not_measured}


# Processes, and turns of contestants in them


def step(*command: object, **environment: str) -> None:
    """Run one of the project's commands, shown on the console. Raises DataError if it fails.

    environment: defaults, for variables that are not set
    """
    words = [str(word) for word in command]
    print(f"\n$ python {' '.join(words)}", flush=True)
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment | os.environ)
    if ended.returncode:
        raise DataError(f"{words[0]} ended with {ended.returncode}; its error is shown above.")


def not_installed(kinds: dict[str, Any]) -> dict[str, str]:
    """{contestant: reason} of those whose package is not there."""
    packages = {name: kind.package for name, kind in kinds.items() if kind.package}
    absent = {name: each for name, each in packages.items() if version_of(each) == NOT_INSTALLED}
    return {name: f"{package} is {NOT_INSTALLED}" for name, package in absent.items()}


def child(script: str, work: Path, timeout_s: float, *words: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark in a process of its own: (content of WORK/turn.json, why it failed in one
    line)."""
    why = _why_failed([sys.executable, script, "--work", str(work), *words], timeout_s)
    result = work / TURN
    found = {} if why or not result.exists() else json.loads(result.read_text())
    return found, why.replace(str(work), "DIR")


def _why_failed(command: Sequence[str], timeout_s: float) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"not done after {timeout_s} s"
    if ended.returncode < 0:
        return f"ended by signal {-ended.returncode}, as by want of memory"
    lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    return lines[-1].replace(str(ROOT), ".") if ended.returncode else ""


def in_rounds(
    turn: Callable[[str, int], tuple[dict[str, Any], str]],
    labels: dict[str, str],
    num_rounds: int,
    failures: dict[str, str],
    rate: Callable[[dict[str, Any]], float],
) -> dict[str, list[dict[str, Any]]]:
    """Contestants take turns: A B C, A B C, ... The results of each, round by round.

    turn:      (contestant, round) -> (what was measured, why it failed)
    failures:  {contestant: reason}: these take no turn; who fails is added
    """
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in labels}
    for number in range(num_rounds):
        for name in [name for name in labels if name not in failures]:
            found, why = turn(name, number)
            if why:
                failures[name] = why
            else:
                turns[name].append(found)
            rate_or_why = why or f"{rate(found):,.3g} cells/s"
            print(f"round {number + 1}: {labels[name]}: {rate_or_why}", flush=True)
    return turns


# Memory


def forget_peak_mib(here: torch.device) -> float:
    """Start to look for a peak; the memory in use now: torch's on a GPU, the process's on a CPU."""
    import torch

    if here.type == "cuda":
        torch.cuda.init()  # before it, there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(here)
        return torch.cuda.memory_allocated(here) / MIB
    Path("/proc/self/clear_refs").write_text("5")
    return process_mib("VmRSS")


def peak_mib(here: torch.device) -> float:
    """The most since `forget_peak_mib`: allocated by torch, or resident in the whole process."""
    import torch

    on_gpu = here.type == "cuda"
    return torch.cuda.max_memory_allocated(here) / MIB if on_gpu else process_mib("VmHWM")


def process_mib(name: str) -> float:
    """A size in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(name))
    return int(kib) / 1024
