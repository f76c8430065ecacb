"""A checkpoint of any layout continues under any other: weights, moments and steps all fit.

One pair per direction of each axis of a layout; all pairs: tests/soak/reshard.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.resharding import BF16, GENTLE, TWO_LAYERS, lost
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


@pytest.mark.parametrize(
    ("pairs", "settings"),
    [(PAIRS, (*GENTLE, *TWO_LAYERS)), (OF_FOUR_LAYERS, GENTLE)],
    ids=["two layers", "four layers"],
)
def test_no_loss(pairs: list[tuple[str, str]], settings: tuple[str, ...], tmp_path: Path) -> None:
    found = dict(lost(tmp_path, pairs, (LARGE_BATCHES, *settings)))
    assert found == {pair: [] for pair in pairs}
    # Weights and moments of every parameter.
    keys = read_whole(tmp_path / "tp1_pp1_dp2").keys()
    parameters = {key for key in keys if not key.startswith("optimizer.")}
    kinds = ("param", "exp_avg", "exp_avg_sq")
    assert "encoder.layers.1.mlp.linear_fc2.weight" in parameters
    assert keys - parameters == {f"optimizer.state.{k}.{p}" for k in kinds for p in parameters}


def test_bf16_keeps_its_fp32_weights(tmp_path: Path) -> None:
    pair = ("tp1 pp2 dp1", "tp1 pp2 dp1")
    assert dict(lost(tmp_path, [pair], (LARGE_BATCHES, *BF16), rel=0)) == {pair: []}
