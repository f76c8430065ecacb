"""How far the nodes' clocks are apart, by round trips (Cristian 1989, "Probabilistic clock
synchronization").

    node    t0 --ping-->                     t1        offset = (t0 + t1) / 2 - rank 0's time
    rank 0              its time --pong-->             known to +- (t1 - t0) / 2

The shortest of several round trips says most. They go by the store in which the ranks met: NCCL
has no message that is cheap between two ranks that never talked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from geneformer_mcore.preflight.exchange import Exchange

LIMIT_S = 1.0
"""Clocks further apart spoil what is compared by time: files' ages, logs of several nodes."""
_TRIPS = 8
now = time.time
"""This node's clock, seconds."""


@dataclass(frozen=True)
class Offset:
    """seconds: how much this clock is ahead of rank 0's; uncertainty_s: by how much that may be
    wrong, either way."""

    seconds: float
    uncertainty_s: float

    def __str__(self) -> str:
        return f"{self.seconds:+.3f} s +- {self.uncertainty_s:.3f} s"


FIRST = Offset(0.0, 0.0)
"""Rank 0's."""


def offset_of(trips: Sequence[tuple[float, float, float]]) -> Offset:
    """trips: (t0, rank 0's time, t1) of each round trip."""
    sent, there, back = min(trips, key=lambda trip: trip[2] - trip[0])
    return Offset((sent + back) / 2 - there, (back - sent) / 2)


def measure(exchange: Exchange, leaders: Sequence[int]) -> Offset:
    """This rank's offset, if it is one of `leaders`, the first ranks of the nodes; all ranks call
    it together. Rank 0 answers the leaders, one after the other, and is itself 0 ahead."""
    if exchange.is_first:
        for rank in leaders:
            if rank != 0:
                _serve(exchange, rank)
    elif exchange.rank in leaders:
        return offset_of([_trip(exchange, number) for number in range(_TRIPS)])
    return FIRST


def _serve(exchange: Exchange, rank: int) -> None:
    for number in range(_TRIPS):
        exchange.take(f"ping/{rank}/{number}")
        exchange.put(f"pong/{rank}/{number}", now())


def _trip(exchange: Exchange, number: int) -> tuple[float, float, float]:
    sent = now()
    exchange.put(f"ping/{exchange.rank}/{number}", None)
    there = exchange.take(f"pong/{exchange.rank}/{number}")
    return sent, there, now()
