"""Findings from the nodes' reports, one per check. Pure functions, run on rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from geneformer_mcore.checkpoint import manager
from geneformer_mcore.config import Config
from geneformer_mcore.preflight.node import Member, Node

MAX_OFFSET_S = 1.0
"""Beyond it, files' ages and logs of several nodes cannot be compared."""
SEE_S = 10.0
"""Time for another node's file to appear; network file systems cache folders for a few seconds."""
_MOST_NAMED, _MOST_RANKS = 6, 8


class State(StrEnum):
    """How a check ended."""

    ok = "ok"
    fails = "FAILS"
    skipped = "not checked"


@dataclass(frozen=True)
class Finding:
    """text: the result; on failure the rule, the numbers and the remedy."""

    check: str
    text: str
    state: State

    def __str__(self) -> str:
        return f"{self.state:<12} {self.check}: {self.text}"


ok = partial(Finding, state=State.ok)
fails = partial(Finding, state=State.fails)
skipped = partial(Finding, state=State.skipped)


def _either(check: str, is_bad: object, problem: str, good: str) -> Finding:
    return fails(check, problem) if is_bad else ok(check, good)


@dataclass(frozen=True)
class Reduced:
    """A rank's all-reduces in one group. seconds: median; 0 in a group of one rank."""

    group: str
    ranks: list[int]
    is_right: bool
    seconds: float
    num_bytes: int

    @property
    def bus_bytes_per_s(self) -> float:
        """nccl-tests' bus bandwidth, 2 (n - 1) / n x bytes / seconds; 0 for one rank."""
        n = len(self.ranks)
        return 2 * (n - 1) / n * self.num_bytes / self.seconds if self.seconds else 0.0


def judge(config: Config, members: Sequence[Member], bytes_there: int) -> list[Finding]:
    """All findings but the all-reduce's. bytes_there: of checkpoints in the run directory."""
    cached = [judge_cache(members, config.data.cache_dir)] if config.data.cache_dir else []
    return [
        judge_cells(members, config.data.store),
        *judge_folder(members, Path(config.run.dir).absolute()),
        judge_room(config, members, bytes_there),
        *cached,
        judge_clocks(members),
        judge_versions(members),
        judge_gpus(members),
        judge_network(members),
    ]


def judge_cells(members: Sequence[Member], where: str) -> Finding:
    blind = [f"{each}: {each.seen.problem}" for each in members if each.seen.problem]
    if blind:
        return fails(
            "cells",
            f"every node must see the cells of data.store={where}, and {len(blind)} of "
            f"{len(members)} cannot use them: {listed(blind)} Remedy: put data.store where all "
            "nodes see it, or copy it whole to each.",
        )
    groups = _sides((each.seen.hash[:12], each) for each in members)
    return _either(
        "cells",
        len(groups) > 1,
        f"all nodes must see the same cells, and data.store={where} is {len(groups)} different "
        f"ones: {_sides_text(groups)}. Remedy: copy one of them to the others.",
        f"{len(members)} node(s) see the same, {groups[0][0]}",
    )


def judge_cache(members: Sequence[Member], cache_dir: str) -> Finding:
    bad = [f"{each}: {each.seen.cache_problem}" for each in members if each.seen.cache_problem]
    if bad:
        return fails(
            "cache",
            f"data.cache_dir={cache_dir} must be a folder with room for a copy of the store on "
            f"every node, and is not on {len(bad)} of {len(members)}: {listed(bad)}. Remedy: make "
            "room, name another folder, or leave it empty.",
        )
    if any(each.seen.problem for each in members):
        return skipped("cache", "the size of the copy is unknown without the cells")
    there = sum(each.seen.cache == "there" for each in members)
    return ok("cache", f"the copy is there on {there} node(s), room for it on the others")


def judge_folder(members: Sequence[Member], folder: Path) -> list[Finding]:
    bad = [problem for problem in map(_folder_problem, members) if problem]
    users = [str(each) for each in members if each.run_folder and each.run_folder.locked]
    shared = _either(
        "run folder",
        bad,
        f"run.dir={folder} must be one folder that every node can write and all see, and "
        f"{len(bad)} of {len(members)} node(s) fail: {listed(bad)}. Remedy: fix its permissions, "
        "or name a folder on a file system that all nodes share.",
        f"{len(members)} node(s) write it and see each other's files",
    )
    free = _either(
        "run lock",
        users,
        f"one start at a time may use a run folder, and another start of the run in {folder} is "
        f"still going, as {listed(users, ', ')} can see. Remedy: wait for it, stop it, or choose "
        "another run.dir.",
        "no other start of this run is seen",
    )
    return [shared, free]


def _folder_problem(member: Member) -> str:
    view = member.run_folder
    if view is None:
        return f"{member} did not look"
    if view.problem:
        return f"{member} cannot write there: {view.problem}"
    if not view.sees:
        return f"{member} did not see rank 0's file within {SEE_S:g} s"
    return "" if view.seen else f"rank 0 did not see the file of {member} within {SEE_S:g} s"


def judge_room(config: Config, members: Sequence[Member], there: int) -> Finding:
    """there: bytes of checkpoints in the run directory."""
    vocabulary = next((each.seen.vocabulary_size for each in members if each.seen.hash), 0)
    view = next(each.run_folder for each in members if 0 in each.ranks)
    if not vocabulary or view is None or view.problem or view.free < 0:
        return skipped("room", "the cells and the run folder must be there first")
    world_size = sum(len(each.ranks) for each in members)
    one, number = manager.bytes_of_one(config, vocabulary, world_size), manager.most_at_once(config)
    needed = max(0, one * number - there)
    text = (
        f"up to {number} checkpoints of {one:,} bytes at a time (checkpoint.keep_last, keep_every, "
        f"keep_best, and the one being written), {there:,} bytes of them there: {needed:,} bytes "
        f"more, and {view.free:,} are free"
    )
    if view.free < needed:
        text = (
            f"run.dir must have room for {text}, {needed - view.free:,} missing. Remedy: make "
            "room, keep fewer checkpoints, or choose another run.dir."
        )
        return fails("room", text)
    return ok("room", text)


def judge_clocks(members: Sequence[Member]) -> Finding:
    off = [f"{each} {each.offset}" for each in members if abs(each.offset.seconds) > MAX_OFFSET_S]
    worst = max((each.offset for each in members), key=lambda offset: abs(offset.seconds))
    return _either(
        "clocks",
        off,
        f"the clocks of all nodes must be within {MAX_OFFSET_S:g} s of rank 0's, and {len(off)} of "
        f"{len(members)} are not: {listed(off)}. Remedy: run a time service (chrony, ntpd) on "
        "every node.",
        f"the furthest from rank 0's is {worst}",
    )


def judge_versions(members: Sequence[Member]) -> Finding:
    names = sorted({name for each in members for name in each.node.versions})
    differing = []
    for name in names:
        having = [each for each in members if name in each.node.versions]
        groups = _sides((each.node.versions[name], each) for each in having)
        if len(groups) > 1:
            differing.append(f"{name} {_sides_text(groups)}")
    return _either(
        "versions",
        differing,
        f"all nodes must have the same software and settings, and {len(differing)} of "
        f"{len(names)} differ: {listed(differing, ' | ')}. Remedy: install the same everywhere, or "
        "start all nodes from one shared environment.",
        f"{len(names)} are the same on all nodes",
    )


def judge_gpus(members: Sequence[Member]) -> Finding:
    groups = _sides((_gpus(each.node), each) for each in members)
    if len(groups) > 1:
        return fails(
            "GPUs",
            f"all nodes must have the same GPUs, driver and CUDA, and they differ: "
            f"{_sides_text(groups)}. Remedy: take nodes of one kind, or fix those on which GPUs "
            "are missing.",
        )
    short = [
        f"{each} has {len(each.ranks)} ranks, {len(each.node.gpus)} GPUs"
        for each in members
        if 0 < len(each.node.gpus) < len(each.ranks)
    ]
    return _either(
        "GPUs",
        short,
        f"every rank needs a GPU of its own: {listed(short)}. Remedy: start as many ranks per node "
        "as it has GPUs (torchrun --nproc_per_node).",
        f"{groups[0][0]} on every node",
    )


def _gpus(node: Node) -> str:
    details = f", driver {node.driver}, CUDA {node.cuda}" if node.gpus else ""
    return f"{node.models}{details}"


def judge_network(members: Sequence[Member]) -> Finding:
    machines = {each.node.machine for each in members}
    interfaces = sorted({each.node.interface or "?" for each in members})
    if len(machines) == 1:
        return ok("network", f"{len(members)} node(s) on one machine, over {interfaces[0]}")
    trapped = [
        f"{each}: {each.node.master} is {each.node.master_address}, interface {each.node.interface}"
        for each in members
        if _is_trapped(each.node)
    ]
    if trapped:
        return fails(
            "network",
            f"the {len(machines)} machines must reach each other, and on {len(trapped)} of "
            f"{len(members)} nodes the way to the master is the loopback interface: "
            f"{listed(trapped)}. "
            "Remedy: give the master by its address in the network (torchrun --rdzv-endpoint or "
            "--master-addr), or take the line 127.0.1.1 out of /etc/hosts, or export "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.",
        )
    differ = ", which differ in name" if len(interfaces) > 1 else ""
    return ok("network", f"{len(machines)} machines, over {', '.join(interfaces)}{differ}")


def _is_trapped(node: Node) -> bool:
    """Whether gloo would announce an address that other machines cannot reach."""
    is_loopback = node.own_address.startswith("127.") or node.own_address == "::1"
    return node.chosen == "lo" or (not node.chosen and is_loopback)


def judge_sums(results: Sequence[Sequence[Reduced]]) -> list[Finding]:
    return [_judge_sum(of_kind) for of_kind in zip(*results, strict=True)]


def _judge_sum(of_kind: Sequence[Reduced]) -> Finding:
    check = f"all-reduce, {of_kind[0].group}"
    wrong = sorted({named(each.ranks) for each in of_kind if not each.is_right})
    if wrong:
        return fails(
            check,
            f"the sum of an all-reduce must be right, and is not in {len(wrong)} group(s): "
            f"{listed(wrong)}. Remedy: take these nodes out, and have their memory and network "
            "looked at.",
        )
    slowest = min(of_kind, key=lambda each: each.bus_bytes_per_s)
    if len(slowest.ranks) == 1:
        return ok(check, "groups of one rank, nothing to send")
    groups = {tuple(each.ranks) for each in of_kind}
    return ok(
        check,
        f"{len(groups)} group(s) of {len(slowest.ranks)} ranks, slowest {named(slowest.ranks)}: "
        f"{slowest.bus_bytes_per_s / 1e9:.2f} GB/s of bus bandwidth "
        f"({slowest.num_bytes / 2**20:g} MiB in {1000 * slowest.seconds:.2f} ms)",
    )


def named(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 0, 2, 4 ... 127"."""
    more = f" ... {ranks[-1]}" if len(ranks) > _MOST_RANKS else ""
    word = "ranks" if len(ranks) > 1 else "rank"
    return f"{word} {', '.join(map(str, ranks[:_MOST_RANKS]))}{more}"


def listed(parts: Sequence[str], separator: str = "; ") -> str:
    """The first few of `parts` and the number of the rest."""
    more = f"{separator}and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return separator.join(parts[:_MOST_NAMED]) + more


def _sides(values: Iterable[tuple[str, Member]]) -> list[tuple[str, list[str]]]:
    """Nodes grouped by value, largest group first."""
    found: dict[str, list[str]] = {}
    for value, member in values:
        found.setdefault(value, []).append(str(member))
    return sorted(found.items(), key=lambda item: -len(item[1]))


def _sides_text(groups: Sequence[tuple[str, list[str]]]) -> str:
    return "; ".join(f"{value} on {listed(nodes, ', ')}" for value, nodes in groups)
