"""The learning rate as a pure function of the step.

lr |    /""-._
   |   /       `-._
   |  /            `-.________ min_lr
   +--------------------------- step
    warm-up    cosine     hold
"""

from __future__ import annotations

import math

from geneformer_mcore.config.sections import OptimConfig


def learning_rate(
    step: int, steps: int, warmup_steps: int, hold_steps: int, optim: OptimConfig
) -> float:
    """Learning rate of update number `step` (0 is the first) of `steps`.

    Linear from lr / warmup_steps to lr, then a cosine to min_lr, then min_lr for `hold_steps`.
    """
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    decay_steps = steps - warmup_steps - hold_steps
    if step >= warmup_steps + decay_steps:
        return optim.min_lr
    progress = (step - warmup_steps) / decay_steps
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
