"""Rows of the loaders' tables: medians over the turns, the table as text, what must be reached."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.all import CONTESTANTS
from benchmarks.peers.contestant import TOKENS
from benchmarks.side_by_side.goals import Goal, best, ratio
from benchmarks.side_by_side.picture import text_table
from benchmarks.side_by_side.versions import version_of

ON_THE_FLY = ("ours_h5ad", "ours_experiment")
SAME_TOKENS = (
    "tokens_soma",
    "tokens_scdataset",
    "tokens_scdataset_workers",
    "tokens_scdataset_arrow",
    "tokens_scdataset_our_store",
)
"""The same tokens in tiledbsoma-ml's or scDataset's way of reading."""

_MEDIANS = ("cells_per_s", "tokens_per_s", "cpu_us_per_cell", "first_batch_s", "peak_mib")
_OF_FIRST = ("shuffle", "before_mib", "cold_start_s", "epochs")

HEAD = (
    *("loader", "peer", "cells/s", "tokens/s", "CPU us/cell", "first batch s", "MiB"),
    *("blocks", "data sets", "distance", "mates again", "each once", "epoch 2 differs"),
)
LEGEND = (
    "blocks, data sets: different blocks of 64 source rows, entropy of data sets in a batch; "
    "distance: in source order, between cells that follow each other; 1 = as a uniform shuffle of "
    "all cells.\nmates again: pairs of cells that share a batch in two epochs, 1 = as by chance. "
    "MiB: peak of the process and its workers, mapped files and imports included."
)


def row(name: str, turns: Sequence[dict[str, Any]], not_measured: str | None) -> dict[str, Any]:
    """One line: medians over the turns, and what the first turn's check found.

    turns: what `turn.take_turn` returned; not_measured: why there are none
    """
    kind = CONTESTANTS[name]
    known = {
        "name": name,
        "label": kind.label,
        "table": kind.table,
        "peer": kind.package and f"{kind.package} {version_of(kind.package)}",
        "not_measured": not_measured,
    }
    if not_measured:
        return known
    medians = {key: statistics.median(turn[key] for turn in turns) for key in _MEDIANS}
    alone = {key: turns[0][key] for key in _OF_FIRST}
    return known | medians | alone | {"runs": [turn["cells_per_s"] for turn in turns]}


def goals_of(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """What must be reached; without a value where a side was not measured."""
    found = {each["name"]: each for each in rows}

    def value(name: str, key: str = "cells_per_s") -> float | None:
        return found.get(name, {}).get(key)

    def best_of(names: Sequence[str]) -> float | None:
        return best([value(name) for name in names])

    counts = [name for name in found if name.startswith("counts_")]
    peers = [*counts, *(name for name in found if name.startswith("tokens_"))]
    complete = [name for name in found if name.startswith("masked_")]
    store, flat = value("ours_store"), value("ours_flat")
    somas = ("counts_soma_dense", "counts_soma_sparse")
    goals = [
        Goal("store / tiledbsoma-ml on counts, dense", ratio(store, value(somas[0])), 15),
        Goal("store / tiledbsoma-ml on counts, at its best", ratio(store, best_of(somas)), 15),
        Goal(
            "store / the same tokens in tiledbsoma-ml's or scDataset's way, best",
            ratio(store, best_of(SAME_TOKENS)),
            5,
        ),
        Goal("store / best peer on counts", ratio(store, best_of(counts)), 1.5),
        Goal("flat copy / best peer of either table", ratio(flat, best_of(peers)), 5),
        Goal("flat copy / best peer with masks, as ours has", ratio(flat, best_of(complete)), 5),
        Goal("store / best peer with masks, as ours has", ratio(store, best_of(complete)), 1),
    ]
    for name in ON_THE_FLY:
        what = f"{CONTESTANTS[name].label} / tiledbsoma-ml with HF-style tokenising"
        goals.append(Goal(what, ratio(value(name), value("soma_tokenised")), 3))
    for name in ("ours_store", "ours_flat", *ON_THE_FLY):
        label = CONTESTANTS[name].label
        peak, first = value(name, "peak_mib"), value(name, "first_batch_s")
        goals.append(Goal(f"{label}: resident memory", peak, 1000, "MiB", at_most=True))
        goals.append(Goal(f"{label}: first batch", first, 2, "s", at_most=True))
    return goals


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, and under them why some were not measured."""
    lines, notes = [], []
    for found in rows:
        name = [found["label"], found["peer"] or "-"]
        if found["not_measured"]:
            lines.append([*name, "not measured", *[""] * (len(HEAD) - 3)])
            notes.append(f"not measured: {found['label']}: {found['not_measured']}")
        else:
            lines.append([*name, *_numbers(found)])
    return "\n".join([text_table(HEAD, lines), *notes])


def _numbers(found: dict[str, Any]) -> list[str]:
    shuffle = found["shuffle"]
    return [
        f"{found['cells_per_s']:,.0f}",
        f"{found['tokens_per_s'] / 1e6:,.1f} M" if found["table"] == TOKENS else "",
        f"{found['cpu_us_per_cell']:,.1f}",
        f"{found['first_batch_s']:.2f}",
        f"{found['peak_mib']:,.0f}",
        *(f"{shuffle[name]:.2f}" for name in ("blocks", "datasets", "distance")),
        f"{shuffle['mates_again']:.1f}",
        *("yes" if shuffle[name] else "NO" for name in ("each_once", "epochs_differ")),
    ]
