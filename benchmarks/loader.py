#!/usr/bin/env python
"""How fast cells come, shuffled, in batches of 64, beside the loaders a user would pick.

    python benchmarks/loader.py --work DIR                              made-up cells
    python benchmarks/loader.py --work DIR --medians m.json a.h5ad ...  cells drawn from these

Two tables: raw counts out, and padded batches of the same tokens. Each contestant reads the same
cells in a format of its own, which is made in DIR once. All take turns, several times, each turn in
a process of its own: open, read whole epochs for eight seconds or more. The page cache is warm.
Cells are checked by their sums in one more epoch of the first turn. Peers come with

    pip install -c requirements.lock -e ".[bench]"

in an environment of their own, if ours is to stay as requirements.lock has it. A peer that is not
there, or fails, is listed as not measured. annbatch needs Python 3.12 and is not among them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where tokenize.py hides Python's own: the project.
    sys.path.remove(sys.path[0])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import shutil
import subprocess
from typing import Any

from benchmarks.peers.all import CONTESTANTS
from benchmarks.peers.contestant import BATCH_SIZE, COUNTS, TOKENS, Contestant
from benchmarks.side_by_side.goals import Goal
from benchmarks.side_by_side.loader_rows import LEGEND, goals_of, row, table
from benchmarks.side_by_side.picture import save_bars
from benchmarks.side_by_side.versions import NOT_INSTALLED, version_of
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io.files import check_output, write_json

TITLES = {COUNTS: "raw counts out", TOKENS: "padded batches of tokens out"}
TIMEOUT_S = 1800
_RESULT = "turn.json"


def main() -> int:
    """Prepares, lets all take turns, prints the tables; or, called by itself, takes one turn."""
    arguments = _arguments()
    if arguments.turn or arguments.prepare:
        return _child(arguments)
    check(arguments)
    chosen = {name: CONTESTANTS[name] for name in arguments.only or CONTESTANTS}
    failures = _prepare(arguments, chosen)
    turns = _all_turns(arguments, chosen, failures)
    rows = [row(name, turns[name], failures.get(name)) for name in chosen]
    goals = goals_of(rows)
    about = json.loads((arguments.work / "about.json").read_text())
    for title in TITLES:
        print(f"\n{TITLES[title]}\n{table([found for found in rows if found['table'] == title])}")
    print(f"\n{_conditions(about, arguments.runs)}\n")
    print("\n".join(map(str, goals)))
    _save(arguments, rows, goals, about)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError that names every argument by which nothing can be measured."""
    problems = []
    if arguments.runs < 1:
        problems.append(f"--runs must be at least 1, and is {arguments.runs}.")
    if arguments.cells < BATCH_SIZE:
        problems.append(f"--cells must be at least {BATCH_SIZE}, and is {arguments.cells}.")
    unknown = sorted(set(arguments.only or ()) - set(CONTESTANTS))
    if unknown:
        problems.append(f"--only: no {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}.")
    if problems:
        raise ConfigError("\n".join(problems))
    for path in (arguments.json, arguments.png, arguments.work / "about.json"):
        if path:
            check_output(path, overwrite=True)


def _prepare(arguments: argparse.Namespace, chosen: dict[str, type[Contestant]]) -> dict[str, str]:
    """Makes what is not there; {contestant: why it cannot be measured}."""
    wanted = {
        "cells": arguments.cells // BATCH_SIZE * BATCH_SIZE,
        "data": [path.name for path in arguments.files] or "made up",
        "medians": arguments.medians.name if arguments.medians else "of the cells",
    }
    _make_cells(arguments, wanted)
    failures: dict[str, str] = {}
    for name, kind in chosen.items():
        if kind.package and version_of(kind.package) == NOT_INSTALLED:
            failures[name] = f"{kind.package} is {NOT_INSTALLED}"
            continue
        for number, make in enumerate(kind.formats):
            if (arguments.work / "all" / f"{make.__name__}.made").exists():
                continue
            print(f"{kind.label}: making {make.__name__}", flush=True)
            why = _call(arguments, "--prepare", f"{name}:{number}")
            if why:
                failures[name] = why
                break
    return failures


def _make_cells(arguments: argparse.Namespace, wanted: dict[str, Any]) -> None:
    from benchmarks.side_by_side.cells import draw
    from benchmarks.side_by_side.prepared import write

    about = arguments.work / "about.json"
    if about.exists():
        found = json.loads(about.read_text())
        if all(found[key] == wanted[key] for key in wanted):
            return
        raise ConfigError(
            f"{arguments.work} holds other cells ({found['cells']:,} of {found['data']}). Name "
            "another folder with --work, or empty this one."
        )
    print(f"drawing {wanted['cells']:,} cells", flush=True)
    cells, few = draw(arguments.files, arguments.medians, wanted["cells"], seed=0)
    write(few, arguments.work / "few")
    data = write(cells, arguments.work / "all")
    numbers = {
        "genes": len(cells.gene_ids),
        "nonzeros_per_cell": cells.counts.nnz / len(cells),
        "tokens_per_cell": float(data.truth.num_tokens_N.mean()),
    }
    about.write_text(json.dumps(wanted | numbers))


def _all_turns(
    arguments: argparse.Namespace, chosen: dict[str, type[Contestant]], failures: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """A, B, C, A, B, C, ...; who fails once takes no further turn."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for number in range(arguments.runs):
        for name in chosen:
            if name in failures:
                continue
            why = _call(arguments, "--turn", name, *(["--check"] if number == 0 else []))
            if why:
                failures[name] = why
                continue
            turns[name].append(json.loads((arguments.work / _RESULT).read_text()))
            rate = turns[name][-1]["cells_per_s"]
            print(f"round {number + 1}: {chosen[name].label}: {rate:,.0f} cells/s", flush=True)
    return turns


def _call(arguments: argparse.Namespace, *words: str) -> str:
    """Runs this script with `words`; why it failed, or nothing."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", str(arguments.work), *words]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT_S} s"
    if ended.returncode == 0:
        return ""
    lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
    return lines[-1].replace(str(arguments.work), "DIR")


def _child(arguments: argparse.Namespace) -> int:
    from benchmarks.side_by_side.prepared import Prepared

    few, data = (Prepared(arguments.work / name) for name in ("few", "all"))
    if arguments.prepare:
        name, _, number = arguments.prepare.partition(":")
        make = CONTESTANTS[name].formats[int(number)]
        for each in (few, data):
            mark = each.folder / f"{make.__name__}.made"
            if not mark.exists():
                _remove(each.place(make.__name__))  # what a run that was killed has left
                make(each)
                mark.touch()
        return 0
    from benchmarks.side_by_side.turn import take_turn

    found = take_turn(CONTESTANTS[arguments.turn], data, few, with_check=arguments.check)
    (arguments.work / _RESULT).write_text(json.dumps(found))
    return 0


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _conditions(about: dict[str, Any], runs: int) -> str:
    return (
        f"{about['cells']:,} cells x {about['genes']:,} genes, {about['nonzeros_per_cell']:,.0f} "
        f"non-zeros and {about['tokens_per_cell']:,.0f} tokens per cell; batches of {BATCH_SIZE}; "
        f"whole epochs for 8 s or more, opening included, median of {runs} turns; local files, "
        f"page cache warm.\n{LEGEND}"
    )


def _save(
    arguments: argparse.Namespace,
    rows: list[dict[str, Any]],
    goals: list[Goal],
    about: dict[str, Any],
) -> None:
    from geneformer_mcore.metrics.provenance import provenance

    where = provenance()
    if arguments.json:
        content = {
            "rows": rows,
            "goals": [goal.as_json() for goal in goals],
            "conditions": _conditions(about, arguments.runs),
            "runs": arguments.runs,
        }
        write_json(arguments.json, content | about | where)
    if arguments.png:
        panels = {
            f"{TITLES[title]}, batches of {BATCH_SIZE}": [
                (found["label"], found["cells_per_s"], not found["peer"])
                for found in rows
                if found["table"] == title and not found["not_measured"]
            ]
            for title in TITLES
        }
        footer = f"{where['machine']}; {about['cells']:,} cells, page cache warm"
        panels = {title: bars for title, bars in panels.items() if bars}
        save_bars(arguments.png, panels, "cells/s", footer)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE.h5ad", help="default: made-up cells")
    add("--work", type=Path, required=True, metavar="DIR", help="where the formats are made")
    add("--cells", type=int, default=50_048, help="drawn with replacement (default: 50,048)")
    add("--runs", type=int, default=5, help="turns of each (default: 5)")
    add("--medians", type=Path, help="{gene id: median} of the vocabulary; default: the cells'")
    add("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(CONTESTANTS)}")
    add("--json", type=Path, metavar="OUT", help="write the rows here too")
    add("--png", type=Path, metavar="OUT", help="draw the rates here (.png, .svg)")
    add("--turn", help=argparse.SUPPRESS)
    add("--prepare", help=argparse.SUPPRESS)
    add("--check", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
