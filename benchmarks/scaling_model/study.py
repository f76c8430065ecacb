"""Everything that goes into the model of a step, and the steps that come of it.

speeds of GPUs + real lengths dealt to ranks + the loader's seconds + assumptions
  -> a row per GPU, model, padded or packed, number of nodes   (with every term of the step)
  -> the same where one thing is worse: sensitivity
  -> beside the card's wall clocks
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from benchmarks.scaling_model.deals import Costs, Deal
from benchmarks.scaling_model.hardware import (
    GPUS,
    GPUS_PER_NODE,
    MODELS,
    PUBLISHED_A100,
    SEQ_LENGTH,
    STEPS,
    Model,
)
from benchmarks.scaling_model.speed import Speed
from benchmarks.scaling_model.step import Assumptions, Job, Terms, step
from geneformer_mcore.config.sections import DataConfig
from geneformer_mcore.model.flops import padded_equivalent_flops

NODES = (1, 2, 4, 8, 16)
WINDOW_SPANS = DataConfig().window_spans


@dataclass(frozen=True)
class Loader:
    """Seconds of one rank's loader, which works while the GPU does.

    cells_per_s:    of its own cells: read from a flat copy, masked, batched
    places_s:       where the cells of a global batch lie; every rank asks for all of them
    whole_batch_s:  packed: lengths and packing of the global batch besides, in every rank
    store_cell_s:   what a cell costs more if the SOMA store is read itself
    sums_s:         packed, in the first epoch: checking the sums of blocks
    """

    cells_per_s: float
    places_s: float
    whole_batch_s: float
    store_cell_s: float
    sums_s: float


@dataclass(frozen=True)
class Inputs:
    """speeds: (GPU, model) -> full cells per second; deals: (model, ranks) -> (packed, dealt);
    loaders: model -> its loader; lengths: int64, of real cells."""

    speeds: dict[tuple[str, str], Speed]
    deals: dict[tuple[str, int], tuple[Deal, Deal]]
    loaders: dict[str, Loader]
    lengths: np.ndarray
    assumed: Assumptions


@dataclass(frozen=True)
class Case:
    """What is other than assumed."""

    name: str
    slower_loader: float = 1.0
    slower_network: float = 1.0
    is_hidden: bool = True
    is_balanced: bool = True
    from_store: bool = False
    first_epoch: bool = False
    at_published_speed: bool = False


AS_ASSUMED = Case("as assumed")
CASES = (
    AS_ASSUMED,
    Case("loader at half the rate", slower_loader=2),
    Case("network at half the bandwidth", slower_network=2),
    Case("nothing of the all-reduce hidden", is_hidden=False),
    Case("no balancing: cell i to rank i % ranks", is_balanced=False),
    Case("first epoch: sums of blocks checked", first_epoch=True),
    Case("no flat copy: every rank reads the SOMA store", from_store=True),
    Case("GPU as fast as NVIDIA's BioNeMo 2 on its chart", at_published_speed=True),
)


def row(
    inputs: Inputs, gpu: str, model: Model, nodes: int, is_packed: bool, case: Case = AS_ASSUMED
) -> dict[str, Any]:
    """One layout: what it is, every term of its step, and what follows."""
    job = _job(inputs, gpu, model, nodes, is_packed, case)
    terms = step(job, _assumed(inputs.assumed, case))
    source = inputs.speeds[gpu, model.name].source
    return {
        "gpu": gpu,
        "model": model.name,
        "packed": is_packed,
        "nodes": nodes,
        "gpus": job.ranks,
        "cells_per_rank": job.cells_per_rank,
        "micro_batches": job.micro_batches,
        "cell_s": job.cell_s,
        "cell_source": source if not case.at_published_speed else "BioNeMo 2's chart",
        "imbalance": job.imbalance,
        **asdict(terms),
        **_rates(model, job, terms),
    }


def _rates(model: Model, job: Job, terms: Terms) -> dict[str, float]:
    cells_per_gpu = terms.cells_per_s / job.ranks
    return {
        "cells_per_s_per_gpu": cells_per_gpu,
        "tflops_padded_equivalent": (
            cells_per_gpu * padded_equivalent_flops(model.shape, SEQ_LENGTH) / 1e12
        ),
        "hours": STEPS * terms.step_s / 3600,
        "node_needs_cells_per_s": terms.cells_per_s / job.nodes,
        "node_loads_cells_per_s": GPUS_PER_NODE * job.cells_per_rank / job.loader_s,
    }


def _job(inputs: Inputs, gpu: str, model: Model, nodes: int, is_packed: bool, case: Case) -> Job:
    ranks = nodes * GPUS_PER_NODE
    share = model.global_batch / ranks
    cells_per_s = inputs.speeds[gpu, model.name].cells_per_s
    if case.at_published_speed and gpu == "A100":
        cells_per_s = PUBLISHED_A100[model.name]
    deal = inputs.deals[model.name, ranks][0 if case.is_balanced else 1]
    loader = inputs.loaders[model.name]
    return Job(
        num_parameters=model.num_parameters,
        nodes=nodes,
        cells_per_rank=share,
        micro_batches=deal.micro_batches if is_packed else -(-int(share) // model.micro_batch),
        cell_s=(real_over_full(model, inputs.lengths) if is_packed else 1.0) / cells_per_s,
        imbalance=deal.factor if is_packed else 1.0,
        loader_s=loader_s(loader, model.global_batch, share, is_packed, case),
        memory_bytes_s=GPUS[gpu].memory_bytes_s,
    )


def _assumed(assumed: Assumptions, case: Case) -> Assumptions:
    changed = replace(assumed, network=assumed.network.slower(case.slower_network))
    return changed if case.is_hidden else replace(changed, overlap=0.0)


def real_over_full(model: Model, lengths: np.ndarray) -> float:
    """FLOPs of a mean real cell over those of a full one, both with the masked positions predicted
    only: packed, a GPU's time is assumed to follow them."""
    costs = Costs.of(model.shape)
    return float(costs.of_cells(lengths).mean() / costs.of_cells(np.array([SEQ_LENGTH]))[0])


def loader_s(
    loader: Loader, global_batch: int, share: float, is_packed: bool, case: Case = AS_ASSUMED
) -> float:
    """Seconds per step of one rank's loader.

    The store is read by spans. Packed, a rank's cells come from every span of a window, so it reads
    them all; padded, it meets one of every gcd(spans, ranks) (see feed/order.py)."""
    met = 1 if is_packed else math.gcd(WINDOW_SPANS, round(global_batch / share))
    seconds = loader.places_s + share / loader.cells_per_s
    if is_packed:
        seconds += loader.whole_batch_s + (loader.sums_s if case.first_epoch else 0.0)
    if case.from_store:
        seconds += loader.store_cell_s * global_batch / met
    return seconds * case.slower_loader


def all_rows(inputs: Inputs) -> list[dict[str, Any]]:
    """Every GPU, model, way and number of nodes."""
    return [
        row(inputs, gpu, model, nodes, is_packed)
        for gpu in GPUS
        for model in MODELS.values()
        for is_packed in (False, True)
        for nodes in NODES
    ]


def sensitivity(inputs: Inputs) -> list[dict[str, Any]]:
    """Every case, on the card's layouts."""
    return [
        {
            "case": case.name,
            "rows": [
                row(inputs, gpu, model, model.nodes, is_packed, case)
                for gpu in GPUS
                for model in MODELS.values()
                for is_packed in (False, True)
                if gpu == "A100" or not case.at_published_speed
            ],
        }
        for case in CASES
    ]


def beside_the_card(inputs: Inputs) -> list[dict[str, Any]]:
    """The card's runs, and the model's of the same steps on the same GPUs."""
    published = next(case for case in CASES if case.at_published_speed)
    found = []
    for model in MODELS.values():
        step_s, gpus = model.card_wall_s / STEPS, model.nodes * GPUS_PER_NODE
        rate = model.global_batch / step_s / gpus
        flops = padded_equivalent_flops(model.shape, SEQ_LENGTH)
        found.append(
            {
                "model": model.name,
                "gpus": gpus,
                "card_hours": model.card_wall_s / 3600,
                "card_step_s": step_s,
                "card_cells_per_s": rate * gpus,
                "card_cells_per_s_per_gpu": rate,
                "card_tflops_padded_equivalent": rate * flops / 1e12,
                "padded": row(inputs, "A100", model, model.nodes, False),
                "packed": row(inputs, "A100", model, model.nodes, True),
                "published": row(inputs, "A100", model, model.nodes, False, published),
            }
        )
    return found
