"""What the pages' tables are made of: Markdown, numbers, and where they are from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from geneformer_mcore.errors import DataError

NOT_MEASURED = "not measured"

Measurement: TypeAlias = dict[str, Any]


def markdown(
    head: list[str],
    rows: list[list[str]],
    sources: list[Measurement | None],
    with_machine: bool = True,
) -> str:
    """A table, and under it where its numbers are from."""
    lines = [row_of(head), row_of(["---"] * len(head)), *map(row_of, rows)]
    origins = dict.fromkeys(origin(source, with_machine) for source in sources if source)
    return "\n".join([*lines, "", *(f"<sub>{origin}</sub>" for origin in origins)]).rstrip()


def row_of(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def origin(source: Measurement, with_machine: bool) -> str:
    """Machine, versions and commit of a measurement."""
    versions = ", ".join(
        f"{name} {number}" for name, number in source["versions"].items() if number != "absent"
    )
    machine = f"{source['machine']}; " if with_machine else ""
    return f"Measured on {machine}{versions}; commit {source['commit']}."


def read(path: Path) -> Measurement | None:
    """The measurement in `path`; None where there is none."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise DataError(f"{path} is not JSON: measure again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold one object: measure again.")
    return found


def nats(value: float | None) -> str:
    """A loss."""
    return number(value, ".3f")


def share(value: float | None) -> str:
    """A share of 1, in per cent."""
    return number(value, ".1%")


def number(value: float | None, form: str) -> str:
    """Formatted, or that it was not measured."""
    return NOT_MEASURED if value is None else format(value, form)
