"""All rows of tflops.py, one after the other: timed training steps, or the reason why not.

settings -> possible here? -> build -> prefetched micro batches
    -> [ wait -> zero, forward, backward, clip, AdamW ] per step -> row -> kept at once
       '---------------- wall clock ----------------'
               '--------- CUDA events -------------'
"""

from __future__ import annotations

import gc
import re
import statistics
import time
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import common
from benchmarks.harness.pages import TFLOPS_COLUMNS, heads, shown
from benchmarks.harness.peers.steps_megatron import our_stages
from benchmarks.harness.tflops.settings import Cells, Conditions, Setting
from benchmarks.harness.train_step.cells import StepCells
from geneformer_mcore.config import Config
from geneformer_mcore.data.loader import Feed, steps_on_device
from geneformer_mcore.distributed import groups
from geneformer_mcore.errors import ConfigError, GeneformerError
from geneformer_mcore.metrics.meter import Meter
from geneformer_mcore.metrics.peak_flops import measured_peak
from geneformer_mcore.metrics.provenance import machine
from geneformer_mcore.model import fused, megatron_config
from geneformer_mcore.model.attention import select
from geneformer_mcore.model.flops import ModelShape
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.training.step import Totals, train_step

HOW = """
padded-equivalent TFLOPS  cells/s x FLOPs of a cell of {seq_length} tokens, all predicted:
                          comparable with published figures; a unit of throughput
executed TFLOPS           real tokens, predicted positions only, attention within each cell
MFU                       executed TFLOPS / the fastest matrix product of this precision measured
                          here just now ({peaks} TFLOPS)
FLOPs                     3 x [L (8nh^2 + 4nhf) + 4Lhn^2 + 2mh^2 + 2mhV] per cell of n tokens, m
                          predicted, V = 25,429; 2 per multiply-add; recomputation not counted
s per step                wait for data, forward, backward, clipping and AdamW: the tokens of a
                          mean step x the median time per token of {steps} steps, after {warmup}
                          unmeasured ones. All rates are by it
device s                  the same by events on the GPU, without the wait for data
fill                      real tokens / positions computed on
memory                    peak: on a GPU allocated by torch, on a CPU the whole process
"""
COLUMNS = [
    *TFLOPS_COLUMNS,
    ("cells/step", lambda row: f"{row['cells_per_step']}"),
    ("device s", lambda row: "-" if row["device_s"] is None else f"{row['device_s']:.3g}"),
]


@dataclass
class Results:
    """The rows so far. failed: some row raised an error that is not the user's."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    failed: bool = False


def possible(
    wanted: Sequence[Setting], conditions: Conditions, here: torch.device
) -> tuple[dict[Setting, Config], dict[Setting, str]]:
    """Settings that can be measured here, and the reasons of the others. Raises ConfigError with
    every reason if none can."""
    configs, reasons = {}, {}
    for setting in wanted:
        try:
            config = conditions.config(setting)
            select.choose(config.model, here, config.train.precision, config.data.packing)
            configs[setting] = config
        except GeneformerError as error:
            reasons[setting] = str(error)
    if not configs:
        raise ConfigError("\n".join(dict.fromkeys(reasons.values())))
    return configs, reasons


def measure_all(wanted: Sequence[Setting], conditions: Conditions, here: torch.device) -> Results:
    """Every row in turn, printed and kept as soon as it is there. The process groups must be
    there. Raises ConfigError if no row can be measured."""
    configs, reasons = possible(wanted, conditions, here)
    results, began = Results(), time.monotonic()
    for setting in wanted:
        reason = reasons.get(setting, "")
        if not reason and conditions.seconds is not None:
            over = time.monotonic() - began > conditions.seconds
            reason = f"not begun within {conditions.seconds:g} s" if over else ""
        if not reason:
            reason = _measured(setting, configs[setting], conditions, here, results)
            _free(here)
        if reason:
            results.skipped.append(setting.as_json() | {"reason": reason})
        print(line((results.skipped if reason else results.rows)[-1]), flush=True)
        if conditions.out is not None:
            _save(results, conditions, conditions.out)
    return results


def _measured(
    setting: Setting, config: Config, conditions: Conditions, here: torch.device, results: Results
) -> str:
    """Add a row to `results`, or return why there is none."""
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
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


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
    precision, packed = config.train.precision, config.data.packing
    if setting.precision not in peaks:
        peaks[setting.precision] = measured_peak(here, megatron_config.DTYPES[precision])
    cells = conditions.cells(setting)
    measured = measure(config, cells, here, conditions.warmup, conditions.steps)
    chosen = select.choose(config.model, here, precision, packed).value
    known = {
        "cells": cells.label,
        "attention": chosen,
        "compiled": fused.is_compiled(config.model.compile, here),
    }
    return setting.as_json() | known | numbers(config, measured, peaks[setting.precision])


def _save(results: Results, conditions: Conditions, out: Path) -> None:
    content = {
        "rows": results.rows,
        "skipped": results.skipped,
        "steps": conditions.steps,
        "warmup": conditions.warmup,
        "tflops_peaks": {name: peak / 1e12 for name, peak in results.peaks.items()},
    }
    common.save_results(out, content)


def file_in(folder: Path) -> Path:
    """The file of this machine's results: tflops_GPU.json, or tflops_PROCESSOR_2_CORES.json."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    else:
        name = " ".join(machine().split(", ")[:2])
    return folder / f"tflops_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.json"


# Steps


@dataclass(frozen=True)
class Step:
    """One measured step.

    step_s:       wall clock; includes data_wait_s, the wait for its micro batches
    device_s:     between two events on the GPU, before the first kernel and after the last one of
                  the step; None on a CPU
    positions:    computed on, padding included
    """

    step_s: float
    data_wait_s: float
    device_s: float | None
    positions: int
    totals: Totals


@dataclass(frozen=True)
class Measured:
    """Steps after the unmeasured ones, and the peak of memory from building the model on."""

    steps: list[Step]
    peak_mib: float


def measure(
    config: Config, cells: Cells, here: torch.device, num_warmup: int, num_steps: int
) -> Measured:
    """Build the model and train it. The process groups must be there."""
    common.forget_peak_mib(here)
    groups.seed_dropout(config.train.seed, groups.topology())
    trainable = _trainable(config, here)
    try:
        feed = StepCells.of(cells.source, config, common.VOCABULARY).feed(config)
        steps = _timed(trainable, feed, config, here, num_warmup + num_steps)
    finally:
        _let_go(trainable)
    return Measured(steps[num_warmup:], common.peak_mib(here))


def _timed(
    trainable: optim.Trainable, feed: Feed, config: Config, here: torch.device, number: int
) -> list[Step]:
    """The first `number` steps."""
    topology = groups.topology()
    timed, marks = [], []
    stream = steps_on_device(feed, 0, config.data.prefetch_steps, here)
    with closing(stream):  # type: ignore[type-var]
        for _ in range(number):
            began = time.perf_counter()
            batches = next(stream)
            waited = time.perf_counter() - began
            before = _mark(here)
            result = train_step(trainable, batches, config.optim.lr, topology)
            marks.append((before, _mark(here)))
            # train_step has read the loss: a GPU is done with all but AdamW's last kernels, and
            # what is left of them is in the time of the next step.
            seconds = time.perf_counter() - began
            positions = sum(batch.tokens_BS.numel() for batch in batches)
            timed.append((seconds, waited, positions, result.totals))
    common.wait_for(here)
    return [
        Step(seconds, waited, _between(*mark), positions, totals)
        for (seconds, waited, positions, totals), mark in zip(timed, marks, strict=True)
    ]


def _let_go(trainable: optim.Trainable) -> None:
    """Take Megatron's hooks off the gradients: they hold the model, the model holds them, and
    Python cannot see the circle, since autograd is part of it. The next model needs the memory."""
    for chunk in trainable.chunks:
        for node in chunk.grad_accs:
            node.register_hook(lambda *_: None).hooks_dict_ref().clear()
        chunk.grad_accs.clear()


def _trainable(config: Config, here: torch.device) -> optim.Trainable:
    precision, parallel = config.train.precision, config.parallel
    core = megatron_config.transformer_config(config.model, parallel, precision, here)
    return optim.wrap(our_stages(config, core, here, common.VOCABULARY), config.optim, parallel)


def _mark(here: torch.device) -> torch.cuda.Event | None:
    if here.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: torch.cuda.Event | None, last: torch.cuda.Event | None) -> float | None:
    """Seconds."""
    return None if first is None or last is None else first.elapsed_time(last) / 1000


# Numbers and text


def numbers(config: Config, measured: Measured, peak: float) -> dict[str, Any]:
    """The measured part of a row. peak: FLOP/s that MFU is a share of."""
    steps, batch = measured.steps, config.train.global_batch_size
    totals = sum((step.totals for step in steps), Totals())
    devices = [step.device_s for step in steps if step.device_s is not None]
    rates = _rates(config, steps, totals, peak)
    chosen = ("cells_per_s", "tokens_per_s", "mfu", "data_wait_fraction", "step_s")
    return {
        "attention_dropout": config.model.attention_dropout,
        "cells_per_step": batch,
        "seq_length": config.data.seq_length,
        "tokens_per_cell": totals.num_tokens / (len(steps) * batch),
        "fill": totals.num_tokens / sum(step.positions for step in steps),
        **{name: rates[name] for name in chosen},
        **{name: rates[name] for name in rates if name.startswith("tflops")},
        "tflops_peak": peak / 1e12,
        "device_s": _typical_s(steps, devices) / len(steps) if devices else None,
        "peak_mib": measured.peak_mib,
        "step_s_each": [step.step_s for step in steps],
    }


def _rates(config: Config, steps: Sequence[Step], totals: Totals, peak: float) -> dict[str, Any]:
    shape = config.model
    size = ModelShape(shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, common.VOCABULARY)
    meter = Meter(size, config.data.seq_length, 1, peak)
    meter.add(
        loss_sum=totals.loss_sum,
        num_predicted=totals.num_predicted,
        cells=len(steps) * config.train.global_batch_size,
        tokens=totals.num_tokens,
        sum_squared_lengths=totals.sum_squared_lengths,
        data_wait_s=len(steps) * statistics.median(step.data_wait_s for step in steps),
        step_s=_typical_s(steps, [step.step_s for step in steps]),
        steps=len(steps),
    )
    return meter.record(step=len(steps), grad_norm=0.0, lr=config.optim.lr)


def _typical_s(steps: Sequence[Step], seconds: Sequence[float]) -> float:
    """The time of all steps together, were none slower or faster per token than the median.

    The median, because one slow moment says nothing of the code; per token, because the steps of
    cells of many lengths differ in their work.
    """
    tokens = [step.totals.num_tokens for step in steps]
    per_token = [each / number for each, number in zip(seconds, tokens, strict=True)]
    return sum(tokens) * statistics.median(per_token)


def line(found: dict[str, Any]) -> str:
    """A row in a few words, while others are still being measured."""
    name = "{model} {precision} {packing}, {attention} attention, micro batch {micro_batch}"
    name += ", compiled" if found["compiled"] else ""
    if "reason" in found:
        return f"{name.format(**found)}: {found['reason']}"
    rates = "{cells_per_s:,.3g} cells/s, {tflops_padded_equivalent:.3g} TFLOPS padded-equivalent"
    return f"{name.format(**found)}: {rates.format(**found)}, MFU {found['mfu']:.1%}"


def table(results: Results) -> str:
    """The rows as text, and under them why others are missing."""
    text = common.text_table(heads(COLUMNS), [shown(COLUMNS, found) for found in results.rows])
    cells = dict.fromkeys(found["cells"] for found in results.rows)
    notes = [f"cells: {'; '.join(cells)}"] if results.rows else []
    notes += [f"not measured: {line(found)}" for found in results.skipped]
    return "\n".join([text, "", *notes])
