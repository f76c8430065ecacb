"""How long one optimizer step takes, on paper.

    cells of the fullest rank x seconds per cell          = compute   (with the waiting for it)
    + what of the all-reduce backward does not hide       = exposed
    + optimizer                                           = GPU's time
    max(GPU's time, the loader's time) / 0.96             = step

    all-reduce = 2 (p-1)/p S / NVLink  +  2 (N-1)/N (S/p) / InfiniBand  +  (2p + 2N) latency
    exposed    = max(all-reduce - 0.9 x 0.66 x compute of the last micro batch, 6 % of all-reduce)

p GPUs per node, N nodes, S = 4 bytes per parameter. Every GPU holds the whole model: at these sizes
tensor and pipeline parallelism never pay. A pure function of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.scaling_model.hardware import GPUS_PER_NODE, Network

BYTES_PER_GRADIENT = 4
"""Gradients are added up in fp32. (Sharing out the optimizer sends them once in fp32 and the
weights once in bf16, three quarters of this: the model is on the safe side.)"""
OPTIMIZER_BYTES = 30
"""Read and written per parameter by AdamW in mixed precision: gradient 4, fp32 weight 4 + 4, two
moments 8 + 8, bf16 weight 2. Counted, not measured."""


@dataclass(frozen=True)
class Assumptions:
    """What the terms of a step rest on besides the speed of a GPU."""

    network: Network = field(default_factory=Network)
    overlap: float = 0.9
    """Share of the backward pass in which gradients can travel: the last ones come at its end."""
    backward: float = 0.66
    """Share of the compute that is backward: two of three multiplications."""
    least_exposed: float = 0.06
    """Share of the all-reduce that is never hidden (the last bucket)."""
    sustained: float = 0.96
    """A long run's mean speed over that of its best steps: logging, checkpoints, stragglers.
    BioNeMo's ESM-2 3B keeps 96.85 % of linear from 8 to 256 GPUs."""
    optimizer_s: float = 1.5e-3
    """Clipping and AdamW's kernels whatever their size: starts and one wait for the norm. An
    estimate, not measured."""


@dataclass(frozen=True)
class Job:
    """What a layout does in one step.

    cells_per_rank:  mean over ranks
    micro_batches:   per rank
    cell_s:          seconds of a GPU per mean cell
    imbalance:       work of the rank that has most / mean work, at least 1
    loader_s:        seconds in which a rank's loader makes one step
    memory_bytes_s:  of a GPU
    """

    num_parameters: int
    nodes: int
    cells_per_rank: float
    micro_batches: int
    cell_s: float
    imbalance: float
    loader_s: float
    memory_bytes_s: float

    @property
    def ranks(self) -> int:
        """GPUs."""
        return self.nodes * GPUS_PER_NODE


@dataclass(frozen=True)
class Terms:
    """A step in seconds, term by term.

    compute_s:     of the slowest rank; waiting_s of it the others wait
    all_reduce_s:  all of it; exposed_s is what nothing hides
    gpu_s:         compute + exposed + optimizer
    step_s:        the longer of gpu_s and loader_s, over the sustained share
    """

    compute_s: float
    waiting_s: float
    all_reduce_s: float
    exposed_s: float
    optimizer_s: float
    gpu_s: float
    loader_s: float
    step_s: float
    cells_per_s: float
    bound: str


def all_reduce_s(num_bytes: float, nodes: int, network: Network) -> float:
    """Seconds to add up `num_bytes` over all GPUs: within nodes, between them, and back."""
    p = GPUS_PER_NODE
    within = 2 * (p - 1) / p * num_bytes / network.nvlink_bytes_s
    between = 2 * (nodes - 1) / nodes * num_bytes / p / network.ib_bytes_s
    return within + between + (2 * p + 2 * nodes) * network.latency_s


def step(job: Job, assumed: Assumptions) -> Terms:
    """The terms of one step of `job`."""
    balanced_s = job.cells_per_rank * job.cell_s
    compute_s = balanced_s * job.imbalance
    reduce_s = all_reduce_s(BYTES_PER_GRADIENT * job.num_parameters, job.nodes, assumed.network)
    # With several micro batches gradients are complete in the last one only.
    hidden_s = assumed.overlap * assumed.backward * compute_s / job.micro_batches
    exposed_s = max(reduce_s - hidden_s, assumed.least_exposed * reduce_s)
    # Every rank updates its part of the parameters.
    updated = OPTIMIZER_BYTES * job.num_parameters / job.ranks
    optimizer_s = assumed.optimizer_s + updated / job.memory_bytes_s
    gpu_s = compute_s + exposed_s + optimizer_s
    step_s = max(gpu_s, job.loader_s) / assumed.sustained
    return Terms(
        compute_s=compute_s,
        waiting_s=compute_s - balanced_s,
        all_reduce_s=reduce_s,
        exposed_s=exposed_s,
        optimizer_s=optimizer_s,
        gpu_s=gpu_s,
        loader_s=job.loader_s,
        step_s=step_s,
        cells_per_s=job.cells_per_rank * job.ranks / step_s,
        bound="GPU" if gpu_s >= job.loader_s else "loader",
    )
