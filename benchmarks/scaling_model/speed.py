"""Seconds per cell of a GPU: measured, where benchmarks/results holds it, else estimated, and said.

results/tflops_*.json of that GPU  ->  full cells per second, dropout and all
none                               ->  the estimates of hardware.py, marked as such
full cells -> real ones            ->  by executed FLOPs
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scaling_model.hardware import GPUS, SEQ_LENGTH, Model
from geneformer_mcore.errors import DataError

ESTIMATE = "estimate, not measured"


@dataclass(frozen=True)
class Speed:
    """Full cells per second of one GPU, and where that is from."""

    cells_per_s: float
    source: str


def speed(gpu: str, model: Model, results: Path) -> Speed:
    """Of benchmarks/tflops.py on that GPU: full cells, bf16, with attention dropout, at the micro
    batch next to the card's. What was measured includes AdamW on one GPU, which the model of a step
    adds once more: at most two milliseconds too many."""
    found = [
        (abs(row["micro_batch"] - model.micro_batch), -row["cells_per_s"], name)
        for name, row in _rows(gpu, results)
        if row["model"] == model.name
        and row["precision"] == "bf16"
        and row["attention_dropout"] > 0
        and row["tokens_per_cell"] == row["seq_length"] == SEQ_LENGTH
    ]
    if found:
        _, minus_rate, name = min(found)
        return Speed(-minus_rate, f"measured: {name}")
    card = GPUS[gpu]
    return Speed(card.cells_per_s[model.name], f"{ESTIMATE}: {card.origin[model.name]}")


def _rows(gpu: str, results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, row) of every measurement on that GPU."""
    for path in sorted(results.glob("tflops_*.json")):
        try:
            content = json.loads(path.read_text())
            machine, rows = content["machine"], content["rows"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path.name} is no result of benchmarks/tflops.py.") from None
        if gpu in machine:
            yield from ((path.name, row) for row in rows)


MEASURED_CORES = 2
"""Cores of the machine that benchmarks/loader.py ran on: one process with two threads at work."""


@dataclass(frozen=True)
class LoaderRate:
    """Cells per second of one process on MEASURED_CORES cores, and where that is from."""

    cells_per_s: float
    source: str

    def on_cores(self, cores: float) -> float:
        """Cells per second with so many cores: in proportion, up to as many as were used."""
        return self.cells_per_s * min(cores, MEASURED_CORES) / MEASURED_CORES


def flat_rate(results: Path) -> LoaderRate:
    """From a flat copy of a store."""
    return _loader_rate(results, "ours_flat")


def store_rate(results: Path) -> LoaderRate:
    """From the SOMA store itself."""
    return _loader_rate(results, "ours_store")


def _loader_rate(results: Path, name: str) -> LoaderRate:
    """Raises DataError if it was not measured."""
    path = results / "loader.json"
    try:
        content = json.loads(path.read_text())
        (row,) = (row for row in content["rows"] if row["name"] == name)
        return LoaderRate(float(row["cells_per_s"]), f"measured: {path.name}")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} has no rate of {name}. Remedy: python benchmarks/loader.py --work DIR --json "
            f"{path}"
        ) from None
