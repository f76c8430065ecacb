"""The measurements of train_step.py as tables: (head, rows) of text, for docs/speed.md."""

from __future__ import annotations

from typing import Any

HEAD = [
    *("cells", "contestant", "micro batch", "cells/s", "tokens/s", "fill", "memory, MiB"),
    *("TFLOPS, executed", "x Hugging Face, dynamic padding", "x Hugging Face, padded to 2,048"),
]


def rows(name: str, found: dict[str, Any]) -> list[list[str]]:
    """A line per contestant of one file. name: of the cells."""
    return [[name, *_line(row)] for row in found["rows"]]


def _line(row: dict[str, Any]) -> list[str]:
    if row["not_measured"]:
        return [row["label"], f"not measured: {row['not_measured']}", *[""] * 7]
    return [
        row["label"],
        str(row["micro_batch"]),
        f"{row['cells_per_s']:.3g}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['fill']:.0%}",
        f"{row['peak_mib']:,.0f}",
        f"{row['tflops_executed']:.3f}",
        _ratio(row["hf_dynamic_ratio"]),
        _ratio(row["hf_padded_ratio"]),
    ]


def _ratio(found: list[float] | None) -> str:
    if found is None:
        return ""
    median, least, most = found
    return f"**{median:.2f}** ({least:.2f} to {most:.2f})"
