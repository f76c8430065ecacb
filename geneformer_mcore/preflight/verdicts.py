"""What the nodes said, judged: one finding per check. Pure functions, run on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geneformer_mcore.checkpoint import manager
from geneformer_mcore.config import Config
from geneformer_mcore.preflight import clocks
from geneformer_mcore.preflight.cells import Seen
from geneformer_mcore.preflight.clocks import Offset
from geneformer_mcore.preflight.finding import (
    Finding,
    fails,
    listed,
    ok,
    place,
    sides,
    skipped,
    told_sides,
)
from geneformer_mcore.preflight.node import Node
from geneformer_mcore.preflight.reduce import Reduced, named
from geneformer_mcore.preflight.shared_folder import SEE_S, Shared


@dataclass(frozen=True)
class Member:
    """A node of the job. ranks: of it, ascending; its first speaks for it."""

    node: Node
    ranks: list[int]
    seen: Seen
    offset: Offset = clocks.FIRST


def judge_cells(members: Sequence[Member], where: str) -> Finding:
    """Every node sees the cells, and the same ones."""
    blind = [f"{place(each.node)}: {each.seen.problem}" for each in members if each.seen.problem]
    if blind:
        return fails(
            "cells",
            f"every node must see the cells of data.store={where}, and {len(blind)} of "
            f"{len(members)} cannot use them: {listed(blind)} Remedy: put data.store where all "
            "nodes see it, or copy it whole to each.",
        )
    groups = sides((each.node, each.seen.hash[:12]) for each in members)
    if len(groups) > 1:
        return fails(
            "cells",
            f"all nodes must see the same cells, and data.store={where} is {len(groups)} different "
            f"ones: {told_sides(groups)}. Remedy: copy one of them to the others.",
        )
    return ok("cells", f"{len(members)} node(s) see the same, {groups[0][0]}")


def judge_cache(members: Sequence[Member], cache_dir: str) -> Finding:
    """Every node has the flat copy, or room for it."""
    bad = [
        f"{place(each.node)}: {each.seen.cache_problem}"
        for each in members
        if each.seen.cache_problem
    ]
    if bad:
        return fails(
            "cache",
            f"data.cache_dir={cache_dir} must be a folder with room for a copy of the store on "
            f"every node, and is not on {len(bad)} of {len(members)}: {listed(bad)}. Remedy: make "
            "room, name another folder, or leave it empty.",
        )
    if any(each.seen.problem for each in members):
        return skipped("cache", "how large the copy is, the cells must tell first")
    there = sum(each.seen.cache == "there" for each in members)
    return ok("cache", f"the copy is there on {there} node(s), room for it on the others")


def judge_folder(members: Sequence[Member], shared: Shared, folder: Path) -> list[Finding]:
    """The run folder is one, writable everywhere; and no other start is using it."""
    bad = []
    for each in members:
        view = shared.views.get(each.ranks[0])
        if view is None:
            bad.append(f"{place(each.node)} did not look")
        elif view.token.problem:
            bad.append(f"{place(each.node)} cannot write there: {view.token.problem}")
        elif not view.sees:
            bad.append(f"{place(each.node)} did not see rank 0's file within {SEE_S:g} s")
        elif each.ranks[0] in shared.unseen:
            bad.append(f"rank 0 did not see the file of {place(each.node)} within {SEE_S:g} s")
    if bad:
        found = fails(
            "run folder",
            f"run.dir={folder} must be one folder that every node can write and all see, and "
            f"{len(bad)} of {len(members)} node(s) fail: {listed(bad)}. Remedy: mend its "
            "permissions, or name a folder on a file system that all nodes share.",
        )
    else:
        found = ok("run folder", f"{len(members)} node(s) write it and see each other's files")
    users = [each for each in members if _is_locked(shared, each)]
    if users:
        names = listed([place(each.node) for each in users], ", ")
        return [
            found,
            fails(
                "run lock",
                f"one start at a time may use a run folder, and another start of the run in "
                f"{folder} is still going, as {names} can see. Remedy: wait for it, stop it, or "
                "choose another run.dir.",
            ),
        ]
    return [found, ok("run lock", "no other start of this run is seen")]


def _is_locked(shared: Shared, member: Member) -> bool:
    view = shared.views.get(member.ranks[0])
    return view is not None and view.locked


def judge_room(config: Config, members: Sequence[Member], shared: Shared, there: int) -> Finding:
    """The checkpoints that will be kept fit. there: bytes of those that are there already."""
    vocabulary = next((each.seen.vocabulary_size for each in members if each.seen.hash), 0)
    view = shared.views.get(0)
    if not vocabulary or view is None or view.token.problem or view.free < 0:
        return skipped("room", "the cells and the run folder must be there first")
    world_size = sum(len(each.ranks) for each in members)
    one, number = manager.bytes_of_one(config, vocabulary, world_size), manager.most_at_once(config)
    needed = max(0, one * number - there)
    told = (
        f"up to {number} checkpoints of {one:,} bytes at a time (checkpoint.keep_last, keep_every, "
        f"keep_best, and the one being written), {there:,} bytes of them there: {needed:,} bytes "
        f"more, and {view.free:,} are free"
    )
    if view.free < needed:
        return fails(
            "room",
            f"run.dir must have room for {told}, {needed - view.free:,} missing. Remedy: make "
            "room, keep fewer checkpoints, or choose another run.dir.",
        )
    return ok("room", told)


def judge_clocks(members: Sequence[Member]) -> Finding:
    """No clock is far from rank 0's."""
    off = [each for each in members if abs(each.offset.seconds) > clocks.LIMIT_S]
    if off:
        told = listed([f"{place(each.node)} {each.offset}" for each in off])
        return fails(
            "clocks",
            f"the clocks of all nodes must be within {clocks.LIMIT_S:g} s of rank 0's, and "
            f"{len(off)} of {len(members)} are not: {told}. Remedy: run a time service (chrony, "
            "ntpd) on every node.",
        )
    worst = max(members, key=lambda each: abs(each.offset.seconds)).offset
    return ok("clocks", f"the furthest from rank 0's is {worst}")


def judge_versions(members: Sequence[Member]) -> Finding:
    """The same software and the same settings everywhere."""
    names = sorted({name for each in members for name in each.node.versions})
    differing = []
    for name in names:
        telling = (each.node for each in members if name in each.node.versions)
        groups = sides((node, node.versions[name]) for node in telling)
        if len(groups) > 1:
            differing.append(f"{name} {told_sides(groups)}")
    if differing:
        return fails(
            "versions",
            f"all nodes must have the same software and settings, and {len(differing)} of "
            f"{len(names)} differ: {listed(differing, ' | ')}. Remedy: install the same "
            "everywhere, or start all nodes from one shared environment.",
        )
    return ok("versions", f"{len(names)} are the same on all nodes")


def judge_gpus(members: Sequence[Member]) -> Finding:
    """The same GPUs everywhere, and one for each rank."""
    groups = sides((each.node, gpus_of(each.node)) for each in members)
    if len(groups) > 1:
        return fails(
            "GPUs",
            f"all nodes must have the same GPUs, driver and CUDA, and they differ: "
            f"{told_sides(groups)}. Remedy: take nodes of one kind, or mend those on which GPUs "
            "are missing.",
        )
    short = [each for each in members if 0 < len(each.node.gpus) < len(each.ranks)]
    if short:
        told = listed(
            [f"{place(e.node)} has {len(e.ranks)} ranks, {len(e.node.gpus)} GPUs" for e in short]
        )
        return fails(
            "GPUs",
            f"every rank needs a GPU of its own: {told}. Remedy: start as many ranks per node "
            "as it has GPUs (torchrun --nproc_per_node).",
        )
    return ok("GPUs", f"{groups[0][0]} on every node")


def gpus_of(node: Node) -> str:
    """ "8 x H100, driver 550.54, CUDA 12.8", or "no GPU"."""
    if not node.gpus:
        return "no GPU"
    models = sorted(set(node.gpus))
    counted = " + ".join(f"{node.gpus.count(model)} x {model}" for model in models)
    return f"{counted}, driver {node.driver}, CUDA {node.cuda}"


def judge_network(members: Sequence[Member]) -> Finding:
    """Nodes on different machines do not talk over an interface that leads nowhere."""
    machines = {each.node.machine for each in members}
    interfaces = sorted({each.node.interface or "?" for each in members})
    if len(machines) == 1:
        return ok("network", f"{len(members)} node(s) on one machine, over {interfaces[0]}")
    trapped = [each.node for each in members if _is_trapped(each.node)]
    if trapped:
        told = listed(
            [
                f"{place(n)}: {n.master} is {n.master_address}, interface {n.interface}"
                for n in trapped
            ]
        )
        return fails(
            "network",
            f"the {len(machines)} machines must reach each other, and on {len(trapped)} of "
            f"{len(members)} nodes the way to the master is the loopback interface: {told}. "
            "Remedy: give the master by its address in the network (torchrun --rdzv-endpoint or "
            "--master-addr), or take the line 127.0.1.1 out of /etc/hosts, or export "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.",
        )
    differ = ", which differ in name" if len(interfaces) > 1 else ""
    return ok("network", f"{len(machines)} machines, over {', '.join(interfaces)}{differ}")


def _is_trapped(node: Node) -> bool:
    """Whether gloo would give the others an address that they cannot reach."""
    is_loopback = node.own_address.startswith("127.") or node.own_address == "::1"
    return node.chosen == "lo" or (not node.chosen and is_loopback)


def judge_sums(results: Sequence[Sequence[Reduced]]) -> list[Finding]:
    """results: of every rank, one per kind of group."""
    findings = []
    for of_kind in zip(*results, strict=True):
        name = of_kind[0].group
        check = f"all-reduce, {name}"
        wrong = sorted({named(each.ranks) for each in of_kind if not each.is_right})
        slowest = min(of_kind, key=lambda each: each.bus_bytes_per_s)
        if wrong:
            findings.append(
                fails(
                    check,
                    f"the sum of an all-reduce must be right, and is not in {len(wrong)} group(s): "
                    f"{listed(wrong)}. Remedy: take these nodes out, and have their memory and "
                    "network looked at.",
                )
            )
        elif len(slowest.ranks) == 1:
            findings.append(ok(check, "groups of one rank, nothing to send"))
        else:
            findings.append(ok(check, _speed(of_kind, slowest)))
    return findings


def _speed(of_kind: Sequence[Reduced], slowest: Reduced) -> str:
    groups = {tuple(each.ranks) for each in of_kind}
    return (
        f"{len(groups)} group(s) of {len(slowest.ranks)} ranks, slowest {named(slowest.ranks)}: "
        f"{slowest.bus_bytes_per_s / 1e9:.2f} GB/s of bus bandwidth "
        f"({slowest.num_bytes / 2**20:g} MiB in {1000 * slowest.seconds:.2f} ms)"
    )
