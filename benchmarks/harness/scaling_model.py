"""Estimated training steps on many GPUs, projected from measured steps of one H200.

    results/tflops_h200.json: s per step against tokens per step, padded and packed
      -> compute  = passes x step of one H200 with the fullest rank's tokens / passes
      -> exposed  = max(all-reduce - 0.9 x 0.66 x compute of the last pass, 6 % of the all-reduce)
      -> step     = max(compute + exposed, loader) / 0.96

    all-reduce  = 2 (p-1)/p S / NVLink + 2 (N-1)/N (S/p) / InfiniBand + (2p + 2N) 8 us

p = 8 GPUs per node, N nodes, S = 4 bytes x parameters. Every GPU holds the whole model. No cluster
was at hand: everything here but the rows of one H200 and the loader's rate is assumed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from geneformer_mcore.data.collate import pack
from geneformer_mcore.errors import DataError
from geneformer_mcore.model.flops import ModelShape, num_parameters, padded_equivalent_flops
from geneformer_mcore.types import padded_vocabulary_size

SEQ_LENGTH, VOCABULARY = 2048, 25_429
STEPS, GLOBAL_BATCH = 115_430, 2048
"""Optimizer steps of the model card's runs, and cells of each."""
GPUS_PER_NODE = 8
NODES = (1, 2, 4, 8, 16)
H200 = "tflops_h200.json"
LOADER_CORES = 2
"""Cores of the machine that loader.py was measured on: one process with two threads at work."""

SLOWER = {"H200": 1.0, "H100": 4.8 / 3.35, "A100": 989 / 312}
"""Step of a GPU over that of an H200: the larger of the ratios of memory bandwidth (4.8, 3.35,
2.039 TB/s) and of dense bf16 FLOPs (989, 989, 312 TFLOPS), by NVIDIA's data sheets. Assumed."""


class Model(NamedTuple):
    """One of the card's models and its run ("Training diagnostics" of the model card).

    nodes: of 8 A100 each;  card_hours: wall clock of the 115,430 steps
    """

    name: str
    shape: ModelShape
    nodes: int
    card_hours: float


MODELS = (
    Model("10m", ModelShape(6, 256, 512, VOCABULARY), 8, 44 + 19 / 60),
    Model("106m", ModelShape(12, 768, 3072, VOCABULARY), 16, 90 + 55 / 60),
)


@dataclass(frozen=True)
class Assumptions:
    """The assumed terms of a step. Networks: as of 8 A100 with NVSwitch and a 200 Gbit/s InfiniBand
    card per GPU, bytes/s per GPU; Hopper's are twice as fast.

    latency_s:      one hop of a ring
    overlap:        share of the backward pass in which gradients can travel
    backward:       share of the compute that is backward: two of three multiplications
    least_exposed:  share of the all-reduce that is never hidden: the last bucket
    sustained:      mean speed of a long run over its best steps: logging, checkpoints, stragglers
                    (BioNeMo's ESM-2 3B keeps 96.85 % of linear from 8 to 256 GPUs)
    cores_per_rank: for the loader
    """

    nvlink_bytes_s: float = 230e9
    ib_bytes_s: float = 20e9
    latency_s: float = 8e-6
    overlap: float = 0.9
    backward: float = 0.66
    least_exposed: float = 0.06
    sustained: float = 0.96
    cores_per_rank: float = 2.0
    is_balanced: bool = True
    from_store: bool = False


@dataclass(frozen=True)
class Curve:
    """Measured steps of one H200, ascending: tokens of a step -> seconds, peak memory."""

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    peak_mib: tuple[float, ...]

    def passes(self, tokens: float) -> int:
        """Micro batches: none is larger than the largest measured one."""
        return max(1, -int(-tokens // self.tokens[-1]))

    def compute_s(self, tokens: float) -> float:
        """Seconds of a step with so many tokens: on lines through the measured ones, below them
        along the first line."""
        passes = self.passes(tokens)
        return passes * self.at(tokens / passes, self.seconds)

    def memory_mib(self, tokens: float) -> float:
        return self.at(tokens / self.passes(tokens), self.peak_mib)

    def origin(self, tokens: float) -> str:
        """Measured (to 2 %), interpolated or extrapolated: a step of so many tokens."""
        tokens /= self.passes(tokens)
        if any(abs(each / tokens - 1) < 0.02 for each in self.tokens):
            return "measured"
        return "interpolated" if tokens > self.tokens[0] else "extrapolated"

    def at(self, tokens: float, values: Sequence[float]) -> float:
        if tokens >= self.tokens[0]:
            return float(np.interp(tokens, self.tokens, values))
        slope = (values[1] - values[0]) / (self.tokens[1] - self.tokens[0])
        return values[0] - slope * (self.tokens[0] - tokens)


def curves(results: Path) -> dict[tuple[str, bool], Curve]:
    """{(model, packed): steps}: bf16, with attention dropout, full cells or packed ones. Raises
    DataError if two sizes of each were not measured on an H200."""
    points: dict[tuple[str, bool], list[tuple[float, float, float]]] = {}
    for row in _rows(results / H200):
        if row["precision"] == "bf16" and row["attention_dropout"] > 0:
            tokens = row["cells_per_step"] * row["tokens_per_cell"]
            here = points.setdefault((row["model"], row["packing"] == "packed"), [])
            here.append((tokens, row["step_s"], row["peak_mib"]))
    kinds = [(model.name, packed) for model in MODELS for packed in (False, True)]
    if any(len(points.get(kind, ())) < 2 for kind in kinds):
        raise DataError(
            f"{results / H200} has no two sizes of each model, padded and packed. Remedy: python "
            "benchmarks/gpu_session.py --out DIR on an H200."
        )
    return {kind: Curve(*zip(*sorted(points[kind]), strict=True)) for kind in kinds}


def loader_rate(results: Path, name: str) -> float:
    """Cells per second of one process on LOADER_CORES cores. Raises DataError if not measured."""
    path = results / "loader.json"
    for row in _rows(path):
        if row["name"] == name and not row["not_measured"]:
            return float(row["cells_per_s"])
    remedy = f"python benchmarks/loader.py --work DIR --json {path}"
    raise DataError(f"{path} has no rate of {name}. Remedy: {remedy}")


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def all_reduce_s(num_bytes: float, nodes: int, assumed: Assumptions) -> float:
    """Seconds to add up `num_bytes` over all GPUs: within nodes, between them, and back."""
    p = GPUS_PER_NODE
    within = 2 * (p - 1) / p * num_bytes / assumed.nvlink_bytes_s
    between = 2 * (nodes - 1) / nodes * num_bytes / p / assumed.ib_bytes_s
    return within + between + (2 * p + 2 * nodes) * assumed.latency_s


class Balance(NamedTuple):
    """Packed batches of real lengths on simulated ranks, means over steps.

    packed: tokens of the fullest rank over the mean, by the packing of pretraining
    dealt:  the same with cell i on rank i % ranks
    pack_s: seconds of packing a global batch, which every rank does, measured here
    """

    packed: float
    dealt: float
    pack_s: float


def balance(lengths: np.ndarray, ranks: int, steps: int) -> Balance:
    """Over `steps` global batches, drawn without repeats while there are enough cells."""
    rng, share = np.random.default_rng(0), GLOBAL_BATCH // ranks
    packed, dealt, seconds = [], [], []
    for _ in range(steps):
        batch = rng.choice(lengths, GLOBAL_BATCH, replace=len(lengths) < GLOBAL_BATCH)
        began = time.thread_time()
        packing = pack(batch, share * SEQ_LENGTH, ranks)
        seconds.append(time.thread_time() - began)
        bins = (np.concatenate(packing.of_rank(rank, ranks)) for rank in range(ranks))
        loads = np.array([batch[cells].sum() for cells in bins])
        packed.append(loads.max() / loads.mean())
        loads = batch.reshape(share, ranks).sum(0)
        dealt.append(loads.max() / loads.mean())
    return Balance(float(np.mean(packed)), float(np.mean(dealt)), float(np.median(seconds)))


@dataclass(frozen=True)
class Inputs:
    """Measurements: steps, cell lengths, balance by number of ranks, the loader's rates."""

    curves: dict[tuple[str, bool], Curve]
    mean_tokens: float
    balances: dict[int, Balance]
    flat_cells_s: float
    store_cells_s: float


def step(
    inputs: Inputs, model: Model, packed: bool, nodes: int, gpu: str, assumed: Assumptions
) -> dict[str, Any]:
    """The terms of one step, in seconds, and what follows."""
    curve, ranks = inputs.curves[model.name, packed], nodes * GPUS_PER_NODE
    share, balance = GLOBAL_BATCH / ranks, inputs.balances[ranks]
    tokens = share * (inputs.mean_tokens if packed else SEQ_LENGTH)
    imbalance = (balance.packed if assumed.is_balanced else balance.dealt) if packed else 1.0
    balanced_s = curve.compute_s(tokens) * SLOWER[gpu]
    compute_s = curve.compute_s(tokens * imbalance) * SLOWER[gpu]
    # With the embedding padded as it is trained.
    trained = replace(model.shape, vocabulary_size=padded_vocabulary_size(VOCABULARY))
    reduce_s = all_reduce_s(4 * num_parameters(trained, SEQ_LENGTH), nodes, assumed)
    # With several micro batches gradients are complete in the last one only.
    hidden_s = assumed.overlap * assumed.backward * compute_s / curve.passes(tokens)
    exposed_s = max(reduce_s - hidden_s, assumed.least_exposed * reduce_s)
    # Packed, a rank's cells come from every span of the store: it reads them all.
    cores = min(assumed.cores_per_rank, LOADER_CORES) / LOADER_CORES
    from_store = (GLOBAL_BATCH if packed else share) / inputs.store_cells_s
    loader_s = (from_store if assumed.from_store else share / inputs.flat_cells_s) / cores
    loader_s += balance.pack_s if packed else 0.0
    step_s = max(compute_s + exposed_s, loader_s) / assumed.sustained
    flops = padded_equivalent_flops(model.shape, SEQ_LENGTH)
    return {
        "cells_per_gpu": share,
        "origin": curve.origin(tokens),
        "fixed_s": curve.at(0, curve.seconds),
        "compute_s": compute_s,
        "waiting_s": compute_s - balanced_s,
        "all_reduce_s": reduce_s,
        "exposed_s": exposed_s,
        "loader_s": loader_s,
        "step_s": step_s,
        "cells_per_s": GLOBAL_BATCH / step_s,
        "hours": STEPS * step_s / 3600,
        "tflops_padded_equivalent": GLOBAL_BATCH / step_s / ranks * flops / 1e12,
        "peak_mib": curve.memory_mib(tokens),
    }


CASES: dict[str, dict[str, Any]] = {
    "network at half the bandwidth": {"nvlink_bytes_s": 115e9, "ib_bytes_s": 10e9},
    "nothing of the all-reduce hidden": {"overlap": 0.0},
    "no balancing: cell i to rank i % ranks": {"is_balanced": False},
    "no flat copy: ranks read the SOMA store": {"from_store": True},
    "half the cores for the loader": {"cores_per_rank": 1.0},
    "10 % lost to logging, checkpoints, stragglers": {"sustained": 0.9},
}
"""The assumptions changed in each."""


def project(inputs: Inputs, assumed: Assumptions) -> dict[str, Any]:
    """All estimates: the card's layouts, other numbers of GPUs, other assumptions."""

    def layout(model: Model, packed: bool) -> dict[str, Any]:
        def at(nodes: int, gpu: str, **case: Any) -> dict[str, Any]:
            return step(inputs, model, packed, nodes, gpu, replace(assumed, **case))

        rates = {gpu: [at(nodes, gpu)["cells_per_s"] for nodes in NODES] for gpu in SLOWER}
        slower = {name: at(model.nodes, "H200", **case)["step_s"] for name, case in CASES.items()}
        known = {"model": model.name, "packed": packed, "nodes": model.nodes}
        known |= {"card_hours": model.card_hours, **at(model.nodes, "H200")}
        return known | {"cells_per_s_of": rates, "step_s_if": slower}

    layouts = [layout(model, packed) for model in MODELS for packed in (False, True)]
    return {"layouts": layouts, "nodes": NODES, "assumed": asdict(assumed), "slower": SLOWER}


# Table and picture


LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "nodes x GPUs (H200)": lambda each: f"{each['nodes']} x {GPUS_PER_NODE}",
    "cells per GPU and step": lambda each: f"{each['cells_per_gpu']:g}",
    "step of one H200 at that size": lambda each: each["origin"],
    "fixed part of that line, ms": lambda each: _ms(each["fixed_s"]),
    "compute of the slowest rank, ms": lambda each: _ms(each["compute_s"]),
    "- of it the others wait, ms": lambda each: _ms(each["waiting_s"]),
    "all-reduce of the gradients, ms": lambda each: _ms(each["all_reduce_s"]),
    "- of it not hidden by backward, ms": lambda each: _ms(each["exposed_s"]),
    "loader of a rank, at the same time, ms": lambda each: _ms(each["loader_s"]),
    "**step, ms**": lambda each: f"**{_ms(each['step_s'])}**",
    "cells/s": lambda each: f"{each['cells_per_s']:,.0f}",
    "TFLOPS per GPU, padded-eq.": lambda each: f"{each['tflops_padded_equivalent']:.0f}",
    f"**hours for {STEPS:,} steps**": lambda each: f"**{each['hours']:.2f}**",
}


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a column per model and kind of batch."""
    layouts, nodes = found["layouts"], list(found["nodes"])

    def hours(layout: dict[str, Any], gpu: str) -> str:
        rate = layout["cells_per_s_of"][gpu][nodes.index(layout["nodes"])]
        return f"{STEPS * GLOBAL_BATCH / rate / 3600:.2f}"

    rows = [[label, *map(show, layouts)] for label, show in LINES.items()]
    for gpu in ("H100", "A100"):
        label = f"hours on as many {gpu}, assumed {found['slower'][gpu]:.2f} x as slow"
        rows.append([label, *(hours(each, gpu) for each in layouts)])
    card = "hours on the model card, A100"
    rows.append([card, *(f"{each['card_hours']:.1f}" for each in layouts)])
    memory = "GPU memory with the whole optimizer, MiB"
    rows.append([memory, *(f"{each['peak_mib']:,.0f}" for each in layouts)])
    rates = zip(*(each["cells_per_s_of"]["H200"] for each in layouts), strict=True)
    for number, those in zip(nodes, rates, strict=True):
        rows.append([f"cells/s on {GPUS_PER_NODE * number} H200", *(f"{r:,.0f}" for r in those)])
    for name in layouts[0]["step_s_if"]:
        rows.append([f"step, ms: {name}", *(_changed(each, name) for each in layouts)])
    names = (f"{each['model'].upper()} {_form(each)}" for each in layouts)
    return ["estimate, not measured", *names], rows


def _form(layout: dict[str, Any]) -> str:
    return "packed" if layout["packed"] else "padded"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _changed(layout: dict[str, Any], name: str) -> str:
    seconds = layout["step_s_if"][name]
    return f"**{_ms(seconds)}**" if seconds > 1.02 * layout["step_s"] else _ms(seconds)


def save_picture(path: Path, found: dict[str, Any]) -> None:
    """Draw cells/s against GPUs, a panel per model, with the card's run: the same bytes (SVG, PNG)
    for the same numbers."""
    import matplotlib

    from geneformer_mcore.report.figures import new_figure

    with matplotlib.rc_context({"svg.hashsalt": "scaling", "font.size": 9}):
        figure = new_figure(9, 4.4)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, model in zip(panels, MODELS, strict=True):
            _draw(axes, model, found)
        panels[0].set_ylabel("cells/s, global batch 2,048")
        title = "Estimates, projected from steps measured on one H200; H100 and A100 by data sheets"
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)


def _draw(axes: Any, model: Model, found: dict[str, Any]) -> None:
    colours = {"H200": "#4a5fa8", "H100": "#c7762b", "A100": "#1f6f5c"}
    gpus = [GPUS_PER_NODE * number for number in found["nodes"]]
    for gpu, colour in colours.items():
        for layout in (each for each in found["layouts"] if each["model"] == model.name):
            style = {"color": colour, "linestyle": "-" if layout["packed"] else "--"}
            rates, label = layout["cells_per_s_of"][gpu], f"{gpu} {_form(layout)}"
            axes.plot(gpus, rates, label=label, marker="o", markersize=3, linewidth=1.4, **style)
    rate = STEPS * GLOBAL_BATCH / model.card_hours / 3600
    axes.plot(GPUS_PER_NODE * model.nodes, rate, "D", color="#b3263a", label="model card, A100")
    axes.set_title(f"{model.name.upper()} model", loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(gpus, [str(number) for number in gpus])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.tick_params(axis="y", labelleft=True)
    axes.set_xlabel("GPUs")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
