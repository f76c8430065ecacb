"""The parts of a session on a borrowed machine, each a process with a time budget; the summary.

part -> process, its output in NAME.log -> ended | failed | out of time | not begun -> session.json
DIR/*.json -> tflops_GPU.json (both models), summary.json, text
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.common import Goal, best, ratio
from geneformer_mcore.io import files

ENDED, FAILED, LATE, NOT_BEGUN = "ended", "failed", "out of time", "not begun"
_LEAST_S = 10.0
"""With less time than this left no part is begun: it would not get past its imports."""
_BARS = (
    ("106m", "padded", "tflops_padded_equivalent", 300, "TFLOPS padded-equivalent"),
    ("106m", "padded", "cells_per_s", 170, "cells/s"),
    ("106m", "packed", "cells_per_s", 300, "cells/s"),
    ("10m", "padded", "cells_per_s", 1000, "cells/s"),
)
"""(model, packing, key, least, unit): of one H200, the packed cells of 1,300 tokens on average."""
_OURS, _HF = ("ours_packed", "ours_padded"), ("hf_dynamic", "hf_grouped", "hf_padded")
_TE_CHOSE = re.compile(r"(?:Available|Selected) backends? = .*")


@dataclass(frozen=True)
class Part:
    """One process. budget_s: when it is killed, with all that it has started."""

    name: str
    command: Sequence[str]
    budget_s: float


@dataclass(frozen=True)
class Outcome:
    """The end of a part. code: its exit code, negative for a signal; None if it was not begun."""

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
            outcomes.append(_run(part, out, min(left, part.budget_s)))
        print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", flush=True)
        files.write_json(out / "session.json", {"parts": [asdict(outcome) for outcome in outcomes]})
    return outcomes


def _run(part: Part, out: Path, seconds: float) -> Outcome:
    """One part, killed after `seconds`."""
    began = time.monotonic()
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with (out / f"{part.name}.log").open("w") as log:
        # In a session of its own: what it has started must go with it.
        process = subprocess.Popen(part.command, stdout=log, start_new_session=True, **streams)
        try:
            code = process.wait(seconds)
            state = FAILED if code else ENDED
        except subprocess.TimeoutExpired:
            state = LATE
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return Outcome(part.name, state, code, time.monotonic() - began)


# Summary


def summarise(out: Path) -> str:
    """Write summary.json and the table of both models; the text for the console."""
    rows, skipped = _merged(out)
    goals = list(_goals(rows, out))
    checks = [entry for path in sorted(out.glob("check_*.json")) for entry in _read(path)["checks"]]
    content = {
        "goals": [goal.as_json() for goal in goals],
        "checks": [
            {name: entry[name] for name in entry if name not in ("kernels", "seconds")}
            for entry in checks
        ],
        "te_chose": _te_chose(out),
        "not_measured": skipped,
    }
    files.write_json(out / "summary.json", content)
    parts = _read(out / "session.json")["parts"]
    unfinished = [
        f"{part['name']}: {part['state']} (see {part['name']}.log)"
        for part in parts
        if part["state"] != ENDED
    ]
    return "\n".join([*map(_check_line, checks), *map(str, goals), *unfinished])


def _merged(out: Path) -> tuple[list[dict], list[dict]]:
    """(rows, skipped) of all models, kept together in this GPU's file of results."""
    found = [_read(path) for path in sorted((out / "parts").glob("tflops_*.json"))]
    rows, skipped = ([row for each in found for row in each[key]] for key in ("rows", "skipped"))
    if rows and (out / "machine.json").is_file():
        together = found[0] | {"rows": rows, "skipped": skipped}
        files.write_json(out / _read(out / "machine.json")["tflops_file"], together)
    return rows, skipped


def _goals(rows: Sequence[dict], out: Path) -> Iterator[Goal]:
    for model, packing, key, bar, unit in _BARS:
        values = [row[key] for row in rows if (row["model"], row["packing"]) == (model, packing)]
        yield Goal(f"{model}, {packing}", best(values), bar, unit)
    for path in sorted(out.glob("train_step_*.json")):
        rates = {row["name"]: row.get("cells_per_s") for row in _read(path)["rows"]}
        ours, theirs = (best([rates.get(name) for name in names]) for names in (_OURS, _HF))
        yield Goal(f"{path.stem}: ours / Hugging Face at its best", ratio(ours, theirs), 2)
        layers = ratio(ours, rates.get("te_layers"))
        yield Goal(f"{path.stem}: ours / TE layers in the recipe's style", layers, 1.3)


def _te_chose(out: Path) -> list[str]:
    """Transformer Engine's reports of its choice, each once."""
    path = out / "check_te.log"
    text = path.read_text(errors="replace") if path.is_file() else ""
    return list(dict.fromkeys(_TE_CHOSE.findall(text)))


def _check_line(entry: dict[str, Any]) -> str:
    form = "packed" if entry["packed"] else "padded"
    name = f"{entry['attention']} {entry['precision']} {form}"
    if "reason" in entry:
        word = "FAILED" if entry.get("sound") is False else "not here"
        return f"{name}: {word}: {entry['reason'].splitlines()[0]}"
    off, plain = (entry[key]["gradients"] for key in ("differences", "differences_of_plain"))
    dropped = entry["dropout"]["dropped"]
    word = "sound" if entry["sound"] else "NOT SOUND"
    slowest = entry["kernels"][0]["name"] if entry["kernels"] else "-"
    return (
        f"{name}: {word}, gradients off by {off:.1e} (plain attention: {plain:.1e}), dropped "
        f"{dropped:.3f}; {slowest}"
    )


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
