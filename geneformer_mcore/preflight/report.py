"""The nodes as a table, and the whole result as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from geneformer_mcore.preflight.checks import Finding
from geneformer_mcore.preflight.node import Member, Seen

_GB = 1e9
_HEADS = (
    *("node", "host", "ranks", "GPUs", "driver / CUDA", "cores", "memory", "run folder free"),
    *("clock", "cells", "interface", "versions"),
)
_SHOWN = {"python": "python", "torch": "torch", "megatron-core": "mcore", "commit": "commit"}


def as_json(members: Sequence[Member], findings: Sequence[Finding]) -> dict[str, Any]:
    """{"nodes": [...], "checks": [...]}."""
    return {"nodes": [asdict(each) for each in members], "checks": [asdict(f) for f in findings]}


def table(members: Sequence[Member]) -> str:
    return aligned([_HEADS, *map(_row, members)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entries, two blanks between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[e.ljust(width) for e, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _row(member: Member) -> tuple[str, ...]:
    node, view = member.node, member.run_folder
    return (
        str(node.number),
        node.host,
        span(member.ranks),
        node.models,
        f"{node.driver} / {node.cuda}" if node.gpus else "-",
        str(node.cores),
        f"{node.memory_bytes / _GB:.0f} GB",
        f"{view.free / _GB:.0f} GB" if view is not None and view.free >= 0 else "?",
        f"{member.offset.seconds:+.3f} s",
        _cells(member.seen),
        f"{node.interface} {node.interface_address}".strip() or "-",
        " ".join(f"{short} {node.versions.get(name, '?')}" for name, short in _SHOWN.items()),
    )


def span(ranks: Sequence[int]) -> str:
    """ "0-7", "0" or "0,2"."""
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    return ",".join(map(str, ranks))


def _cells(seen: Seen) -> str:
    if not seen.hash:
        return "not seen"
    return f"{seen.cells:,} {seen.hash[:12]}" if seen.cells else seen.hash[:12]
