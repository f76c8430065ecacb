"""The learning rate over a whole run."""

from __future__ import annotations

import pytest

from geneformer_mcore.config.sections import OptimConfig
from geneformer_mcore.optim.optimizer import learning_rate

OPTIM = OptimConfig(lr=1e-3, min_lr=1e-5)


def curve(steps: int, warmup: int, hold: int) -> list[float]:
    return [learning_rate(step, steps, warmup, hold, OPTIM) for step in range(steps)]


def test_rises_falls_and_holds() -> None:
    rates = curve(1000, 10, 50)
    assert rates[0] == pytest.approx(1e-4)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == rates[10] == 1e-3
    assert rates[10:950] == sorted(rates[10:950], reverse=True)
    assert rates[10 + 470] == pytest.approx((1e-3 + 1e-5) / 2)
    assert set(rates[950:]) == {1e-5}


def test_without_warm_up_or_decay() -> None:
    assert curve(3, 0, 0)[0] == 1e-3
    assert curve(3, 0, 3) == [1e-5] * 3
    assert curve(4, 4, 0)[-1] == 1e-3
