"""The own parts of a session, each in a process of its own.

machine:    what there is, its fastest matrix products, the choices of `auto` on it
attention:  kernels that run, differences from plain arithmetic, statistics of dropout
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.common import MIB, save_results, wait_for
from benchmarks.harness.session import numerics
from benchmarks.harness.tflops.run import file_in
from geneformer_mcore import backends
from geneformer_mcore.config.sections import Attention, ParallelConfig, Precision
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.metrics.peak_flops import measured_peak
from geneformer_mcore.model import megatron_config
from geneformer_mcore.model.attention import select

DROPOUT = 0.1
"""The card's."""
_ATTENTION = re.compile(r"flash|fmha|sdpa|attention|attn|softmax|bmm|dropout|cudnn", re.IGNORECASE)
_MOST_KERNELS, _LONGEST_NAME = 12, 140


def machine(out: Path) -> bool:
    """Write machine.json. True: there is nothing that could be unsound."""
    here = device.start()
    peaks = {
        name.value: measured_peak(here, dtype) for name, dtype in megatron_config.DTYPES.items()
    }
    found: dict[str, Any] = {
        "tflops_file": file_in(Path()).name,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformer_engine": backends.is_available("transformer_engine"),
        "tflops_peaks": {name: peak / 1e12 for name, peak in peaks.items()},
        "auto": {
            f"{precision.value} {cells}": _auto(precision, here, cells == "packed")
            for precision in Precision
            for cells in ("padded", "packed")
        },
    }
    if here.type == "cuda":
        about = torch.cuda.get_device_properties(here)
        found["gpu"] = {
            "name": about.name,
            "capability": f"{about.major}.{about.minor}",
            "memory_mib": about.total_memory / MIB,
            "multiprocessors": about.multi_processor_count,
        }
    save_results(out / "machine.json", found)
    return True


def _auto(precision: Precision, here: torch.device, packed: bool) -> str:
    """The attention of model.attention=auto, or why there is none."""
    model = numerics.config_of("auto", precision.value, 64, DROPOUT).model
    try:
        return select.choose(model, here, precision, packed).value
    except GeneformerError as error:
        return str(error)


def check(name: str, out: Path, seq_length: int) -> bool:
    """Write check_NAME.json, combination by combination. Whether every one that this machine has
    is as it should be."""
    here = device.start()
    groups.start(here, ParallelConfig())
    groups.seed_dropout(1, groups.topology())
    found: list[dict[str, Any]] = []
    for precision in ("bf16", "fp32"):
        for packed in (True, False):
            began = time.monotonic()
            entry = {"attention": name, "precision": precision, "packed": packed}
            entry |= _tried(partial(_one, name, precision, packed, here, seq_length))
            found.append(entry | {"seconds": time.monotonic() - began})
            print(found[-1], flush=True)
            save_results(out / f"check_{name}.json", {"checks": found})
    groups.stop()
    return all(entry.get("sound", True) for entry in found)


def _tried(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except GeneformerError as error:
        return {"reason": str(error)}  # not to be had here: no fault
    except Exception as error:  # the next combination may work
        return {"sound": False, "reason": f"{type(error).__name__}: {error}"}


def _one(
    name: str, precision: str, packed: bool, here: torch.device, seq_length: int
) -> dict[str, Any]:
    config = numerics.config_of(name, precision, seq_length)
    select.choose(config.model, here, config.train.precision)
    plain_config = numerics.config_of(Attention.plain.value, precision, seq_length)
    found, plain = (numerics.differences(each, packed, here) for each in (config, plain_config))
    stage = numerics.stage_of(numerics.config_of(name, precision, seq_length, DROPOUT), here)
    dropout = numerics.dropout_of(stage, packed, seq_length, here)
    batch = numerics.batch_of(seq_length, packed).to(here)
    stage.train()
    ran = kernels(lambda: stage(batch).sum().backward(), here)
    alike, dropped_well = numerics.alike(found, plain), numerics.dropout_is_sound(dropout)
    return {
        "sound": alike and dropped_well,
        "alike": alike,
        "differences": found,
        "differences_of_plain": plain,
        "dropout_sound": dropped_well,
        "dropout": dropout,
        "kernels": ran,
    }


def kernels(work: Callable[[], Any], here: torch.device) -> list[dict[str, Any]]:
    """Kernels of a GPU (operators of a CPU) that have to do with attention, the slowest first:
    name, calls, microseconds in all. `work` is done twice: libraries choose kernels in the first.
    """
    work()
    wait_for(here)
    on_gpu = here.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as seen:
        work()
        wait_for(here)
    found = [
        {
            "name": event.key[:_LONGEST_NAME],
            "calls": event.count,
            "us": event.self_device_time_total if on_gpu else event.self_cpu_time_total,
        }
        for event in seen.key_averages()
        if _ATTENTION.search(event.key)
    ]
    found = [event for event in found if event["us"] > 0]
    return sorted(found, key=lambda event: -event["us"])[:_MOST_KERNELS]
