"""A checkpoint saved under one layout, loaded under another, and what must be equal then.

    save under A -> load under B -> save again: every tensor, read whole, is bitwise the same
                                 -> train on:   losses are those of A, had it gone on

The first loss after loading proves only the weights; the next ones prove fp32 copies, moments and
step. Two-layer stages make Megatron's gradient buckets end at places that need padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geneformer_mcore.checkpoint import state
from tests.distributed import toy
from tests.distributed.parity import INTERLEAVED, OVERLAP, PACKED, PP2, SEQUENCE, TP2
from tests.distributed.ranks import run_ranks
from tests.support.final_state import read_whole

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp1 pp1 dp1": (1, ()),
    "tp2 pp1 dp1": (2, (TP2,)),
    "tp1 pp2 dp1": (2, (PP2,)),
    "tp1 pp1 dp2": (2, ()),
    "tp2 pp2 dp1": (4, (TP2, PP2)),
    "tp1 pp2 dp2": (4, (PP2,)),
    "pp2 interleaved": (2, INTERLEAVED),
    "pp2 dp2 overlap": (4, (PP2, *OVERLAP)),
    "dp2 overlap": (2, OVERLAP),
    "packed": (1, (PACKED,)),
    "tp2 pp2 sequence packed": (4, (*SEQUENCE, PP2, PACKED)),
    "dp4 packed": (4, (PACKED,)),
}
TWO_LAYERS = ("model.num_layers=2",)
BF16 = ("train.precision=bf16", *TWO_LAYERS)
GENTLE = ("optim.lr=1e-4",)
"""Adam moves a weight by lr whatever the size of its gradient. Layouts add up in different orders,
so where a gradient is nearly 0 even its sign may differ: a small lr keeps that out of the losses.
"""

Pair = tuple[str, str]
"""(saver, loader)."""
_whole = cache(read_whole)
"""Each checkpoint is compared with several others."""


def lost(
    root: Path,
    pairs: Sequence[Pair],
    settings: tuple[str, ...] = (),
    steps: tuple[int, int] = (2, 3),
    rel: float = 1e-6,
) -> Iterator[tuple[Pair, list[str]]]:
    """What was lost between the two of each pair, in words; checkpoints are written below `root`.
    Each layout saves once, and loads with one start of its ranks what all its savers wrote.
    steps: those before the checkpoint, and after it."""
    folders = {name: root / name.replace(" ", "_") for name, _ in pairs}
    losses = {name: run(name, settings, save, str(to), steps) for name, to in folders.items()}
    for loader in dict.fromkeys(loader for _, loader in pairs):
        again = {saver: root / f"{saver} under {loader}".replace(" ", "_")
                 for saver, other in pairs if other == loader}  # fmt: skip
        to_load = {str(folders[saver]): str(place) for saver, place in again.items()}
        loaded = run(loader, settings, load, to_load, steps)
        for saver, place in again.items():
            found = differences(folders[saver], place, steps[0])
            mine, wanted = loaded[str(folders[saver])], losses[saver]
            if not np.allclose(mine, wanted, rtol=rel, atol=0):
                found.append(f"losses {mine} instead of {wanted}")
            yield (saver, loader), found


def run(name: str, settings: tuple[str, ...], work: Callable[..., Any], *given: Any) -> Any:
    ranks, layout = LAYOUTS[name]
    results = run_ranks(work, ranks, *given, *settings, *layout)
    assert all(found == results[0] for found in results), "every rank knows the same losses"
    return results[0]


def differences(one: Path, other: Path, saved_at: int) -> list[str]:
    """Tensors that two checkpoints do not share, and numbers of steps that they should not have."""
    first, second = _whole(one), _whole(other)
    # NaN, which nobody wrote, is equal to nothing.
    found = [
        key
        for key in sorted(first.keys() | second.keys())
        if key not in first or key not in second or not torch.equal(first[key], second[key])
    ]
    counted = {*steps_counted(one), *steps_counted(other)}
    return found if counted == {saved_at} else [*found, f"steps counted: {sorted(counted)}"]


def save(folder: str, steps: tuple[int, int], *overrides: str) -> list[float]:
    """Losses of the steps after the one at which `folder` was written; steps: before and after."""
    run = toy.make(*overrides)
    run.steps(steps[0])
    run.write(folder)
    return run.losses(steps[1])


def load(
    folders: dict[str, str], steps: tuple[int, int], *overrides: str
) -> dict[str, list[float]]:
    """Losses by folder. Loads each of `folders`, saves it again where its value says, and goes on;
    what the one before left in moments and weights must not matter."""
    run = toy.loaded(next(iter(folders)), steps[0], *overrides)
    start, losses = run.position, {}
    for folder, again in folders.items():
        state.load(run.trainable, Path(folder), None)
        run.write(again)
        run.position = start
        losses[folder] = run.losses(steps[1])
    return losses


def steps_counted(folder: Path) -> list[float]:
    """Updates made, as each group of parameters counts them."""
    common = torch.load(folder / "common.pt", weights_only=True)
    return [group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]]
