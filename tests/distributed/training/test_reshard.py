"""A checkpoint of any layout continues under any other: weights, moments and steps all fit.

One pair per direction of each axis of a layout; all pairs: tests/soak/reshard.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.resharding import BF16, GENTLE, TWO_LAYERS, Checkpoints
from tests.support.final_state import read_whole

PAIRS = [
    ("tp2 pp1 dp1", "tp1 pp1 dp1"),
    ("tp1 pp1 dp1", "tp2 pp1 dp1"),
    ("tp1 pp2 dp1", "tp1 pp1 dp1"),
    ("tp1 pp1 dp1", "tp1 pp2 dp1"),
    ("tp1 pp1 dp2", "tp1 pp1 dp1"),
    ("tp1 pp1 dp1", "tp1 pp1 dp2"),
    ("tp2 pp1 dp1", "tp1 pp2 dp1"),
    ("tp1 pp2 dp1", "tp1 pp1 dp2"),
    ("tp2 pp2 dp1", "pp2 dp2 overlap"),
    ("pp2 dp2 overlap", "tp2 pp1 dp1"),
    ("packed", "tp2 pp2 sequence packed"),
    ("tp2 pp2 sequence packed", "packed"),
]
OF_FOUR_LAYERS = [("tp1 pp1 dp2", "pp2 interleaved"), ("pp2 interleaved", "tp1 pp1 dp1")]
LARGE_BATCHES = "train.micro_batch_size=8"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Checkpoints]:
    """Those of two layers, and of four."""
    root = tmp_path_factory.mktemp
    return {
        2: Checkpoints(root("two"), PAIRS, (LARGE_BATCHES, *GENTLE, *TWO_LAYERS)),
        4: Checkpoints(root("four"), OF_FOUR_LAYERS, (LARGE_BATCHES, *GENTLE)),
    }


@pytest.mark.parametrize(
    ("layers", "saver", "loader"),
    [*((2, *pair) for pair in PAIRS), *((4, *pair) for pair in OF_FOUR_LAYERS)],
)
def test_nothing_is_lost(
    layers: int, saver: str, loader: str, saved: dict[int, Checkpoints]
) -> None:
    assert saved[layers].lost(saver, loader) == []


def test_bf16_keeps_its_fp32_weights(tmp_path: Path) -> None:
    pair = ("tp1 pp2 dp1", "tp1 pp2 dp1")
    assert Checkpoints(tmp_path, [pair], (LARGE_BATCHES, *BF16)).lost(*pair, rel=0) == []


def test_a_checkpoint_holds_weights_and_moments_of_every_parameter(
    saved: dict[int, Checkpoints],
) -> None:
    keys = read_whole(saved[2].saved("tp1 pp1 dp1").folder).keys()
    parameters = {key for key in keys if not key.startswith("optimizer.")}
    kinds = ("param", "exp_avg", "exp_avg_sq")
    assert "encoder.layers.1.mlp.linear_fc2.weight" in parameters
    assert keys - parameters == {f"optimizer.state.{k}.{p}" for k in kinds for p in parameters}
