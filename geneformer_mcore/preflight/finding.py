"""What a check comes to: ok, one line on what fails, or why it was not made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from geneformer_mcore.preflight.node import Node

T = TypeVar("T")
_MOST_TOLD = 6


class State(Enum):
    """How a check ended."""

    ok = "ok"
    fails = "FAILS"
    skipped = "not checked"


@dataclass(frozen=True)
class Finding:
    """One check. text: what was found; if it fails: the rule, the numbers and the remedy."""

    check: str
    state: State
    text: str

    def __str__(self) -> str:
        return f"{self.state.value:<12} {self.check}: {self.text}"


def ok(check: str, text: str) -> Finding:
    """The check found what it wants."""
    return Finding(check, State.ok, text)


def fails(check: str, text: str) -> Finding:
    """The user must mend something."""
    return Finding(check, State.fails, text)


def skipped(check: str, text: str) -> Finding:
    """It cannot be checked before something else is mended."""
    return Finding(check, State.skipped, text)


def place(node: Node) -> str:
    """A node as messages name it."""
    return f"node {node.number} ({node.host})"


def listed(parts: Sequence[str], separator: str = "; ") -> str:
    """The first few of `parts`, and how many more there are."""
    more = f"{separator}and {len(parts) - _MOST_TOLD} more" if len(parts) > _MOST_TOLD else ""
    return separator.join(parts[:_MOST_TOLD]) + more


def sides(values: Iterable[tuple[Node, T]]) -> list[tuple[T, list[Node]]]:
    """The nodes by what they have, most nodes first. More than one entry: they differ."""
    found: dict[T, list[Node]] = {}
    for node, value in values:
        found.setdefault(value, []).append(node)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def told_sides(groups: Sequence[tuple[object, list[Node]]]) -> str:
    """ "A on node 0 (a), node 1 (b); B on node 2 (c)"."""
    return "; ".join(
        f"{value} on {listed([place(node) for node in nodes], ', ')}" for value, nodes in groups
    )
