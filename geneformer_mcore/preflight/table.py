"""The nodes as a table: one row each, columns aligned."""

from __future__ import annotations

from collections.abc import Sequence

from geneformer_mcore.preflight.finding import Finding
from geneformer_mcore.preflight.shared_folder import Shared
from geneformer_mcore.preflight.verdicts import Member

_GB = 1e9
_HEADS = (
    "node",
    "host",
    "ranks",
    "GPUs",
    "driver / CUDA",
    "cores",
    "memory",
    "run folder free",
    "clock",
    "cells",
    "interface",
    "versions",
)


def text(members: Sequence[Member], shared: Shared) -> str:
    """The table of all nodes."""
    return aligned([_HEADS, *(_row(member, shared) for member in members)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of one length, each column as wide as its widest entry, two blanks between."""
    widths = [max(len(entry) for entry in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def findings_text(findings: Sequence[Finding]) -> str:
    """A line for each check."""
    return "\n".join(map(str, findings))


def _row(member: Member, shared: Shared) -> tuple[str, ...]:
    node = member.node
    view = shared.views.get(member.ranks[0])
    models = sorted(set(node.gpus))
    return (
        str(node.number),
        node.host,
        span(member.ranks),
        " + ".join(f"{node.gpus.count(model)} x {model}" for model in models) or "no GPU",
        f"{node.driver} / {node.cuda}" if node.gpus else "-",
        str(node.cores),
        f"{node.memory_bytes / _GB:.0f} GB",
        f"{view.free / _GB:.0f} GB" if view is not None and view.free >= 0 else "?",
        f"{member.offset.seconds:+.3f} s",
        _cells(member),
        f"{node.interface} {node.interface_address}".strip() or "-",
        _versions(node.versions),
    )


def span(ranks: Sequence[int]) -> str:
    """ "0-7", "0" or "0,2"."""
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    return ",".join(map(str, ranks))


def _cells(member: Member) -> str:
    seen = member.seen
    if not seen.hash:
        return "not seen"
    return f"{seen.cells:,} {seen.hash[:12]}" if seen.cells else seen.hash[:12]


def _versions(versions: dict[str, str]) -> str:
    shown = {"python": "python", "torch": "torch", "megatron-core": "mcore", "commit": "commit"}
    return " ".join(f"{short} {versions.get(name, '?')}" for name, short in shown.items())
