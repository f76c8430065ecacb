"""All checks in order, on all ranks; those without a process group first, as that may hang.

rendezvous -> nodes, cells, clocks, run directory -> rank 0: table, findings
           -> process groups, all-reduce          -> rank 0: the rest  -> exit code of all ranks
"""

from __future__ import annotations

import fcntl
import json
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from geneformer_mcore.checkpoint import manager
from geneformer_mcore.config import Config
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.distributed.watchdog import Watchdog
from geneformer_mcore.exit_codes import FINISHED, WRONG_INPUT
from geneformer_mcore.io.files import free_bytes
from geneformer_mcore.preflight import checks, node
from geneformer_mcore.preflight.checks import Finding, Reduced, State
from geneformer_mcore.preflight.node import Member, Node, Offset, Seen, View

LIMIT_S = 30
"""Seconds for one check, at most; parallel.timeout_s if less."""
_MEET_S = 240
"""For ranks to start: imports from a cold network disk take half of it."""
_HINDER = ("network", "GPUs")
"""Checks without which process groups would hang."""
_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
_TIMES = 5
_LOOK_S = 0.2
_TRIPS = 8
now = time.time


class Exchange:
    """JSON messages by the rendezvous store, without a process group. All ranks make the same
    calls in the same order."""

    def __init__(self, meeting: groups.Rendezvous) -> None:
        self.rank, self.world_size = meeting.rank, meeting.world_size
        self.is_first = self.rank == 0
        self._store = PrefixStore("preflight", meeting.store)
        self._calls = 0

    def gather(self, value: Any = None) -> list[Any]:
        """Every rank's `value`, in order of rank, on rank 0; an empty list elsewhere."""
        self._calls += 1
        self._store.set(f"{self._calls}/{self.rank}", json.dumps(value, default=asdict))
        ranks = range(self.world_size) if self.is_first else []
        return [json.loads(self._store.get(f"{self._calls}/{rank}")) for rank in ranks]

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's `value` on every rank."""
        self._calls += 1
        if self.is_first:
            self._store.set(f"{self._calls}", json.dumps(value, default=asdict))
        return json.loads(self._store.get(f"{self._calls}"))


@dataclass
class Traces:
    """Files and folders (innermost first) that preflight created; foreign files stay."""

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    def clear(self) -> None:
        """Remove them, at any time, from any thread. Never raises."""
        for path in self.files:
            with suppress(OSError):
                path.unlink()
        for path in self.folders:
            with suppress(OSError):
                path.rmdir()


def check(
    config: Config, text: str, watch: Watchdog, traces: Traces, log: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    """The exit code, equal on all ranks, and on rank 0 the whole result, fit for JSON.
    text: the settings as written;  log: prints, on rank 0"""
    began = time.monotonic()
    watch.doing("meeting the other ranks", limit_s=_MEET_S)
    meeting = groups.meet(config.parallel, watch)
    exchange = Exchange(meeting)
    members = look(exchange, config, text, watch, traces)
    findings: list[Finding] = []
    if exchange.is_first:
        there = manager.bytes_there(Path(config.run.dir).absolute() / "checkpoints")
        findings = checks.judge(config, members, there)
        log(node.table(members) + "\n")
        log("\n".join(map(str, findings)))
    watch.doing("waiting for rank 0's findings")
    failing = [each.check for each in findings if each.state is State.fails]
    hindered = exchange.broadcast([check for check in failing if check in _HINDER])
    if hindered:
        sums = [checks.skipped("all-reduce", f"{', '.join(hindered)} must be mended first")]
    else:
        sums = checks.judge_sums(_reduce(exchange, meeting, config, watch))
    if exchange.is_first:
        findings += sums
        failing = [each.check for each in findings if each.state is State.fails]
        log("\n".join(map(str, sums)))
        log(f"\n{len(failing)} of {len(findings)} checks fail, {time.monotonic() - began:.1f} s")
    watch.doing("exchanging the exit code")
    code = exchange.broadcast(WRONG_INPUT if failing else FINISHED)
    exchange.gather()  # rank 0 may hold the store: it leaves last
    result: dict[str, Any] = {}
    if exchange.is_first:
        result = {"nodes": list(map(asdict, members)), "checks": list(map(asdict, findings))}
    return code, result | {"exit_code": code, "seconds": round(time.monotonic() - began, 3)}


def look(
    exchange: Exchange, config: Config, text: str, watch: Watchdog, traces: Traces
) -> list[Member]:
    """The nodes of the job, on rank 0."""
    here = node.look(text)
    leads = here.local_rank == 0 or exchange.is_first
    # The first exchange is where ranks wait for those that still start.
    nodes = [Node(**each) for each in exchange.gather(here)]
    watch.doing(f"looking at data.store={config.data.store}")
    seen = exchange.gather(node.look_at_cells(config) if leads else None)
    watch.doing("waiting for the other nodes to look at data.store")
    exchange.broadcast()
    watch.doing("comparing clocks")
    offsets = compare_clocks(exchange)
    watch.doing(f"writing and reading in run.dir={config.run.dir}")
    try:
        views = _share(exchange, Path(config.run.dir).absolute(), leads, traces)
    finally:
        traces.clear()
    return members_of(nodes, seen, offsets, views)


def members_of(
    nodes: Sequence[Node],
    seen: Sequence[dict | None],
    offsets: Sequence[Offset],
    views: dict[int, View],
) -> list[Member]:
    """Ranks grouped by node. Only first ranks have looked at the cells."""
    ranks: dict[tuple, list[int]] = {}
    for rank, each in enumerate(nodes):
        ranks.setdefault((each.number, *each.machine, each.host), []).append(rank)
    members = []
    for of_node in ranks.values():
        first = next((rank for rank in of_node if seen[rank]), of_node[0])
        ordered = [first, *(rank for rank in of_node if rank != first)]
        found = Seen(**(seen[first] or {"problem": "no rank of it has LOCAL_RANK 0"}))
        members.append(Member(nodes[first], ordered, found, offsets[first], views.get(first)))
    return sorted(members, key=lambda each: (each.node.number, each.ranks))


def compare_clocks(exchange: Exchange) -> list[Offset]:
    """Every rank's offset, on rank 0; all ranks call it together. By the store, the shortest of
    some round trips (Cristian 1989, "Probabilistic clock synchronization"): a busy node must not
    pass for one whose clock is off."""
    trips = []
    for _ in range(_TRIPS):
        sent = now()
        exchange.broadcast()
        theirs, back = exchange.gather(now()), now()
        # Known to half the duration of the round trip.
        others = [Offset(there - (sent + back) / 2, (back - sent) / 2) for there in theirs[1:]]
        trips.append([Offset(), *others])
    shortest = min(trips, key=lambda trip: trip[-1].uncertainty_s)
    return shortest if exchange.is_first else []


def _share(exchange: Exchange, folder: Path, looks: bool, traces: Traces) -> dict[int, View]:
    """Views of the run directory by rank, on rank 0; no file of a run is touched.

        rank 0 writes a file  ->  ranks that `looks` read it, and write one  ->  rank 0 reads those

    No rank looks before rank 0 has written: network file systems cache for up to a minute that a
    file was missing.
    """
    nonce, problem = secrets.token_hex(16), ""
    if exchange.is_first:
        problem = _write(folder, nonce, 0, traces)
    nonce, problem_of_first = exchange.broadcast([nonce, problem])
    view = None
    if looks:
        sees = not problem_of_first and bool(_wait_for(folder, nonce, {0}))
        if not exchange.is_first:
            problem = _write(folder, nonce, exchange.rank, traces)
        view = View(problem, sees, False, free_bytes(folder), is_locked(folder / ".lock"))
    answers = exchange.gather(view)
    views = {rank: View(**answer) for rank, answer in enumerate(answers) if answer}
    seen = _wait_for(folder, nonce, {rank for rank, each in views.items() if not each.problem})
    # Files go before the folder does: rank 0 waits for the others.
    exchange.broadcast()
    if not exchange.is_first:
        traces.clear()
    exchange.gather()
    return {rank: replace(each, seen=rank in seen) for rank, each in views.items()}


def _write(folder: Path, nonce: str, rank: int, traces: Traces) -> str:
    """Why this rank's file cannot be written, or "". Rank 0 creates the folder."""
    try:
        if rank == 0:
            # Noted first, as only some of them may be created.
            traces.folders += [each for each in (folder, *folder.parents) if not each.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".preflight_{nonce}_{rank}"
        traces.files.append(path)
        with path.open("w", encoding="utf-8") as file:
            file.write(nonce)
            # As a run does: some network file systems are mounted without locks.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _wait_for(folder: Path, nonce: str, ranks: set[int]) -> set[int]:
    """Ranks whose files appear with their content within SEE_S seconds."""
    deadline = time.monotonic() + checks.SEE_S
    seen: set[int] = set()
    while True:
        with suppress(OSError):
            # Listing a folder makes a network file system refresh it.
            list(folder.iterdir())
        for rank in ranks - seen:
            with suppress(OSError):
                if (folder / f".preflight_{nonce}_{rank}").read_text(encoding="utf-8") == nonce:
                    seen.add(rank)
        if seen == ranks or time.monotonic() > deadline:
            return seen
        time.sleep(_LOOK_S)


def is_locked(path: Path) -> bool:
    """Whether a process, on any machine, holds the lock of `path`. It is shared for an instant, so
    that nodes which look do not see each other."""
    try:
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def _reduce(
    exchange: Exchange, meeting: groups.Rendezvous, config: Config, watch: Watchdog
) -> list[list[Reduced]]:
    """Every rank's all-reduces in its groups, on rank 0."""
    watch.doing("building the process groups")
    here = device.start()
    groups.join(meeting, here, config.parallel, backstop_s=2 * LIMIT_S)
    found = reduce_in(groups.named_groups(), here, watch.doing)
    watch.doing("waiting for the all-reduces of the others")
    results = exchange.gather(found)
    groups.stop()
    return [[Reduced(**each) for each in of_rank] for of_rank in results]


def reduce_in(
    found: dict[str, dist.ProcessGroup], device: torch.device, doing: Callable[[str], None]
) -> list[Reduced]:
    """All-reduces in this rank's groups; all ranks call it together. doing: the watchdog's."""
    results = []
    for name, group in found.items():
        ranks = dist.get_process_group_ranks(group)
        doing(f"the all-reduce of the {name} group ({checks.named(ranks)})")
        found_sum = _sum(group, ranks, device) if len(ranks) > 1 else (True, 0.0)
        results.append(Reduced(name, ranks, *found_sum, _BYTES[device.type]))
    return results


def _sum(group: dist.ProcessGroup, ranks: list[int], device: torch.device) -> tuple[bool, float]:
    """Whether all sums are right, and the median seconds of one."""
    values = torch.empty(_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    # Small whole numbers, whose sum is exact in any order.
    number, expected = ranks.index(dist.get_rank()) + 1, len(ranks) * (len(ranks) + 1) / 2
    is_right, seconds = True, []
    for _ in range(1 + _TIMES):
        values.fill_(number)
        torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        is_right &= bool((values == expected).all())
    # The first one sets up connections.
    return is_right, statistics.median(seconds[1:])
