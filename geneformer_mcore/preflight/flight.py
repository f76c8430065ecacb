"""All checks in their order, on all ranks.

    meet -> nodes, cells, clocks, run folder -> rank 0: table, findings
         -> process groups, all-reduce       -> rank 0: the rest      -> exit code of every rank

What can be told without a process group is told before there is one: it is what makes one hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from geneformer_mcore.checkpoint import manager
from geneformer_mcore.config import Config
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.distributed.watchdog import Watchdog
from geneformer_mcore.exit_codes import FINISHED, WRONG_INPUT
from geneformer_mcore.preflight import cells, clocks, node, reduce, shared_folder, table, verdicts
from geneformer_mcore.preflight.cells import Seen
from geneformer_mcore.preflight.clocks import Offset
from geneformer_mcore.preflight.exchange import Exchange
from geneformer_mcore.preflight.finding import Finding, State, skipped
from geneformer_mcore.preflight.node import Node
from geneformer_mcore.preflight.reduce import Reduced
from geneformer_mcore.preflight.shared_folder import Shared, Traces
from geneformer_mcore.preflight.verdicts import Member

LIMIT_S = 30
"""Seconds in which every rank must get on with a check, at most; parallel.timeout_s if less."""
_MEET_S = 240
"""For ranks to start: on a cold network disk imports alone take half of that."""
_HINDER = ("network", "GPUs")
"""Checks without which process groups would hang, or fail without saying why."""

Say = Callable[[str], None]


def fly(
    config: Config, text: str, watch: Watchdog, traces: Traces, say: Say
) -> tuple[int, dict[str, Any]]:
    """The exit code, equal on all ranks, and on rank 0 the whole result, fit for JSON.

    text: the settings as written. say: called on rank 0 with what is to be printed.
    """
    began = time.monotonic()
    watch.doing("meeting the other ranks", limit_s=_MEET_S)
    meeting = groups.meet(config.parallel, watch)
    exchange = Exchange(meeting)
    members, shared = look(exchange, config, text, watch, traces)
    findings: list[Finding] = []
    if exchange.is_first and shared is not None:
        findings = judge(config, members, shared)
        say(table.text(members, shared) + "\n")
        say(table.findings_text(findings))
    watch.doing("waiting for what rank 0 makes of the nodes")
    hindered = [each.check for each in findings if _hinders(each)]
    hindered = exchange.from_first(hindered)
    if hindered:
        sums = [skipped("all-reduce", f"{', '.join(hindered)} must be mended first")]
    else:
        sums = verdicts.judge_sums(_reduce(exchange, meeting, config, watch))
    if exchange.is_first:
        findings += sums
        failing = sum(each.state is State.fails for each in findings)
        say(table.findings_text(sums))
        say(f"\n{failing} of {len(findings)} checks fail, {time.monotonic() - began:.1f} s")
    watch.doing("telling each other how it ended")
    failing = any(each.state is State.fails for each in findings)
    code = exchange.from_first(WRONG_INPUT if failing else FINISHED)
    exchange.to_first(None)  # rank 0 may hold the store: it leaves last
    result = as_json(members, shared, findings) if shared is not None else {}
    return code, result | {"exit_code": code, "seconds": round(time.monotonic() - began, 3)}


def look(
    exchange: Exchange, config: Config, text: str, watch: Watchdog, traces: Traces
) -> tuple[list[Member], Shared | None]:
    """The nodes of the job on rank 0, and what they say of the run folder."""
    here = node.look(text)
    leads = here.local_rank == 0 or exchange.is_first
    # The first exchange is where ranks wait for those that still start.
    nodes = [Node(**each) for each in exchange.to_first(asdict(here))]
    watch.doing(f"looking at data.store={config.data.store}")
    seen = exchange.to_first(asdict(cells.look(config)) if leads else None)
    watch.doing("waiting for the other nodes to look at data.store")
    leaders = exchange.from_first([rank for rank, each in enumerate(seen) if each])
    watch.doing("comparing clocks")
    offsets = exchange.to_first(asdict(clocks.measure(exchange, leaders)))
    watch.doing(f"writing and reading in run.dir={config.run.dir}")
    shared = shared_folder.check(exchange, Path(config.run.dir).absolute(), leads, traces)
    return members_of(nodes, seen, offsets), shared


def members_of(
    nodes: Sequence[Node], seen: Sequence[dict | None], offsets: Sequence[dict]
) -> list[Member]:
    """Ranks by node: of equal number, on one machine. Only first ranks have looked at the cells."""
    ranks: dict[tuple, list[int]] = {}
    for rank, each in enumerate(nodes):
        ranks.setdefault((each.number, *each.machine, each.host), []).append(rank)
    members = []
    for of_node in ranks.values():
        first = next((rank for rank in of_node if seen[rank]), of_node[0])
        ordered = [first, *(rank for rank in of_node if rank != first)]
        found = Seen(**(seen[first] or {"problem": "no rank of it has LOCAL_RANK 0"}))
        members.append(Member(nodes[first], ordered, found, Offset(**offsets[first])))
    return sorted(members, key=lambda each: (each.node.number, each.ranks))


def judge(config: Config, members: Sequence[Member], shared: Shared) -> list[Finding]:
    """All findings but those of the all-reduce."""
    folder = Path(config.run.dir).absolute()
    there = manager.bytes_there(folder / "checkpoints")
    cached = [verdicts.judge_cache(members, config.data.cache_dir)] if config.data.cache_dir else []
    return [
        verdicts.judge_cells(members, config.data.store),
        *verdicts.judge_folder(members, shared, folder),
        verdicts.judge_room(config, members, shared, there),
        *cached,
        verdicts.judge_clocks(members),
        verdicts.judge_versions(members),
        verdicts.judge_gpus(members),
        verdicts.judge_network(members),
    ]


def _hinders(finding: Finding) -> bool:
    return finding.state is State.fails and finding.check in _HINDER


def _reduce(
    exchange: Exchange, meeting: groups.Rendezvous, config: Config, watch: Watchdog
) -> list[list[Reduced]]:
    """What every rank found in its groups, on rank 0."""
    watch.doing("building the process groups")
    here = device.start()
    groups.join(meeting, here, config.parallel, backstop_s=2 * LIMIT_S)
    found = reduce.check(groups.named_groups(), here, watch.doing)
    watch.doing("waiting for the all-reduces of the others")
    results = exchange.to_first([asdict(each) for each in found])
    groups.stop()
    return [[Reduced(**each) for each in of_rank] for of_rank in results]


def as_json(
    members: Sequence[Member], shared: Shared, findings: Sequence[Finding]
) -> dict[str, Any]:
    """{"nodes": [...], "checks": [...]}."""
    nodes = []
    for each in members:
        view = shared.views.get(each.ranks[0])
        nodes.append(asdict(each) | {"run_folder": asdict(replace(view)) if view else None})
    checks = [
        {"check": each.check, "state": each.state.value, "text": each.text} for each in findings
    ]
    return {"nodes": nodes, "checks": checks}
