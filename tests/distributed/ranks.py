"""Runs a function on several real ranks (gloo), with a time limit and errors that name the rank.

Ranks are forked from a fork server, a process that has imported torch and Megatron-Core and done
nothing else: starting a rank takes 15 ms of CPU, a first model and step on it 0.2 s. Neither TileDB
nor threads of the test process can hang it. They meet through a file, so no port is opened.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from geneformer_mcore.backends import ignore_known_warnings

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.distributed.preload"])


def run_ranks(function: Callable, world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """[function(*args) of rank 0, of rank 1, ...]. The function must be importable; what it
    returns is pickled. Fails with the traceback of the first rank that raised, or on a timeout."""
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(function, rank, world_size, folder, sender, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _results(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


Call = tuple[Callable[..., Any], tuple]
"""A function and its arguments."""


def in_turn(*calls: Call) -> list[Any]:
    """For run_ranks: what each of `calls` returns, one after the other on ranks started once."""
    return [function(*args) for function, args in calls]


def _results(pipes: list, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        left = deadline - time.monotonic()
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=max(0, left))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting)} did not end in time")
        for rank, pipe in list(waiting.items()):
            if pipe in ready:
                results[rank] = _receive(rank, pipe)
                del waiting[rank]
    return [results[rank] for rank in range(len(pipes))]


def _receive(rank: int, pipe: Any) -> Any:
    try:
        failed, value = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died without a word") from None
    if failed:
        raise AssertionError(f"rank {rank}:\n{value}")
    return value


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, sender: Any, args: tuple
) -> None:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="geneformer_mcore")
    ignore_known_warnings()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        sender.send((False, _started(function, rank, world_size, Path(folder), args)))
    except BaseException:
        sender.send((True, traceback.format_exc()))


def _started(function: Callable, rank: int, world_size: int, folder: Path, args: tuple) -> Any:
    import torch.distributed as dist

    from geneformer_mcore.distributed import device

    device.start(threads=1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "meeting"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    return function(*args)
