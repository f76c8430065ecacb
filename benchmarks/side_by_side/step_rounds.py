"""The turns of train_step.py: first each finds its micro batch, then all measure in rounds.

    micro batch 1, 2, 4, ... of A, of B, ...  ->  the fastest of each  ->  A B C, A B C, ...

A turn is a function (name, micro batch) -> (what was measured, why not), so that this knows nothing
of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from benchmarks.side_by_side.step_rows import rate

Turn: TypeAlias = Callable[[str, int], tuple[dict[str, Any], str]]
Tried: TypeAlias = dict[int, float | str]
"""{micro batch: cells/s, or why there is none}."""


def tune(
    turn: Turn, labels: dict[str, str], sizes: Sequence[int], failures: dict[str, str]
) -> dict[str, Tried]:
    """What every contestant of `labels` reaches with each micro batch of `sizes`, ascending.

    failures: {contestant: why it is skipped}; whoever can take no size at all is put there too
    """
    found: dict[str, Tried] = {name: {} for name in labels}
    if len(sizes) == 1:
        return found  # nothing to choose from
    for name, tried in found.items():
        for size in [] if name in failures else sizes:
            measured, why = turn(name, size)
            tried[size] = why or rate(measured)
            told = why or f"{tried[size]:.3g} cells/s"
            print(f"micro batch {size}: {labels[name]}: {told}", flush=True)
            if why:
                break  # a larger one wants more memory still
        if tried and all(isinstance(each, str) for each in tried.values()):
            failures[name] = str(tried[sizes[0]])
    return found


def fastest(tried: Tried, sizes: Sequence[int]) -> int:
    """The micro batch with the highest rate; the first of `sizes` where none has one."""
    rates = {size: found for size, found in tried.items() if not isinstance(found, str)}
    return max(rates, key=lambda size: rates[size], default=sizes[0])


def all_turns(
    turn: Turn,
    labels: dict[str, str],
    sizes: dict[str, int],
    num_rounds: int,
    failures: dict[str, str],
) -> dict[str, list[dict[str, Any]]]:
    """What was measured in every round; who fails once takes no further turn."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in labels}
    for number in range(num_rounds):
        for name, label in labels.items():
            if name in failures:
                continue
            measured, why = turn(name, sizes[name])
            if why:
                failures[name] = why
                print(f"round {number + 1}: {label}: {why}", flush=True)
                continue
            turns[name].append(measured)
            print(f"round {number + 1}: {label}: {rate(measured):.3g} cells/s", flush=True)
    return turns
