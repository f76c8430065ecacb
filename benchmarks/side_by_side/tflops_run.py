"""All rows of tflops.py, one after the other: measured, or left out with the reason.

settings -> possible here? -> steps, or out of memory -> row -> kept at once
"""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import tflops_rows
from benchmarks.side_by_side.sizes import VOCABULARY
from benchmarks.side_by_side.tflops_cells import Cells, made_up
from benchmarks.side_by_side.tflops_grid import Setting, config_of, why_not
from benchmarks.side_by_side.tflops_steps import measure
from geneformer_mcore.config import Config
from geneformer_mcore.errors import ConfigError, GeneformerError
from geneformer_mcore.io.files import write_json
from geneformer_mcore.metrics.peak_flops import measured_peak
from geneformer_mcore.metrics.provenance import machine, provenance
from geneformer_mcore.model import fused, megatron_config
from geneformer_mcore.model.attention import select


@dataclass(frozen=True)
class Conditions:
    """What holds for every row.

    flat:      cells of a flat copy; None: made-up ones, as each setting says
    seconds:   no row is begun later than this after the first; None: all are
    out:       file that is kept up to date; None: none
    """

    seq_length: int
    num_micro_batches: int
    steps: int
    warmup: int
    flat: Cells | None = None
    seconds: float | None = None
    out: Path | None = None

    def config(self, setting: Setting) -> Config:
        """All settings of a row. Raises ConfigError for what no run can have."""
        mean = self.flat.mean_tokens if self.flat else setting.mean_length or self.seq_length
        return config_of(setting, self.seq_length, mean, self.num_micro_batches)

    def cells(self, setting: Setting) -> Cells:
        """What a row is trained on."""
        return self.flat or made_up(setting.mean_length, self.seq_length, VOCABULARY)


@dataclass
class Results:
    """What there is so far. failed: some row raised what is no fault of the user's."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    failed: bool = False


def possible(
    asked: Sequence[Setting], conditions: Conditions, here: torch.device
) -> tuple[dict[Setting, Config], dict[Setting, str]]:
    """Settings that can be measured here, and the reasons of the others. Raises ConfigError with
    every reason if none can."""
    configs, reasons = {}, {}
    for setting in asked:
        try:
            config = conditions.config(setting)
        except ConfigError as error:
            reasons[setting] = str(error)
            continue
        reason = why_not(config, here)
        if reason:
            reasons[setting] = reason
        else:
            configs[setting] = config
    if not configs:
        raise ConfigError("\n".join(dict.fromkeys(reasons.values())))
    return configs, reasons


def measure_all(asked: Sequence[Setting], conditions: Conditions, here: torch.device) -> Results:
    """Every row in turn, printed and kept as soon as it is there. The process groups must be
    there. Raises ConfigError if no row can be measured."""
    configs, reasons = possible(asked, conditions, here)
    results, began = Results(), time.monotonic()
    for setting in asked:
        reason = reasons.get(setting, "")
        if not reason and conditions.seconds is not None:
            over = time.monotonic() - began > conditions.seconds
            reason = f"not begun within {conditions.seconds:g} s" if over else ""
        if not reason:
            reason = _measured(setting, configs[setting], conditions, here, results)
            _free(here)
        if reason:
            results.skipped.append(tflops_rows.name_of(setting) | {"reason": reason})
        print(tflops_rows.line((results.skipped if reason else results.rows)[-1]), flush=True)
        save(results, conditions)
    return results


def _measured(
    setting: Setting, config: Config, conditions: Conditions, here: torch.device, results: Results
) -> str:
    """Adds a row to `results`, or returns why there is none."""
    try:
        results.rows.append(_row(setting, config, conditions, here, results.peaks))
        return ""
    except torch.OutOfMemoryError:
        return "out of memory"
    except GeneformerError as error:
        return str(error)
    except Exception as error:  # the other rows are worth having all the same
        traceback.print_exc()
        results.failed = True
        return f"{type(error).__name__}: {_first_line(error)}"


def _free(here: torch.device) -> None:
    """The next model must find all memory."""
    gc.collect()
    if here.type == "cuda":
        torch.cuda.empty_cache()


def _row(
    setting: Setting,
    config: Config,
    conditions: Conditions,
    here: torch.device,
    peaks: dict[str, float],
) -> dict[str, Any]:
    if setting.precision not in peaks:
        dtype = megatron_config.DTYPES[config.train.precision]
        peaks[setting.precision] = measured_peak(here, dtype)
    cells = conditions.cells(setting)
    measured = measure(config, cells, here, conditions.warmup, conditions.steps)
    chosen = select.choose(config.model, here, config.train.precision, config.data.packing).value
    peak = peaks[setting.precision]
    compiled = fused.is_compiled(config.model.compile, here)
    return tflops_rows.row(setting, config, cells, chosen, compiled, measured, peak)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def save(results: Results, conditions: Conditions) -> None:
    """Writes what there is, if it is to be kept."""
    if conditions.out is None:
        return
    content = {
        "rows": results.rows,
        "skipped": results.skipped,
        "steps": conditions.steps,
        "warmup": conditions.warmup,
        "tflops_peaks": {name: peak / 1e12 for name, peak in results.peaks.items()},
    }
    write_json(conditions.out, content | provenance())


def file_in(folder: Path) -> Path:
    """The file of this machine's results: tflops_GPU.json, or tflops_PROCESSOR_2_CORES.json."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    else:
        name = " ".join(machine().split(", ")[:2])
    return folder / f"tflops_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
