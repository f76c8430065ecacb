"""The device of a rank, and the adapter that lets Megatron-Core compute on a CPU.

    Megatron-Core  --device="cuda"-->  CudaMeansCpu  --device="cpu"-->  torch

Megatron-Core names CUDA (`torch.cuda.current_device()`, `device="cuda"`, `.cuda()`, tensor
types, random states); all else runs on a CPU with gloo. Without a GPU `start` enters the mode once
per process, for its thread; on a CPU the backward pass runs in the calling thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def start(threads: int = 0) -> torch.device:
    """This rank's device, ready for Megatron-Core: `cuda:LOCAL_RANK`, or the CPU without a GPU.
    threads: of this rank on a CPU; 0 shares the cores among the ranks of the machine"""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    # Before the first matrix product: MKL may otherwise take fewer threads, add up in another
    # order, and a resumed run would not be bitwise (Intel's conditions for that).
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    torch.set_num_threads(threads or _fair_threads())
    _answer_for_cuda()
    return _CPU


class CudaMeansCpu(TorchFunctionMode):
    """Replaces CUDA devices in torch calls by the CPU."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(argument) for argument in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    if isinstance(device, str) and device.startswith("cuda"):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


def _fair_threads() -> int:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


_entered: list[CudaMeansCpu] = []


def _answer_for_cuda() -> None:
    if _entered:
        return
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(state)

    stand_ins = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    # It warns when the CPU's random state moves inside its "GPU" context.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    mode = CudaMeansCpu()
    mode.__enter__()
    _entered.append(mode)
