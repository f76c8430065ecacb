"""Rows of the loaders' tables: medians over the turns, the table as text, the goals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import common
from benchmarks.harness.common import Goal, best, ratio, text_table
from benchmarks.harness.pages import LOADER_COLUMNS, Column, heads, shown
from benchmarks.harness.peers.contestant import TOKENS
from benchmarks.harness.peers.loaders import CONTESTANTS

ON_THE_FLY = ("ours_h5ad", "ours_experiment")
SOMAS = ("counts_soma_dense", "counts_soma_sparse")
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

COLUMNS: list[Column] = [
    *LOADER_COLUMNS,
    ("tokens/s", lambda r: f"{r['tokens_per_s'] / 1e6:,.1f} M" if r["table"] == TOKENS else ""),
    ("CPU us/cell", lambda row: f"{row['cpu_us_per_cell']:,.1f}"),
    ("data sets", lambda row: f"{row['shuffle']['datasets']:.2f}"),
    ("distance", lambda row: f"{row['shuffle']['distance']:.2f}"),
    ("mates again", lambda row: f"{row['shuffle']['mates_again']:.1f}"),
]
LEGEND = (
    "mixed, data sets: different blocks of 64 source rows, entropy of data sets in a batch; "
    "distance: in source order, between cells that follow each other; 1 = as a uniform shuffle of "
    "all cells.\nmates again: pairs of cells that share a batch in two epochs, 1 = as by chance. "
    "memory: peak of the process and its workers, mapped files and imports included."
)


def row(name: str, turns: Sequence[dict[str, Any]], not_measured: str | None) -> dict[str, Any]:
    """One line: medians over the turns (of `turn.take_turn`), and the first turn's check.

    not_measured: why there are no turns
    """
    kind = CONTESTANTS[name]
    known = common.named(name, kind, not_measured) | {"table": kind.table}
    if not_measured:
        return known
    medians = {key: statistics.median(turn[key] for turn in turns) for key in _MEDIANS}
    alone = {key: turns[0][key] for key in _OF_FIRST}
    return known | medians | alone | {"runs": [turn["cells_per_s"] for turn in turns]}


def goals_of(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Ratios and limits with their bars; without a value where a side was not measured."""
    found = {each["name"]: each for each in rows}

    def value(name: str, key: str = "cells_per_s") -> float | None:
        return found.get(name, {}).get(key)

    def best_of(*prefixes: str) -> float | None:
        return best([value(name) for name in found if name.startswith(prefixes)])

    store, flat, masked = value("ours_store"), value("ours_flat"), best_of("masked_")
    same = best([value(name) for name in SAME_TOKENS])
    either = best_of("counts_", "tokens_")
    ratios = [
        ("store / tiledbsoma-ml on counts, dense", store, value(SOMAS[0]), 15),
        ("store / tiledbsoma-ml on counts, at its best", store, best_of(*SOMAS), 15),
        ("store / the same tokens in tiledbsoma-ml's or scDataset's way, best", store, same, 5),
        ("store / best peer on counts", store, best_of("counts_"), 1.5),
        ("flat copy / best peer of either table", flat, either, 5),
        ("flat copy / best peer with masks, as ours has", flat, masked, 5),
        ("store / best peer with masks, as ours has", store, masked, 1),
    ]
    for name in ON_THE_FLY:
        what = f"{CONTESTANTS[name].label} / tiledbsoma-ml with HF-style tokenising"
        ratios.append((what, value(name), value("soma_tokenised"), 3))
    goals = [Goal(what, ratio(ours, theirs), bar) for what, ours, theirs, bar in ratios]
    for name in ("ours_store", "ours_flat", *ON_THE_FLY):
        label = CONTESTANTS[name].label
        peak, first = value(name, "peak_mib"), value(name, "first_batch_s")
        goals.append(Goal(f"{label}: resident memory", peak, 1000, "MiB", at_most=True))
        goals.append(Goal(f"{label}: first batch", first, 2, "s", at_most=True))
    return goals


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measured rows as text, and under them why others are missing."""
    lines = [shown(COLUMNS, found) for found in rows if not found["not_measured"]]
    notes = [
        f"not measured: {found['label']}: {found['not_measured']}"
        for found in rows
        if found["not_measured"]
    ]
    return "\n".join([text_table(heads(COLUMNS), lines), *notes])
