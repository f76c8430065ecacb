"""Starts of launch/pretrain.py in a second and not in ten: forked from a warm process.

    Run(folder, settings).start(*more, ranks, trouble)  ->  signal, wait  ->  exit codes
    Run(folder, settings).check(*more, ranks, trouble, code=0)  ->  what was printed

What is forked has imported all that a run needs and done nothing (tests/distributed/preload.py);
from `main` on everything is as it is in a command. Several ranks meet in a store of this process,
as they meet in torchrun's. `trouble` is done in a rank before `main`: it prepares what shall go
wrong, and where.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from geneformer_mcore.checkpoint import folder as checkpoints
from tests.distributed.ranks import context
from tests.end_to_end.instants import before as before
from tests.support.final_state import FinalState, final_state
from tests.support.two_hosts import ADDRESSES, PORT, TwoHosts, enter

SETTINGS = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=2",
    "data.seq_length=100",
    "data.span_cells=16",
    "train.precision=fp32",
    "train.micro_batch_size=8",
    "train.global_batch_size=16",
)
"""A small model on the small store of conftest.py."""

Trouble = tuple[Callable[..., None], *tuple[Any, ...]]
"""A function, which must be importable, and what it is called with behind the rank."""


class Start:
    """The ranks of one start."""

    def __init__(self, processes: list[BaseProcess], printed: Path, *kept: Any) -> None:
        """kept: what must live as long as they do."""
        self._processes, self._file, self._kept = processes, printed, kept
        self.printed = ""
        """What all ranks have printed by their end, errors too."""

    def signal(self, number: signal.Signals, rank: int) -> None:
        """To one rank."""
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_for(self, path: Path, timeout_s: float = 120) -> None:
        """Until the file is there; fails if a rank ends before."""
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            ended = [process.exitcode for process in self._processes]
            assert ended == [None] * len(ended), f"{ended} before {path}:\n{self._file.read_text()}"
            assert time.monotonic() < deadline, f"no {path}:\n{self._file.read_text()}"
            time.sleep(0.01)

    def is_running(self, wait_s: float) -> bool:
        """Whether a rank still runs after that time."""
        deadline = time.monotonic() + wait_s
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
        return any(process.is_alive() for process in self._processes)

    def kill(self) -> None:
        """All ranks at once."""
        for process in self._processes:
            process.kill()
        self.wait()

    def wait(self, timeout_s: float = 120) -> list[int | None]:
        """The exit code of each rank; those that have not ended in time are killed and fail."""
        self.is_running(timeout_s)
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
            process.join()
        self.printed = self._file.read_text()
        for kept in self._kept:
            if hasattr(kept, "close"):
                kept.close()
        assert None not in codes, f"not ended in time: {codes}\n{self.printed}"
        return codes


@dataclass(frozen=True)
class Run:
    """A run folder, and the settings of its starts."""

    folder: Path
    settings: tuple[str, ...]

    def start(
        self,
        *more: str,
        ranks: int = 1,
        trouble: Trouble | None = None,
        printed: Path | None = None,
        command: str = "pretrain",
        hosts: TwoHosts | None = None,
    ) -> Start:
        """Starts `ranks` ranks; one is started without torchrun's environment.

        printed: where they print to; else a file that is not on the disk of the folder
        command: another one of launch/ that takes the same arguments
        hosts: each of two ranks runs on a host of its own, and the store is rank 0's
        """
        store, where = None, {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": 1 if hosts else ranks}
        if hosts is not None:
            where |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}
        elif ranks > 1:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
            where |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
        own = tempfile.NamedTemporaryFile()  # noqa: SIM115  it goes with the Start
        printed = printed or Path(own.name)
        processes: list[BaseProcess] = []
        for rank in range(ranks):
            here = where | {"RANK": rank, "LOCAL_RANK": 0 if hosts else rank}
            names = {name: str(value) for name, value in here.items()} if ranks > 1 else {}
            on = (hosts.names[rank], rank) if hosts is not None else None
            given = (command, self.words(*more), names, printed, rank, trouble, on)
            process = context.Process(target=_rank, args=given, daemon=True)
            process.start()
            processes.append(process)
        return Start(processes, printed, store, own)

    def check(self, *more: str, code: int = 0, ranks: int = 1, **others: Any) -> str:
        """What a start has printed, all ranks of which must end with `code`."""
        started = self.start(*more, ranks=ranks, **others)
        assert started.wait() == [code] * ranks, started.printed
        assert code == 1 or "Traceback" not in started.printed
        return started.printed

    def words(self, *more: str) -> list[str]:
        """The arguments of a start."""
        return [f"run.dir={self.folder}", *SETTINGS, *self.settings, *more]

    def at(self, folder: Path) -> Run:
        """The same settings in another folder."""
        return replace(self, folder=folder)

    def outcome(self) -> dict[str, Any]:
        """What outcome.json holds."""
        return json.loads((self.folder / "outcome.json").read_text())

    def records(self, of: str = "") -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl, or those of them that have the key `of`."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in found if not of or of in record]

    def newest(self) -> int:
        """The step of the newest checkpoint, which verifies, as all do; 0 if there is none."""
        folder, damaged = checkpoints.newest_good(self.folder / "checkpoints")
        assert damaged == []
        return int(folder.name.removeprefix("step_")) if folder else 0

    def state(self) -> FinalState:
        """What it has left at its end."""
        return final_state(self.folder)


def _rank(
    command: str,
    arguments: list[str],
    environment: dict[str, str],
    printed: Path,
    rank: int,
    trouble: Trouble | None,
    on: tuple[str, int] | None,
) -> None:
    if on is not None:
        enter(*on)
    os.environ.update(environment)
    into = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(into, stream)
    module = importlib.import_module(f"launch.{command}")
    from geneformer_mcore.distributed import device
    from geneformer_mcore.training import setup

    # The device's peak is for MFU alone, and takes most of a second to measure.
    setup.measured_peak = lambda *_: 1e12  # type: ignore[assignment]
    # With more threads small products only wait for each other, and for whatever else runs here.
    device._fair_threads = lambda: 1
    if trouble is not None:
        cause, *args = trouble
        cause(rank, *args)
    sys.argv = [f"{command}.py", *arguments]
    sys.exit(module.main())
