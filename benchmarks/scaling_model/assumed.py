"""Every assumption as a line of text: what, its value with the unit, where it is from."""

from __future__ import annotations

from pathlib import Path

from benchmarks.scaling_model.hardware import GPUS, MODELS
from benchmarks.scaling_model.lengths import Corpus
from benchmarks.scaling_model.pages import LABELS
from benchmarks.scaling_model.speed import MEASURED_CORES, flat_rate, store_rate
from benchmarks.scaling_model.step import BYTES_PER_GRADIENT, OPTIMIZER_BYTES
from benchmarks.scaling_model.study import Inputs, real_over_full

_PLAN = "assumed for 8 A100 with NVSwitch and 200 Gbit/s InfiniBand; kept for Hopper"


def described(
    inputs: Inputs, cells: Corpus, results: Path, cores_per_rank: float
) -> list[dict[str, str]]:
    """{what, value, source} of each."""
    rows = [
        *_gpus(inputs),
        *_cells(inputs, cells),
        *_time(inputs),
        *_loader(results, cores_per_rank),
    ]
    return [dict(zip(("what", "value", "source"), row, strict=True)) for row in rows]


def _gpus(inputs: Inputs) -> list[tuple[str, str, str]]:
    return [
        (
            f"{gpu}, {LABELS[name]}: full cells",
            f"{inputs.speeds[gpu, name].cells_per_s:,.0f} cells/s",
            inputs.speeds[gpu, name].source,
        )
        for gpu in GPUS
        for name in MODELS
    ]


def _cells(inputs: Inputs, cells: Corpus) -> list[tuple[str, str, str]]:
    lengths = cells.lengths
    rows = [
        (
            "tokens of a cell",
            f"{lengths.mean():,.0f} in the mean, of at most 2,048",
            f"{len(lengths):,} cells: {cells.source}",
        )
    ]
    return rows + [
        (
            f"packed, {LABELS[name]}: time of a mean cell over a full one",
            f"{real_over_full(model, lengths):.3f}",
            "executed FLOPs: packed kernels are as efficient as padded ones",
        )
        for name, model in MODELS.items()
    ]


def _time(inputs: Inputs) -> list[tuple[str, str, str]]:
    assumed = inputs.assumed
    network = assumed.network
    return [
        ("all-reduce within a node", f"{network.nvlink_bytes_s / 1e9:g} GB/s per GPU", _PLAN),
        ("all-reduce between nodes", f"{network.ib_bytes_s / 1e9:g} GB/s per GPU", _PLAN),
        ("one hop of a ring", f"{network.latency_s * 1e6:g} us", "a kernel's start and the wire"),
        ("bytes per gradient", f"{BYTES_PER_GRADIENT}", "fp32, summed before the update"),
        (
            "backward share that hides it",
            f"{assumed.overlap:g} x {assumed.backward:g}",
            "two of three multiplications are backward; the last bucket comes at its end",
        ),
        ("all-reduce never hidden", f"{assumed.least_exposed:.0%}", "the last bucket"),
        (
            "optimizer",
            f"{assumed.optimizer_s * 1e3:g} ms + {OPTIMIZER_BYTES} bytes per own parameter",
            "estimate, not measured",
        ),
        (
            "sustained share",
            f"{assumed.sustained:g}",
            "logging, checkpoints, stragglers; ESM-2 3B keeps 96.85 % from 8 to 256 GPUs",
        ),
    ]


def _loader(results: Path, cores_per_rank: float) -> list[tuple[str, str, str]]:
    flat, store = flat_rate(results), store_rate(results)
    return [
        ("loader, one process, flat copy", f"{flat.cells_per_s:,.0f} cells/s", flat.source),
        ("loader, one process, SOMA store", f"{store.cells_per_s:,.0f} cells/s", store.source),
        (
            "cores per rank for it",
            f"{cores_per_rank:g}, each as fast as there",
            f"rate x cores / {MEASURED_CORES}, up to {MEASURED_CORES}: it has one thread beside "
            "the main one; eight ranks do not slow each other",
        ),
    ]
