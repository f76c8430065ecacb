"""Shared by all benchmarks: goals, tables, pictures, arguments, processes in turns, memory."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
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

NOT_INSTALLED = "not installed"
MIB = 2**20


# Arguments


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, as it stands."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def too_small(*ranges: tuple[str, float | None, float]) -> list[str]:
    """A problem for each (option, value, least value) out of range; None counts as in range."""
    return [
        f"{name} must be at least {low}, and is {value}."
        for name, value, low in ranges
        if value is not None and value < low
    ]


def unknown_names(option: str, names: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """A problem if some of `names` are not known."""
    known = list(known)
    unknown = sorted(set(names or ()) - set(known))
    return [f"{option}: no {', '.join(unknown)}; there are {', '.join(known)}."] if unknown else []


def refuse(problems: Sequence[str], places: Iterable[Path | None] = ()) -> None:
    """Raise ConfigError with all problems, if any, and DataError for a place not writable."""
    if problems:
        raise ConfigError("\n".join(problems))
    for path in places:
        if path:
            files.check_output(path, overwrite=True)


def save_results(path: Path, content: dict[str, Any]) -> None:
    """Write numbers as JSON, with machine, versions and commit."""
    from geneformer_mcore.metrics.provenance import provenance

    files.write_json(path, content | provenance())


# Goals


@dataclass(frozen=True)
class Goal:
    """A line under a table.

    value:    the ratio or amount found; None where a side of it was not measured
    bar:      what it must reach, or with `at_most` must stay under
    """

    what: str
    value: float | None
    bar: float
    unit: str = "x"
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is no value."""
        if self.value is None:
            return None
        return self.value < self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        sign = "<" if self.at_most else ">="
        words = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        found = "-" if self.value is None else f"{self.value:.3g} {self.unit}"
        return f"{self.what}: {found} (bar {sign} {self.bar:g} {self.unit}): {words}"

    def as_json(self) -> dict[str, Any]:
        """Its fields and whether it is met."""
        return asdict(self) | {"met": self.met}


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """ours / theirs; None if either is missing."""
    return None if ours is None or theirs is None else ours / theirs


def best(rates: list[float | None]) -> float | None:
    """The largest of those that were measured; None if none was."""
    return max((rate for rate in rates if rate is not None), default=None)


def version_of(package: str) -> str:
    """The installed version of a distribution, or NOT_INSTALLED."""
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def named(name: str, kind: Any, not_measured: str | None) -> dict[str, Any]:
    """Start of a contestant's row; with the reason if it was not measured.

    kind: its class, or an object with its label and package
    """
    peer = kind.package and f"{kind.package} {version_of(kind.package)}"
    return {"name": name, "label": kind.label, "peer": peer, "not_measured": not_measured}


# Tables and pictures


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for what they hold; the first flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(text.rjust(w) for text, w in others)])

    return "\n".join([line(head), *map(line, rows)])


def save_bars(path: Path, panels: dict[str, list[tuple[str, float, bool]]], footer: str) -> None:
    """Draw cells/s as horizontal bars on a log scale: {title: [(label, rate, is ours)]}."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    heights = [len(bars) + 1.5 for bars in panels.values()]
    size = (9, 0.32 * sum(heights) + 1)
    layout: dict[str, Any] = {"height_ratios": heights, "squeeze": False, "layout": "constrained"}
    figure, all_axes = pyplot.subplots(len(panels), figsize=size, **layout)
    for axes, (title, bars) in zip(all_axes[:, 0], panels.items(), strict=True):
        ordered = sorted(bars, key=lambda bar: bar[1])
        rates = [rate for _, rate, _ in ordered]
        colours = ["#1f6f5c" if is_ours else "#9aa5b1" for _, _, is_ours in ordered]
        drawn = axes.barh([label for label, _, _ in ordered], rates, color=colours)
        axes.bar_label(drawn, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(min(rates) / 2, max(rates) * 3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("cells/s", fontsize=9)
    figure.text(0.01, -0.02, footer, fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


# Processes, and turns of contestants in them


def build_store(
    out: Path, inputs: Iterable[Path | str], vocabulary: Path | str | None, *options: str
) -> list[str]:
    """The command that builds a token store; without a vocabulary, that of the cells."""
    command = [sys.executable, str(ROOT / "data_prep" / "build_store.py"), "--out", str(out)]
    command += ["--vocabulary", str(vocabulary)] if vocabulary else []
    return [*command, *options, *map(str, inputs)]


def why_failed(command: Sequence[str], timeout_s: float) -> str:
    """Run a child process. The reason of its failure in one line, or ""."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
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
        for name, label in labels.items():
            if name in failures:
                continue
            found, why = turn(name, number)
            if why:
                failures[name] = why
            else:
                turns[name].append(found)
            print(f"round {number + 1}: {label}: {why or rate_text(rate(found))}", flush=True)
    return turns


def rate_text(cells_per_s: float) -> str:
    """Cells per second, with three digits or more."""
    return f"{cells_per_s:,.0f} cells/s" if cells_per_s >= 100 else f"{cells_per_s:.3g} cells/s"


def step(*command: object, **environment: str) -> None:
    """Run one of the project's commands, shown on the console. Raises DataError if it fails.

    environment: defaults, for variables that are not set
    """
    words = [str(word) for word in command]
    print(f"\n$ python {' '.join(words)}", flush=True)
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment | os.environ)
    if ended.returncode:
        raise DataError(f"{words[0]} ended with {ended.returncode}; its error is shown above.")


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

    if here.type == "cuda":
        return torch.cuda.max_memory_allocated(here) / MIB
    return process_mib("VmHWM")


def wait_for(here: torch.device) -> None:
    """Return when a GPU has finished its work."""
    import torch

    if here.type == "cuda":
        torch.cuda.synchronize(here)


def process_mib(name: str) -> float:
    """A size in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(name))
    return int(kib) / 1024
