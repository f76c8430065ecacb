"""Process groups of a run: torch.distributed, Megatron's model-parallel groups, random states.

torchrun environment -> init_process_group (gloo or nccl) -> tp x pp x dp groups -> Topology
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from geneformer_mcore.config.sections import ParallelConfig
from geneformer_mcore.distributed import launcher

if TYPE_CHECKING:
    from geneformer_mcore.distributed.watchdog import Watchdog

BACKSTOP_S = 3600.0
"""Time limit of a collective: a backstop behind the watchdog, which names the reason."""


@dataclass(frozen=True)
class Topology:
    """This rank's coordinates."""

    rank: int
    world_size: int
    tensor_rank: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the prediction head, and so losses."""
        return self.pipeline_rank == self.pipeline_size - 1


@dataclass(frozen=True)
class Rendezvous:
    """The key-value store of the ranks, before there is a process group."""

    store: Store
    rank: int
    world_size: int


def start(
    device: torch.device,
    parallel: ParallelConfig,
    watch: Watchdog | None = None,
    backstop_s: float = BACKSTOP_S,
) -> Topology:
    """Join the other ranks and build all groups, once, after `config.plan`.

    watch: ends the job if a rank does not come within `parallel.timeout_s` seconds, naming it. On
    one machine nothing listens to other machines.
    """
    return join(meet(parallel, watch), device, parallel, backstop_s)


def meet(parallel: ParallelConfig, watch: Watchdog | None = None) -> Rendezvous:
    """The first half of `start`: the store, and the watchdog's connection to it."""
    if "RANK" not in os.environ:  # one process, without torchrun: nothing to meet
        meeting = Rendezvous(HashStore(), 0, 1)
    else:
        launcher.follow(parallel.timeout_s)
        launcher.reach_store()
        limit = timedelta(seconds=parallel.timeout_s)
        store, rank, world_size = next(rendezvous("env://", timeout=limit))
        # A restart by torchrun may keep the store of the attempt before.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if watch is not None and world_size > 1:
            apart = store.clone()
            watch.join(PrefixStore(f"watch_{attempt}", apart), rank, world_size)
        meeting = Rendezvous(PrefixStore(f"attempt_{attempt}", store), rank, world_size)
    _choose_interface(meeting.world_size)
    return meeting


def join(
    meeting: Rendezvous,
    device: torch.device,
    parallel: ParallelConfig,
    backstop_s: float = BACKSTOP_S,
) -> Topology:
    """The second half of `start`: the process groups."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=meeting.store,
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=timedelta(seconds=backstop_s),
    )
    return build_groups(parallel, backstop_s)


def _choose_interface(world_size: int) -> None:
    """Set gloo's and NCCL's interface: loopback on one machine, else the one to the master."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) != world_size:
        # Imported here, as a benchmark on a bare machine has no psutil.
        from geneformer_mcore.distributed import network

        network.choose()
    elif sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")


def build_groups(parallel: ParallelConfig, backstop_s: float = BACKSTOP_S) -> Topology:
    """Megatron's groups over an initialised torch.distributed, in its order tp - dp - pp."""
    chunks = parallel.virtual_pipeline
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        distributed_timeout_minutes=math.ceil(backstop_s / 60),
        create_gloo_process_groups=False,
    )
    return topology()


def topology() -> Topology:
    """This rank's topology, once the groups are built."""
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def named_groups() -> dict[str, dist.ProcessGroup]:
    """This rank's groups of training, in the same order on every rank."""
    return {
        "world": dist.group.WORLD,
        "tensor parallel": parallel_state.get_tensor_model_parallel_group(),
        "pipeline parallel": parallel_state.get_pipeline_model_parallel_group(),
        "data parallel": parallel_state.get_data_parallel_group(),
    }


def seed_dropout(seed: int, topology: Topology) -> None:
    """Seed dropout, the only user of this state. Ranks of one tensor group agree on what they share
    and differ on what they split; data-parallel ranks and pipeline stages all differ."""
    place = topology.pipeline_rank * topology.data_size + topology.data_rank
    # Megatron adds 2718 + tensor rank for the split parts: steps of 2**16 keep the seeds apart.
    tensor_parallel.model_parallel_cuda_manual_seed(
        (seed * 1_000_003 + place * 65_536) % 2**62, force_reset_rng=True
    )


def stop(stay: bool = False) -> None:
    """Leave all groups; with `stay` only the model-parallel ones."""
    parallel_state.destroy_model_parallel()
    if not stay and dist.is_initialized():
        dist.destroy_process_group()
