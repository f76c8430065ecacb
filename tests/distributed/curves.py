"""Loss curves: plain PyTorch's, and those of a layout from the seed and from a checkpoint.

The plain loop is Reference in fp64 with torch's AdamW, clipping by the global norm and a constant
learning rate; it shares initial weights, cells and masks with the layouts, and no code of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.distributed import toy
from tests.distributed.parity import LAYOUTS
from tests.distributed.ranks import run_ranks
from tests.support.reference import Reference

STEPS, SAVED_AT = 100, 50
SAVERS = ("tp2 pp2 dp1", "tp1 pp1 dp2")
"""Who writes the checkpoints that the others load."""
LIMIT_S = 280
SMOOTH = ("model.activation=gelu", "optim.lr=1e-3")
"""No code can follow relu for 100 steps to 1e-4: where its input is 0 up to rounding, the gradient
jumps. With relu the plain loop in fp32 strays from itself in fp64 by 1e-3 (Adam's eps 1e-8) or 2e-4
(eps 1e-6), with gelu by 1e-7. relu is compared within a step, in logits and gradients."""


def plain(steps: int = STEPS) -> list[float]:
    """Nats per predicted gene at each step of the plain loop."""
    (losses,) = run_ranks(_plain, 1, steps, timeout_s=LIMIT_S)
    return losses


def from_seed(name: str, steps: int = STEPS, more: Sequence[str] = ()) -> list[float]:
    """The same of a layout; more: settings beside the layout's own."""
    ranks, settings = LAYOUTS[name]
    overrides = (*SMOOTH, *settings, *more)
    return _same_everywhere(run_ranks(toy.losses, ranks, steps, *overrides, timeout_s=LIMIT_S))


def save(name: str, folder: Path, step: int = SAVED_AT, more: Sequence[str] = ()) -> None:
    """A checkpoint of a layout after `step` steps from the seed, in the new folder `folder`."""
    ranks, settings = LAYOUTS[name]
    run_ranks(_save, ranks, str(folder), step, *settings, *more, timeout_s=LIMIT_S)


def from_checkpoint(
    name: str, folder: Path, saved_at: int = SAVED_AT, steps: int = STEPS, more: Sequence[str] = ()
) -> list[float]:
    """Losses of the steps from `saved_at` to `steps` of a layout that loads `folder`."""
    ranks, settings = LAYOUTS[name]
    given = (str(folder), saved_at, steps, *settings, *more)
    return _same_everywhere(run_ranks(_from_checkpoint, ranks, *given, timeout_s=LIMIT_S))


def saver_for(name: str) -> str:
    """The layout whose checkpoint `name` loads: never its own."""
    return next(saver for saver in SAVERS if saver != name)


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """The largest relative difference at any step; NaN if there is one."""
    seen, wanted = (torch.tensor(each, dtype=torch.float64) for each in (losses, expected))
    assert seen.shape == wanted.shape
    return float(((seen - wanted) / wanted).abs().max())


def _same_everywhere(losses: list[list[float]]) -> list[float]:
    assert all(each == losses[0] for each in losses), "every rank knows the same losses"
    return losses[0]


def _plain(steps: int) -> list[float]:
    run = toy.make(*SMOOTH)
    (stage,) = run.trainable.stages
    reference = Reference(dict(stage.named_parameters()), 4, toy.VOCABULARY, F.gelu)
    optim, size = run.config.optim, run.config.train.global_batch_size
    weights = list(reference.w.values())
    decayed = {"params": [w for w in weights if w.dim() > 1], "weight_decay": optim.weight_decay}
    others = {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0}
    betas = (optim.beta1, optim.beta2)
    adam = torch.optim.AdamW([decayed, others], lr=optim.lr, betas=betas, eps=optim.eps)
    losses = []
    for step in range(steps):
        batches = run.feed.step(step * size)
        adam.zero_grad()
        sums = [
            reference.loss_sum(b.tokens_BS, b.lengths_N, b.selected_M, b.labels_M) for b in batches
        ]
        loss = torch.stack(sums).sum() / sum(len(batch.labels_M) for batch in batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, optim.clip)
        adam.step()
        losses.append(loss.item())
    return losses


def _save(folder: str, step: int, *settings: str) -> None:
    run = toy.make(*SMOOTH, *settings)
    run.steps(step)
    run.write(folder)


def _from_checkpoint(folder: str, saved_at: int, steps: int, *settings: str) -> list[float]:
    return toy.loaded(folder, saved_at, *SMOOTH, *settings).losses(steps - saved_at)
