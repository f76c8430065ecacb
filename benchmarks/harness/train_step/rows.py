"""Rows of train_step.py's table: medians over the rounds, ratios round by round, as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.common import named, text_table
from benchmarks.harness.pages import STEP_COLUMNS, Column, heads, shown
from benchmarks.harness.peers.steps import HF_DYNAMIC, HF_PADDED
from geneformer_mcore.model.flops import ModelShape, Workload, executed_flops

LEGEND = """
cells/s, tokens/s  medians of the rounds; [CLS] counts as a token, padding does not
TFLOPS, executed   real tokens, predicted positions only, attention within each cell: what the
                   cells need, the same for all, over the time
TFLOPS, computed   the same formula over what was computed on: padding and unused predictions too
fill               real tokens / positions computed on
memory             peak of weights, gradients, moments and activations
first loss         nats per predicted gene before any update: ln(vocabulary) for fresh weights
x Hugging Face     cells/s over those of that contestant in the same round: median (least to most)
"""
_AGAINST = {"hf_dynamic_ratio": HF_DYNAMIC, "hf_padded_ratio": HF_PADDED}
COLUMNS: list[Column] = [
    *STEP_COLUMNS,
    ("TFLOPS, computed", lambda row: f"{row['tflops_computed']:.3g}"),
    ("first loss", lambda row: f"{row['first_loss']:.4f}"),
]


def row(
    name: str,
    kind: Any,
    turns: Sequence[dict[str, Any]],
    micro_batch: int,
    tuning: dict[int, float | str],
    not_measured: str,
    shape: ModelShape,
) -> dict[str, Any]:
    """One line: medians over the rounds.

    turns:         results of `turn.take_turn` with micro batches of micro_batch cells
    tuning:        {micro batch: cells/s, or why there is none} of those that were tried
    not_measured:  why there are no turns
    """
    known = named(name, kind, not_measured)
    known["tuning"] = {str(micro): found for micro, found in tuning.items()}
    if not_measured:
        return known
    return {
        **known,
        "about": turns[0]["about"],
        "micro_batch": micro_batch,
        "rounds": [rate(turn) for turn in turns],
        "step_s": [turn["seconds"] for turn in turns],
        "first_loss": turns[0]["losses"][0],
        "losses": turns[0]["losses"],
        "peak_mib": statistics.median(turn["peak_mib"] for turn in turns),
        **_rates(turns, shape),
    }


def rate(turn: dict[str, Any]) -> float:
    """Cells per second of a turn."""
    return turn["cells"] / sum(turn["seconds"])


def _rates(turns: Sequence[dict[str, Any]], shape: ModelShape) -> dict[str, float]:
    # Every round has the same cells.
    needed, computed = Workload(**turns[0]["needed"]), Workload(**turns[0]["computed"])
    cells_per_s = statistics.median(rate(turn) for turn in turns)
    seconds = turns[0]["cells"] / cells_per_s
    return {
        "cells_per_s": cells_per_s,
        "tokens_per_s": needed.tokens / seconds,
        "tflops_executed": executed_flops(shape, needed) / seconds / 1e12,
        "tflops_computed": executed_flops(shape, computed) / seconds / 1e12,
        "fill": needed.tokens / computed.tokens,
    }


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add the ratios to the two of Hugging Face to every measured row: [median, least, most], or
    None where that one was not measured."""
    rounds = {found["name"]: found.get("rounds") for found in rows}
    for found in rows:
        if not found["not_measured"]:
            for key, other in _AGAINST.items():
                found[key] = _ratios(found["rounds"], rounds.get(other))


def _ratios(mine: Sequence[float], theirs: Sequence[float] | None) -> list[float] | None:
    """Of one round each, since a machine's speed changes from round to round."""
    if not theirs:
        return None
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, and under them how each was set and why some were not measured."""
    lines = [shown(COLUMNS, found) for found in rows if not found["not_measured"]]
    notes = [
        f"skipped: {found['label']}: {found['not_measured']}"
        if found["not_measured"]
        else f"{found['label']}: {found['peer'] or 'this project'}; {found['about']}"
        for found in rows
    ]
    return "\n".join([text_table(heads(COLUMNS), lines), "", *notes])
