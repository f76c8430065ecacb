"""YAML text as plain values, within limits that are looked at while it is read.

text  ->  its length  ->  nodes, one by one: depth, number with every alias written out  ->  values

A few lines whose aliases name each other stand for millions of values, and brackets in brackets for
a stack that no program has: both are refused at the node that is one too many.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

MOST_CHARACTERS = 65_536
MOST_NODES = 2_048
"""With every alias written out; all settings of a run are about two hundred."""
DEEPEST = 16

_NULL = "tag:yaml.org,2002:null"
_AS_WRITTEN = (_NULL, "tag:yaml.org,2002:merge")


class LimitError(yaml.MarkedYAMLError):
    """The text is longer, deeper or of more values than a file of settings may be."""

    def __init__(self, problem: str, event: yaml.Event | None = None) -> None:
        super().__init__(problem=problem, problem_mark=event and event.start_mark)


def values(text: str, as_written: bool = False) -> Any:
    """The one document in `text`: mappings, lists and scalars; None if it is empty.

    as_written: a scalar is the text that it was written as (or null), whatever YAML takes it for
    Raises yaml.YAMLError for anything but plain YAML in which no key comes twice, and LimitError.
    """
    if len(text) > MOST_CHARACTERS:
        raise LimitError(f"it must have at most {MOST_CHARACTERS:,} characters")
    return (_AsWritten if as_written else _Bounded)(text).get_single_data()


def read_text(path: Path) -> str:
    """The text of a file, at most one character more than `values` takes: of a device, too, which
    has no end. Raises OSError, UnicodeDecodeError."""
    with path.open(encoding="utf-8") as file:
        return file.read(MOST_CHARACTERS + 1)


class _Bounded(yaml.SafeLoader):
    """Plain YAML in which no key comes twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[str, int] = {}
        """Nodes behind each anchor that is complete."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise LimitError(f"*{event.anchor} stands inside of itself", event)
            self._count(self._sizes.get(event.anchor, 1), event)
            return super().compose_node(parent, index)
        before = self._nodes
        self._count(1, event)
        self._depth += 1
        if self._depth > DEEPEST:
            raise LimitError(f"it must be at most {DEEPEST} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def _count(self, nodes: int, event: yaml.Event) -> None:
        self._nodes += nodes
        if self._nodes > MOST_NODES:
            raise LimitError(
                f"it must have at most {MOST_NODES:,} values, those behind aliases counted every "
                "time",
                event,
            )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(twice)} is set twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


class _AsWritten(_Bounded):
    """The same, in which 2024_01_31, 0012, 12:30 and on are text."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern]]]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _AS_WRITTEN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
