"""What a comparison must reach: a ratio or a limit, the bar beside it, and whether it is met."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """One line under a table.

    value:    the ratio or amount found; None where a side of it was not measured
    bar:      what it must reach, or with `at_most` must stay under
    """

    what: str
    value: float | None
    bar: float
    unit: str = "x"
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is no value."""
        if self.value is None:
            return None
        return self.value < self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        sign = "<" if self.at_most else ">="
        words = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        found = "-" if self.value is None else f"{self.value:.3g} {self.unit}"
        return f"{self.what}: {found} (bar {sign} {self.bar:g} {self.unit}): {words}"

    def as_json(self) -> dict[str, Any]:
        """Its fields and whether it is met."""
        return asdict(self) | {"met": self.met}


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """ours / theirs; None if either is missing."""
    return None if ours is None or theirs is None else ours / theirs


def best(rates: list[float | None]) -> float | None:
    """The largest of those that were measured; None if none was."""
    return max((rate for rate in rates if rate is not None), default=None)
