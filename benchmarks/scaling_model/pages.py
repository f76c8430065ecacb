"""Tables of the scaling model: (head, rows) of text, for the console and for docs/scaling.md."""

from __future__ import annotations

from typing import Any, TypeAlias

from benchmarks.scaling_model.hardware import MODELS
from benchmarks.scaling_model.speed import ESTIMATE

Table: TypeAlias = tuple[list[str], list[list[str]]]

LABELS = {"10m": "10M", "106m": "106M"}
BAR = 1.03
"""Most tokens of a rank over the mean, packed."""


def steps(found: dict[str, Any]) -> Table:
    """The card's layouts, with every term."""
    head = [
        *("GPU", "model", "cells", "nodes x GPUs", "compute, ms", "of it waiting", "all-reduce"),
        *("exposed", "optimizer", "loader", "step, ms", "bound by", "cells/s", "115,430 steps"),
        *("TFLOPS per GPU, padded-eq.", "speed of the GPU"),
    ]
    rows = [
        [
            *_name(row),
            f"{row['nodes']} x 8",
            *(
                _ms(row[term])
                for term in (
                    "compute_s",
                    "waiting_s",
                    "all_reduce_s",
                    "exposed_s",
                    "optimizer_s",
                    "loader_s",
                    "step_s",
                )
            ),
            row["bound"],
            f"{row['cells_per_s']:,.0f}",
            f"{row['hours']:.2f} h",
            f"{row['tflops_padded_equivalent']:.0f}",
            _origin(row),
        ]
        for row in found["rows"]
        if row["nodes"] == MODELS[row["model"]].nodes
    ]
    return head, rows


def nodes(found: dict[str, Any]) -> Table:
    """cells/s against nodes, and how much of linear is left."""
    numbers = sorted({row["nodes"] for row in found["rows"]})
    head = ["GPU", "model", "cells", *(f"{8 * number} GPUs" for number in numbers), "of linear"]
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        lines.setdefault(tuple(_name(row)), []).append(row)
    rows = []
    for name, here in lines.items():
        rates = [row["cells_per_s"] for row in here]
        left = f"{rates[-1] / rates[0] / numbers[-1]:.0%}"
        rows.append([*name, *(f"{rate:,.0f}" for rate in rates), left, _origin(here[0])])
    return [*head, "speed of the GPU"], rows


def balance(found: dict[str, Any]) -> Table:
    """How unlike the work of simulated ranks is."""
    head = [
        *("ranks x cells", "FLOPs of", "deal", "tokens, mean", "tokens, worst step"),
        *("squares, worst", "FLOPs, worst", "factor in the model", "bar, tokens <= 1.03"),
    ]
    rows = []
    for each in found["balance"]:
        for name, title in (("packed", "longest first"), ("dealt", "cell i to rank i % ranks")):
            deal = each[name]
            met = "yes" if deal["tokens_max"] <= BAR else "**no**"
            rows.append(
                [
                    f"{each['ranks']} x {each['cells_per_rank']}",
                    LABELS[each["model"]],
                    title,
                    *(
                        f"{deal[key]:.4f}"
                        for key in (
                            "tokens_mean",
                            "tokens_max",
                            "squares_max",
                            "flops_max",
                            "factor",
                        )
                    ),
                    met if name == "packed" else "-",
                ]
            )
    return head, rows


def feeding(found: dict[str, Any]) -> Table:
    """One rank's loader, beside the step it must keep up with."""
    head = [
        *("one rank of", "places", "lengths", "packing", "whole step, ms", "in the first epoch"),
        *(f"shortest step of these GPUs, ms{_caveat(found)}", "share of it"),
    ]
    rows = []
    for each in found["feeding"]:
        shortest_s = min(
            row["step_s"]
            for row in found["rows"]
            if row["packed"] and row["model"] == each["model"] and row["gpus"] == each["ranks"]
        )
        keys = ("places_s", "lengths_s", "pack_s", "step_s", "first_epoch_s")
        rows.append(
            [
                f"{each['ranks']}, {LABELS[each['model']]}",
                *(f"{each[key] * 1e3:.2f}" for key in keys),
                _ms(shortest_s),
                f"{each['step_s'] / shortest_s:.0%}",
            ]
        )
    return head, rows


def sensitivity(found: dict[str, Any]) -> Table:
    """Milliseconds of a step where one thing is other than assumed; bold: more than 2 % slower."""
    columns = [_name(row) for row in found["sensitivity"][0]["rows"]]
    head = [
        f"step, ms{_caveat(found)}",
        *(f"{gpu} {model} {cells}" for gpu, model, cells in columns),
    ]
    usual = {tuple(_name(row)): row["step_s"] for row in found["sensitivity"][0]["rows"]}
    rows = []
    for each in found["sensitivity"]:
        here = {tuple(_name(row)): row["step_s"] for row in each["rows"]}
        rows.append(
            [each["case"], *(_changed(here.get(tuple(c)), usual[tuple(c)]) for c in columns)]
        )
    return head, rows


def card(found: dict[str, Any]) -> Table:
    """The card's wall clocks and the model's, on the same number of A100."""
    head = [
        f"115,430 steps of 2,048 cells{_caveat(found)}",
        *(_card_name(each) for each in found["card"]),
    ]

    def line(name: str, key: str, form: str, factor: float = 1.0) -> list[str]:
        return [name, *(format(each[key] * factor, form) for each in found["card"])]

    def ours(name: str, key: str) -> list[str]:
        return [
            name,
            *(
                f"{each[key]['hours']:.2f} h, {each['card_hours'] / each[key]['hours']:.1f} x"
                for each in found["card"]
            ),
        ]

    return head, [
        line("card: wall clock, hours", "card_hours", ".1f"),
        line("card: per step, ms", "card_step_s", ",.0f", 1e3),
        line("card: cells/s", "card_cells_per_s", ",.0f"),
        line("card: cells/s per GPU", "card_cells_per_s_per_gpu", ".1f"),
        line("card: TFLOPS per GPU, padded-eq.", "card_tflops_padded_equivalent", ".1f"),
        ours("model at BioNeMo 2's published speed per GPU, padded", "published"),
        ours(f"model, padded{_caveat(found)}", "padded"),
        ours(f"model, packed{_caveat(found)}", "packed"),
    ]


def assumptions(found: dict[str, Any]) -> Table:
    """Every number that is assumed."""
    return (
        ["assumed", "value", "from"],
        [[each["what"], each["value"], each["source"]] for each in found["assumptions"]],
    )


def _name(row: dict[str, Any]) -> list[str]:
    return [row["gpu"], LABELS[row["model"]], "packed" if row["packed"] else "padded"]


def _origin(row: dict[str, Any]) -> str:
    """Measured, or "estimate, not measured"."""
    return str(row["cell_source"]).partition(":")[0]


def _caveat(found: dict[str, Any]) -> str:
    """For a table whose lines are of several GPUs."""
    steps = found.get("rows", [])
    return f" (GPU: {ESTIMATE})" if any(_origin(row) == ESTIMATE for row in steps) else ""


def _card_name(each: dict[str, Any]) -> str:
    return f"{LABELS[each['model']]}, {each['gpus']} A100"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _changed(seconds: float | None, usual: float) -> str:
    if seconds is None:
        return "-"
    return f"**{_ms(seconds)}**" if seconds > 1.02 * usual else _ms(seconds)


TABLES = {
    "scaling_steps": steps,
    "scaling_nodes": nodes,
    "scaling_balance": balance,
    "scaling_feeding": feeding,
    "scaling_sensitivity": sensitivity,
    "scaling_card": card,
    "scaling_assumptions": assumptions,
}
