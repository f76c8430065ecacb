#!/usr/bin/env python
"""Rate of shuffled batches of 64 cells, compared with the loaders a user would pick.

    python benchmarks/loader.py --work DIR                              made-up cells
    python benchmarks/loader.py --work DIR --medians m.json a.h5ad ...  cells drawn from these

Two tables: raw counts out, and padded batches of the same tokens. Each contestant reads the same
cells in a format of its own, which is made in DIR once. All take turns, several times, each turn in
a process of its own: open, read whole epochs for eight seconds or more, page cache warm; the first
turn checks every cell by its sum. Peers come with the extra [bench] (pip install -c
requirements.lock -e ".[bench]"); one that is not there, or fails, is listed as not measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import common
from benchmarks.harness.common import goal
from benchmarks.harness.pages import LOADER_COLUMNS, table
from benchmarks.harness.peers.contestant import BATCH_SIZE, COUNTS, TOKENS, Contestant
from benchmarks.harness.peers.loaders import CONTESTANTS
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import run

TITLES = {COUNTS: "raw counts out", TOKENS: "padded batches of tokens out"}
TIMEOUT_S = 1800
ON_THE_FLY = ("ours_h5ad", "ours_experiment")
SOMAS = ("counts_soma_dense", "counts_soma_sparse")
SAME_TOKENS = (
    *("tokens_soma", "tokens_scdataset", "tokens_scdataset_workers", "tokens_scdataset_arrow"),
    "tokens_scdataset_our_store",
)
"""The same tokens in tiledbsoma-ml's or scDataset's way of reading."""


def main() -> int:
    """Prepare, let all take turns, print the tables; or, called by itself, take one turn."""
    arguments = _arguments()
    arguments.work = arguments.work.resolve()
    if arguments.turn or arguments.prepare:
        return _child(arguments)
    problems = common.too_small(arguments, runs=1, cells=BATCH_SIZE)
    problems += common.unknown_names("--only", arguments.only, CONTESTANTS)
    common.refuse(problems, (arguments.json, arguments.png, arguments.work / "about.json"))
    chosen = {name: CONTESTANTS[name] for name in arguments.only or CONTESTANTS}
    about = _make_cells(arguments)
    failures = _prepare(arguments.work, chosen)

    def turn(name: str, number: int) -> tuple[dict[str, Any], str]:
        words = ["--turn", name, *(["--check"] if number == 0 else [])]
        return common.child(__file__, arguments.work, TIMEOUT_S, *words)

    labels = {name: kind.label for name, kind in chosen.items()}
    turns = common.in_rounds(
        turn, labels, arguments.runs, failures, lambda found: found["cells_per_s"]
    )
    rows = [row(name, turns[name], failures.get(name)) for name in chosen]
    goals = goals_of(rows)
    for kind, title in TITLES.items():
        these = [found for found in rows if found["table"] == kind]
        print(f"\n{title}\n{table(LOADER_COLUMNS, these, (), 2)}")
    print("", *map(common.goal_text, goals), sep="\n")
    content = {"rows": rows, "goals": goals, "runs": arguments.runs} | about
    common.save_results(arguments.json, content)
    if arguments.png:
        save_bars(arguments.png, rows, f"{about['cells']:,} cells, page cache warm")
    return 0


def _make_cells(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw the cells, unless they are there. Raises ConfigError if others are."""
    from benchmarks.harness.loader_cells import draw, write

    wanted = {
        "cells": arguments.cells // BATCH_SIZE * BATCH_SIZE,
        "data": [path.name for path in arguments.files] or "made up",
        "medians": arguments.medians.name if arguments.medians else "of the cells",
    }
    about = arguments.work / "about.json"
    if about.exists():
        found = json.loads(about.read_text())
        if found.items() >= wanted.items():
            return found
        raise ConfigError(
            f"{arguments.work} holds other cells ({found['cells']:,} of {found['data']}). Name "
            "another folder with --work, or empty this one."
        )
    print(f"drawing {wanted['cells']:,} cells", flush=True)
    cells, few = draw(arguments.files, arguments.medians, wanted["cells"], seed=0)
    write(few, arguments.work / "few")
    data = write(cells, arguments.work / "all")
    wanted |= {
        "genes": len(cells.gene_ids),
        "nonzeros_per_cell": cells.counts.nnz / len(cells),
        "tokens_per_cell": float(data.num_tokens_N.mean()),
    }
    about.write_text(json.dumps(wanted))
    return wanted


def _prepare(work: Path, chosen: dict[str, type[Contestant]]) -> dict[str, str]:
    """Make the formats that are not there; {contestant: why it cannot be measured}."""
    failures = common.not_installed(chosen)
    for name, kind in chosen.items():
        marks = [work / "all" / f"{make.__name__}.made" for make in kind.formats]
        if name not in failures and not all(mark.exists() for mark in marks):
            print(f"{kind.label}: making its files", flush=True)
            _, failures[name] = common.child(__file__, work, TIMEOUT_S, "--prepare", name)
    return {name: why for name, why in failures.items() if why}


def _child(arguments: argparse.Namespace) -> int:
    from benchmarks.harness.loader_cells import Prepared
    from benchmarks.harness.loader_turn import take_turn

    few, data = (Prepared(arguments.work / name) for name in ("few", "all"))
    if arguments.turn:
        found = take_turn(CONTESTANTS[arguments.turn], data, few, with_check=arguments.check)
        (arguments.work / common.TURN).write_text(json.dumps(found))
        return 0
    for make in CONTESTANTS[arguments.prepare].formats:
        for each in (few, data):
            mark, place = each.folder / f"{make.__name__}.made", each.place(make.__name__)
            if not mark.exists():
                shutil.rmtree(place, ignore_errors=True)  # left by a run that was killed
                place.unlink(missing_ok=True)
                make(each)
                mark.touch()
    return 0


# Numbers


def row(name: str, turns: Sequence[dict[str, Any]], not_measured: str | None) -> dict[str, Any]:
    """One line: medians over the turns (of `take_turn`), and the first turn's check.

    not_measured: why there are no turns
    """
    kind = CONTESTANTS[name]
    known = common.named(name, kind, not_measured) | {"table": kind.table}
    if not_measured:
        return known
    chosen = ("cells_per_s", "cpu_us_per_cell", "first_batch_s", "peak_mib")
    medians = {key: statistics.median(turn[key] for turn in turns) for key in chosen}
    return known | turns[0] | medians | {"runs": [turn["cells_per_s"] for turn in turns]}


def goals_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios and limits with their bars; without a value where a side was not measured."""
    found = {each["name"]: each for each in rows}

    def value(name: str, key: str = "cells_per_s") -> float | None:
        return found.get(name, {}).get(key)

    def best(*prefixes: str) -> float | None:
        rates = [value(name) for name in found if name.startswith(prefixes)]
        return max((rate for rate in rates if rate is not None), default=None)

    store, flat, masked = value("ours_store"), value("ours_flat"), best("masked_")
    same = max(filter(None, map(value, SAME_TOKENS)), default=None)
    ratios = [
        ("store / tiledbsoma-ml on counts, dense", store, value(SOMAS[0]), 15),
        ("store / tiledbsoma-ml on counts, at its best", store, best(*SOMAS), 15),
        ("store / the same tokens in tiledbsoma-ml's or scDataset's way, best", store, same, 5),
        ("store / best peer on counts", store, best("counts_"), 1.5),
        ("flat copy / best peer of either table", flat, best("counts_", "tokens_"), 5),
        ("flat copy / best peer with masks, as ours has", flat, masked, 5),
        ("store / best peer with masks, as ours has", store, masked, 1),
    ]
    for name in ON_THE_FLY:
        what = f"{CONTESTANTS[name].label} / tiledbsoma-ml with HF-style tokenising"
        ratios.append((what, value(name), value("soma_tokenised"), 3))
    goals = [
        goal(what, ours / theirs if ours and theirs else None, bar)
        for what, ours, theirs, bar in ratios
    ]
    for name in ("ours_store", "ours_flat", *ON_THE_FLY):
        label = CONTESTANTS[name].label
        memory, first = value(name, "peak_mib"), value(name, "first_batch_s")
        goals.append(goal(f"{label}: resident memory", memory, 1000, "MiB", at_most=True))
        goals.append(goal(f"{label}: first batch", first, 2, "s", at_most=True))
    return goals


def save_bars(path: Path, rows: Sequence[dict[str, Any]], about: str) -> None:
    """Draw cells/s as horizontal bars on a log scale, a panel per table."""
    from geneformer_mcore.metrics.provenance import machine
    from geneformer_mcore.report.figures import new_figure

    kept = [each for each in rows if not each["not_measured"]]
    figure = new_figure(9, 0.32 * (len(kept) + 5))
    panels = figure.subplots(len(TITLES))
    for axes, (kind, title) in zip(panels, TITLES.items(), strict=True):
        bars = [each for each in kept if each["table"] == kind]
        bars.sort(key=lambda each: each["cells_per_s"])
        rates = [each["cells_per_s"] for each in bars]
        colours = ["#9aa5b1" if each["peer"] else "#1f6f5c" for each in bars]
        drawn = axes.barh([each["label"] for each in bars], rates, color=colours)
        axes.bar_label(drawn, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axes.set_title(f"{title}, batches of {BATCH_SIZE}", loc="left", fontsize=10)
        axes.set_xscale("log")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("cells/s", fontsize=9)
    figure.supxlabel(f"{machine()}; {about}", x=0.01, ha="left", fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def _arguments() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE.h5ad", help="default: made-up cells")
    add("--work", type=Path, required=True, metavar="DIR", help="where the formats are made")
    add("--cells", type=int, default=50_048, help="drawn with replacement (default: 50,048)")
    add("--runs", type=int, default=5, help="turns of each (default: 5)")
    add("--medians", type=Path, help="{gene id: median} of the vocabulary of these files")
    add("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(CONTESTANTS)}")
    add("--json", type=Path, metavar="OUT", help="write the rows here too")
    add("--png", type=Path, metavar="OUT", help="draw the rates here (.png, .svg)")
    add("--turn", help=argparse.SUPPRESS)
    add("--prepare", help=argparse.SUPPRESS)
    add("--check", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
