"""What a session asks of the machine and of one attention, each in a process of its own.

machine:    what there is, how fast it multiplies, what `auto` means on it
attention:  kernels that really run, differences from plain arithmetic, statistics of dropout
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.side_by_side import session_dropout, session_kernels, session_model
from benchmarks.side_by_side.tflops_run import file_in
from geneformer_mcore import backends
from geneformer_mcore.config.sections import Attention, ParallelConfig, Precision
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.io.files import write_json
from geneformer_mcore.metrics.peak_flops import measured_peak
from geneformer_mcore.metrics.provenance import provenance
from geneformer_mcore.model import megatron_config
from geneformer_mcore.model.attention import select

DROPOUT = 0.1
"""The card's."""


def machine(out: Path) -> bool:
    """Writes machine.json. Whether all is well."""
    here = device.start()
    found = provenance() | {
        "tflops_file": file_in(Path()).name,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformer_engine": backends.is_available("transformer_engine"),
        "tflops_peaks": {
            name.value: measured_peak(here, dtype) / 1e12
            for name, dtype in megatron_config.DTYPES.items()
        },
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
            "memory_mib": about.total_memory / 2**20,
            "multiprocessors": about.multi_processor_count,
        }
    write_json(out / "machine.json", found)
    return True


def _auto(precision: Precision, here: torch.device, packed: bool) -> str:
    """What model.attention=auto takes, or why it takes nothing."""
    model = session_model.config_of("auto", precision.value, 64, DROPOUT).model
    try:
        return select.choose(model, here, precision, packed).value
    except GeneformerError as error:
        return str(error)


def check(name: str, out: Path, seq_length: int) -> bool:
    """Writes check_NAME.json, combination by combination. Whether every one that this machine has
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
            write_json(out / f"check_{name}.json", {"checks": found} | provenance())
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
    config = session_model.config_of(name, precision, seq_length)
    select.choose(config.model, here, config.train.precision)
    found, plain = (
        session_model.differences(each, packed, here)
        for each in (config, session_model.config_of(Attention.plain.value, precision, seq_length))
    )
    stage = session_model.stage_of(
        session_model.config_of(name, precision, seq_length, DROPOUT), here
    )
    dropout = session_dropout.statistics(stage, packed, seq_length, here)
    batch = session_model.batch_of(seq_length, packed).to(here)
    stage.train()
    ran = session_kernels.kernels(lambda: stage(batch).sum().backward(), here)
    alike, dropped_well = session_model.alike(found, plain), session_dropout.sound(dropout)
    return {
        "sound": alike and dropped_well,
        "alike": alike,
        "differences": found,
        "differences_of_plain": plain,
        "dropout_sound": dropped_well,
        "dropout": dropout,
        "kernels": ran,
    }
