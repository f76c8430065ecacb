"""A checkpoint saved under one layout, loaded under another, and what must be equal then.

    save under A -> load under B -> save again: every tensor, read whole, is bitwise the same
                                 -> train on:   losses are those of A, had it gone on

The first loss after loading proves only the weights; the next ones prove fp32 copies, moments and
step. Two-layer stages make Megatron's gradient buckets end at places that need padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

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


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the losses of its own run when that went on."""

    folder: Path
    undisturbed: list[float]


@dataclass
class Checkpoints:
    """Checkpoints of all `pairs` below `root`: each layout saves once, and loads with one start of
    its ranks what all its savers wrote. `saved_at`: their step; `continued`: further steps."""

    root: Path
    pairs: Sequence[Pair]
    settings: tuple[str, ...] = ()
    saved_at: int = 2
    continued: int = 3
    _saved: dict[str, Saved] = field(default_factory=dict)
    _loaded: dict[str, dict[str, Saved]] = field(default_factory=dict)

    def saved(self, name: str) -> Saved:
        """What the layout `name` wrote."""
        if name not in self._saved:
            ranks, layout = LAYOUTS[name]
            folder = self.root / name.replace(" ", "_")
            steps = (self.saved_at, self.continued)
            losses, *_ = run_ranks(save, ranks, str(folder), steps, *self.settings, *layout)
            self._saved[name] = Saved(folder, losses)
        return self._saved[name]

    def loaded(self, saver: str, loader: str) -> Saved:
        """What became of it under the layout `loader`."""
        if loader not in self._loaded:
            self._loaded[loader] = self._load(loader)
        return self._loaded[loader][saver]

    def _load(self, loader: str) -> dict[str, Saved]:
        ranks, layout = LAYOUTS[loader]
        savers = [saver for saver, other in self.pairs if other == loader]
        again = {name: self.root / f"{name} under {loader}".replace(" ", "_") for name in savers}
        folders = {str(self.saved(name).folder): str(again[name]) for name in savers}
        steps = (self.saved_at, self.continued)
        results = run_ranks(load, ranks, folders, steps, *self.settings, *layout)
        assert all(losses == results[0] for losses in results), "every rank knows the same losses"
        losses = results[0]
        return {name: Saved(again[name], losses[str(self.saved(name).folder)]) for name in savers}

    def lost(self, saver: str, loader: str, rel: float = 1e-6) -> list[str]:
        """What was lost between the two, in words."""
        before, after = self.saved(saver), self.loaded(saver, loader)
        first, second = _whole(before.folder), _whole(after.folder)
        # NaN, which nobody wrote, is equal to nothing.
        found = [
            key
            for key in sorted(first.keys() | second.keys())
            if key not in first or key not in second or not torch.equal(first[key], second[key])
        ]
        counted = {*steps_counted(before.folder), *steps_counted(after.folder)}
        if counted != {self.saved_at}:
            found.append(f"steps counted: {sorted(counted)}")
        if not np.allclose(after.undisturbed, before.undisturbed, rtol=rel, atol=0):
            found.append(f"losses {after.undisturbed} instead of {before.undisturbed}")
        return found


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
