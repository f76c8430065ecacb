"""The table of results/perturb.json of benchmarks/perturb.py, and under it how it is to be read."""

from __future__ import annotations

from pathlib import Path

from benchmarks.side_by_side.page_text import NOT_MEASURED, markdown, number, read

RATES = {"variants_per_s": "wall clock", "variants_per_cpu_s": "CPU"}


def table(results: Path) -> str:
    """A row per way; below, each goal by either clock and what else bears on it."""
    found = read(results / "perturb.json")
    head = ["10M model, one thread", "variants/s", "variants per CPU second"]
    head += [f"ours is, {name}" for name in [*RATES.values(), "operations"]]
    if not found:
        return markdown(head, [[NOT_MEASURED, *[""] * 5]], [None])
    ours, rows = found["rows"][0], []
    for row in found["rows"]:
        times = [ours[rate] / row[rate] for rate in RATES]
        times.append(row["flops_per_variant"] / ours["flops_per_variant"])
        numbers = [number(row[rate], ".3g") for rate in RATES]
        rows.append([row["name"], *numbers, *(f"{ratio:.2f} x" for ratio in times)])
    reading = "\n".join(f"- {line}" for line in found["reading"])
    return f"{markdown(head, rows, [found])}\n\n{reading}"
