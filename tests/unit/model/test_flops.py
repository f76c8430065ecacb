"""The arithmetic of model/flops.py against published sizes, a table made by hand, and torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from geneformer_mcore.model import flops
from geneformer_mcore.model.flops import ModelShape, Workload

SEQ_LENGTH = 2048


SHAPE_10M, SHAPE_106M = ModelShape(6, 256, 512, 25_429), ModelShape(12, 768, 3072, 25_429)
PUBLISHED = (
    (SHAPE_10M, {25_429: 10_288_981, 25_472: 10_300_032, 25_600: 10_332_928}),
    (SHAPE_106M, {25_429: 106_775_893, 25_472: 106_808_960, 25_600: 106_907_392}),
)


@pytest.mark.parametrize(("shape", "published"), PUBLISHED)
def test_parameters_are_the_published_ones(shape: ModelShape, published: dict[int, int]) -> None:
    for size, parameters in published.items():
        assert flops.num_parameters(replace(shape, vocabulary_size=size), SEQ_LENGTH) == parameters


@pytest.mark.parametrize(
    ("shape", "gflops", "shares"),
    [
        (SHAPE_106M, (1754.8, 1544.6), (59.5, 26.4, 13.7)),
        (SHAPE_10M, (196.8, 128.1), (19.6, 39.3, 40.7)),
    ],
)
def test_a_full_cell(shape: ModelShape, gflops: tuple, shares: tuple) -> None:
    """GFLOP of training with all positions predicted, and with 15 %; shares of a forward pass in %:
    linear layers, attention, vocabulary."""
    padded = flops.padded_equivalent_flops(shape, SEQ_LENGTH) / 1e9
    assert padded == pytest.approx(gflops[0], abs=0.05)
    fifteen_percent = Workload(SEQ_LENGTH, SEQ_LENGTH**2, round(0.15 * SEQ_LENGTH))
    assert flops.executed_flops(shape, fifteen_percent) / 1e9 == pytest.approx(gflops[1], abs=0.1)
    parts = flops.forward_breakdown(shape, flops.padded_workload(SEQ_LENGTH))
    found = [100 * x / parts.total for x in (parts.linear, parts.attention, parts.vocabulary)]
    assert found == pytest.approx(shares, abs=0.06)


def test_packed_cells_cost_the_sum_of_their_squares() -> None:
    apart = sum(flops.forward_flops(SHAPE_10M, Workload(n, n**2, n // 5)) for n in (100, 900))
    packed = Workload(1000, 100**2 + 900**2, 200)
    assert flops.forward_flops(SHAPE_10M, packed) == apart
    assert flops.train_flops(SHAPE_10M, packed) == 3 * apart
    assert flops.forward_flops(SHAPE_10M, Workload(1000, 1000**2, 200)) > apart


def test_formulas_are_what_torch_counts() -> None:
    shape, tokens, predicted = ModelShape(1, 32, 80, 50), 24, 5
    with FlopCounterMode(display=False) as counter:
        _one_layer_and_head(shape, tokens, predicted).sum().backward()
    work = Workload(tokens, tokens**2, predicted)
    assert counter.get_total_flops() == flops.train_flops(shape, work)


def _one_layer_and_head(shape: ModelShape, tokens: int, predicted: int) -> torch.Tensor:
    """The matrix products of a one-layer model with one head, written out."""
    hidden, ffn, vocabulary = shape.hidden_size, shape.ffn_hidden_size, shape.vocabulary_size

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, requires_grad=True)

    # The input needs a gradient too, as every layer's but the first does.
    stream_SH = torch.randn(tokens, hidden, requires_grad=True)
    query, key, value = (stream_SH @ weight(hidden, 3 * hidden)).chunk(3, dim=-1)
    mixed_SH = (torch.softmax(query @ key.T, dim=-1) @ value) @ weight(hidden, hidden)
    inner_SF = torch.relu(mixed_SH @ weight(hidden, ffn))
    out_MH = (inner_SF @ weight(ffn, hidden))[:predicted]
    return out_MH @ weight(hidden, hidden) @ weight(hidden, vocabulary)
