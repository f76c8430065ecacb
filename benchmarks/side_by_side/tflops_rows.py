"""Rows of tflops.py's table: what a setting's steps come to, as numbers and as text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.side_by_side.picture import text_table
from benchmarks.side_by_side.sizes import VOCABULARY
from benchmarks.side_by_side.tflops_cells import Cells
from benchmarks.side_by_side.tflops_grid import Setting
from benchmarks.side_by_side.tflops_steps import Measured, Step
from geneformer_mcore.config import Config
from geneformer_mcore.metrics.meter import Meter
from geneformer_mcore.model.flops import ModelShape
from geneformer_mcore.training.step import Totals

HOW = """
padded-equivalent TFLOPS  cells/s x FLOPs of a cell of {seq_length} tokens, all predicted:
                          comparable with published figures; a unit of throughput
executed TFLOPS           real tokens, predicted positions only, attention within each cell
MFU                       executed TFLOPS / the fastest matrix product of this precision measured
                          here just now ({peaks} TFLOPS)
FLOPs                     3 x [L (8nh^2 + 4nhf) + 4Lhn^2 + 2mh^2 + 2mhV] per cell of n tokens, m
                          predicted, V = 25,429; 2 per multiply-add; recomputation not counted
s/step                    wait for data, forward, backward, clipping and AdamW: the tokens of a
                          mean step x the median time per token of {steps} steps, after {warmup}
                          unmeasured ones. All rates are by it
device s                  the same by events on the GPU, without the wait for data
fill                      real tokens / positions computed on
memory                    peak: on a GPU what torch has allocated, on a CPU the whole process
"""

Row = dict[str, Any]
COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("model", lambda row: row["model"]),
    ("precision", lambda row: row["precision"]),
    ("packing", lambda row: row["packing"]),
    ("attention", lambda row: f"{row['attention']}, {row['attention_dropout']:g}"),
    ("compiled", lambda row: "yes" if row["compiled"] else "no"),
    ("micro batch", lambda row: f"{row['micro_batch']}"),
    ("cells/step", lambda row: f"{row['cells_per_step']}"),
    ("tokens/cell", lambda row: f"{row['tokens_per_cell']:.0f}"),
    ("fill", lambda row: f"{row['fill']:.1%}"),
    ("s/step", lambda row: f"{row['step_s']:.3g}"),
    ("device s", lambda row: "-" if row["device_s"] is None else f"{row['device_s']:.3g}"),
    ("cells/s", lambda row: f"{row['cells_per_s']:,.3g}"),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
    ("TFLOPS padded-eq.", lambda row: f"{row['tflops_padded_equivalent']:.3g}"),
    ("TFLOPS executed", lambda row: f"{row['tflops_executed']:.3g}"),
    ("MFU", lambda row: f"{row['mfu']:.1%}"),
    ("data wait", lambda row: f"{row['data_wait_fraction']:.1%}"),
    ("memory, MiB", lambda row: f"{row['peak_mib']:,.0f}"),
)


def row(
    setting: Setting,
    config: Config,
    cells: Cells,
    attention: str,
    compiled: bool,
    measured: Measured,
    peak: float,
) -> Row:
    """A line of the table.

    attention:  the name of what was chosen, never `auto`
    compiled:   whether elementwise parts are
    peak:       FLOP/s that MFU is a share of
    """
    steps = measured.steps
    totals = sum((step.totals for step in steps), Totals())
    seconds = _typical_s(steps, [step.step_s for step in steps])
    devices = [step.device_s for step in steps if step.device_s is not None]
    num_cells = len(steps) * config.train.global_batch_size
    rates = _rates(config, steps, num_cells, seconds, peak)
    shown = ("cells_per_s", "tokens_per_s", "mfu", "data_wait_fraction", "step_s")
    return {
        **name_of(setting),
        "cells": cells.label,
        "attention": attention,
        "compiled": compiled,
        "attention_dropout": config.model.attention_dropout,
        "cells_per_step": config.train.global_batch_size,
        "seq_length": config.data.seq_length,
        "tokens_per_cell": totals.num_tokens / num_cells,
        "fill": totals.num_tokens / sum(step.positions for step in steps),
        **{name: rates[name] for name in shown},
        **{name: rates[name] for name in rates if name.startswith("tflops")},
        "tflops_peak": peak / 1e12,
        "device_s": _typical_s(steps, devices) / len(steps) if devices else None,
        "peak_mib": measured.peak_mib,
        "step_s_each": [step.step_s for step in steps],
    }


def name_of(setting: Setting) -> Row:
    """What tells a setting from the others; its attention as it was asked for."""
    return {
        "model": setting.model,
        "precision": setting.precision,
        "packing": setting.packing,
        "attention": setting.attention,
        "attention_dropout": setting.dropout,
        "micro_batch": setting.micro_batch,
        "compiled": setting.compiled,
    }


def _typical_s(steps: Sequence[Step], seconds: Sequence[float]) -> float:
    """What all steps together would take, were none slower or faster per token than the median.

    The median, because one slow moment says nothing of the code; per token, because the steps of
    cells of many lengths differ in their work.
    """
    tokens = [step.totals.num_tokens for step in steps]
    per_token = [each / number for each, number in zip(seconds, tokens, strict=True)]
    return sum(tokens) * statistics.median(per_token)


def _rates(
    config: Config, steps: Sequence[Step], num_cells: int, seconds: float, peak: float
) -> dict[str, Any]:
    shape = config.model
    size = ModelShape(shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, VOCABULARY)
    meter = Meter(size, config.data.seq_length, 1, peak)
    totals = sum((step.totals for step in steps), Totals())
    meter.add(
        loss_sum=totals.loss_sum,
        num_predicted=totals.num_predicted,
        cells=num_cells,
        tokens=totals.num_tokens,
        sum_squared_lengths=totals.sum_squared_lengths,
        data_wait_s=len(steps) * statistics.median(step.data_wait_s for step in steps),
        step_s=seconds,
        steps=len(steps),
    )
    return meter.record(step=len(steps), grad_norm=0.0, lr=config.optim.lr)


def line(found: Row) -> str:
    """A row in a few words, while others are still being measured."""
    name = "{model} {precision} {packing}, {attention} attention, micro batch {micro_batch}"
    name += ", compiled" if found["compiled"] else ""
    if "reason" in found:
        return f"{name.format(**found)}: {found['reason']}"
    rates = "{cells_per_s:,.3g} cells/s, {tflops_padded_equivalent:.3g} TFLOPS padded-equivalent"
    return f"{name.format(**found)}: {rates.format(**found)}, MFU {found['mfu']:.1%}"


def table(rows: Sequence[Row], skipped: Sequence[Row]) -> str:
    """The rows as text, and under them why others are missing."""
    lines = [[show(found) for _, show in COLUMNS] for found in rows]
    text = text_table([name for name, _ in COLUMNS], lines)
    cells = dict.fromkeys(found["cells"] for found in rows)
    notes = [f"cells: {'; '.join(cells)}"] if rows else []
    notes += [f"not measured: {line(found)}" for found in skipped]
    return "\n".join([text, "", *notes])
