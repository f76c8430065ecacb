"""What a session has found, in one file and on one screen: checks, bars, and what did not run.

DIR/*.json -> tflops_GPU.json (both models), summary.json, text
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.side_by_side.goals import Goal, best, ratio
from geneformer_mcore.io.files import write_json

_BARS = (
    ("106m", "padded", "tflops_padded_equivalent", 300, "TFLOPS padded-equivalent"),
    ("106m", "padded", "cells_per_s", 170, "cells/s"),
    ("106m", "packed", "cells_per_s", 300, "cells/s"),
    ("10m", "padded", "cells_per_s", 1000, "cells/s"),
)
"""(model, packing, what, least, unit): of one H200, the packed cells of 1,300 tokens on average."""
_OURS, _HF = ("ours_packed", "ours_padded"), ("hf_dynamic", "hf_grouped", "hf_padded")
_TE_CHOSE = re.compile(r"(?:Available|Selected) backends? = .*")


def write(out: Path) -> str:
    """Writes summary.json and the table of both models; what is to be read on a screen."""
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
    write_json(out / "summary.json", content)
    lines = [*map(_check_line, checks), *map(str, goals), *_told(out)]
    return "\n".join(lines)


def _merged(out: Path) -> tuple[list[dict], list[dict]]:
    """Rows of all models, and what was left out; kept together in this GPU's file of results."""
    found = [_read(path) for path in sorted((out / "parts").glob("tflops_*.json"))]
    rows = [row for each in found for row in each["rows"]]
    skipped = [row for each in found for row in each["skipped"]]
    if rows and (out / "machine.json").is_file():
        together = found[0] | {"rows": rows, "skipped": skipped}
        write_json(out / _read(out / "machine.json")["tflops_file"], together)
    return rows, skipped


def _goals(rows: Sequence[dict], out: Path) -> Iterator[Goal]:
    for model, packing, what, bar, unit in _BARS:
        values = [row[what] for row in rows if (row["model"], row["packing"]) == (model, packing)]
        yield Goal(f"{model}, {packing}", best(values), bar, unit)
    for path in sorted(out.glob("train_step_*.json")):
        rates = {row["name"]: row.get("cells_per_s") for row in _read(path)["rows"]}
        ours = best([rates.get(name) for name in _OURS])
        theirs = best([rates.get(name) for name in _HF])
        yield Goal(f"{path.stem}: ours / Hugging Face at its best", ratio(ours, theirs), 2)
        layers = ratio(ours, rates.get("te_layers"))
        yield Goal(f"{path.stem}: ours / TE layers in the recipe's style", layers, 1.3)


def _te_chose(out: Path) -> list[str]:
    """What Transformer Engine has said of its choice, each once."""
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


def _told(out: Path) -> list[str]:
    parts = _read(out / "session.json")["parts"]
    return [
        f"{part['name']}: {part['state']} (see {part['name']}.log)"
        for part in parts
        if part["state"] != "ended"
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
