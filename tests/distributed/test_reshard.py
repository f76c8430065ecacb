"""A checkpoint of any layout continues under any other: weights, moments and steps all fit.

One pair per direction of each axis of a layout; all pairs: tests/soak/reshard.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.resharding import BF16, GENTLE, TWO_LAYERS, Checkpoints, Pair
from tests.final_state import read_whole

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
OF_BF16 = [("tp1 pp2 dp1", "tp1 pp2 dp1")]


def checkpoints(paths: pytest.TempPathFactory, pairs: list[Pair], *settings: str) -> Checkpoints:
    return Checkpoints(paths.mktemp("reshard"), pairs, (LARGE_BATCHES, *settings))


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return checkpoints(tmp_path_factory, PAIRS, *GENTLE, *TWO_LAYERS)


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return checkpoints(tmp_path_factory, OF_FOUR_LAYERS, *GENTLE)


@pytest.mark.parametrize(("saver", "loader"), PAIRS)
def test_nothing_is_lost(saver: str, loader: str, two_layers: Checkpoints) -> None:
    assert two_layers.lost(saver, loader) == []


@pytest.mark.parametrize(("saver", "loader"), OF_FOUR_LAYERS)
def test_nothing_is_lost_when_interleaved(
    saver: str, loader: str, four_layers: Checkpoints
) -> None:
    assert four_layers.lost(saver, loader) == []


def test_bf16_keeps_its_fp32_weights(tmp_path: Path) -> None:
    found = Checkpoints(tmp_path, OF_BF16, (LARGE_BATCHES, *BF16))
    (pair,) = OF_BF16
    assert found.lost(*pair, rel=0) == []


def test_a_checkpoint_holds_weights_and_moments_of_every_parameter(
    two_layers: Checkpoints,
) -> None:
    keys = read_whole(two_layers.saved("tp1 pp1 dp1").folder).keys()
    parameters = {key for key in keys if not key.startswith("optimizer.")}
    kinds = ("param", "exp_avg", "exp_avg_sq")
    assert "encoder.layers.1.mlp.linear_fc2.weight" in parameters
    assert keys - parameters == {f"optimizer.state.{k}.{p}" for k in kinds for p in parameters}
