"""The arithmetic of model/flops.py against published sizes, a table made by hand, and torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from geneformer_mcore.model.flops import (
    ModelShape,
    Workload,
    executed_flops,
    forward_breakdown,
    forward_flops,
    num_parameters,
    padded_equivalent_flops,
    padded_workload,
    train_flops,
)

SEQ_LENGTH = 2048


def shape_10m(vocabulary_size: int = 25_429) -> ModelShape:
    return ModelShape(6, 256, 512, vocabulary_size)


def shape_106m(vocabulary_size: int = 25_429) -> ModelShape:
    return ModelShape(12, 768, 3072, vocabulary_size)


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        (shape_10m, {25_429: 10_288_981, 25_472: 10_300_032, 25_600: 10_332_928}),
        (shape_106m, {25_429: 106_775_893, 25_472: 106_808_960, 25_600: 106_907_392}),
    ],
)
def test_parameters_are_the_published_ones(
    shape: Callable[[int], ModelShape], published: dict[int, int]
) -> None:
    assert {size: num_parameters(shape(size), SEQ_LENGTH) for size in published} == published


@pytest.mark.parametrize(
    ("shape", "gflops", "shares"),
    [
        (shape_106m(), (1754.8, 1544.6), (59.5, 26.4, 13.7)),
        (shape_10m(), (196.8, 128.1), (19.6, 39.3, 40.7)),
    ],
)
def test_a_full_cell(
    shape: ModelShape, gflops: tuple[float, float], shares: tuple[float, float, float]
) -> None:
    """GFLOP of training with all positions predicted, and with 15 %; shares of a forward pass in %:
    linear layers, attention, vocabulary."""
    padded = padded_equivalent_flops(shape, SEQ_LENGTH) / 1e9
    assert padded == pytest.approx(gflops[0], abs=0.05)
    fifteen_percent = Workload(SEQ_LENGTH, SEQ_LENGTH**2, round(0.15 * SEQ_LENGTH))
    assert executed_flops(shape, fifteen_percent) / 1e9 == pytest.approx(gflops[1], abs=0.1)
    parts = forward_breakdown(shape, padded_workload(SEQ_LENGTH))
    found = [100 * x / parts.total for x in (parts.linear, parts.attention, parts.vocabulary)]
    assert found == pytest.approx(shares, abs=0.06)


def test_training_is_three_forward_passes() -> None:
    work = Workload(tokens=700, sum_squared_lengths=300_000, num_predicted=90)
    assert train_flops(shape_10m(), work) == 3 * forward_flops(shape_10m(), work)


def test_packed_cells_cost_the_sum_of_their_squares() -> None:
    apart = sum(forward_flops(shape_10m(), Workload(n, n**2, n // 5)) for n in (100, 900))
    assert forward_flops(shape_10m(), Workload(1000, 100**2 + 900**2, 200)) == apart
    assert forward_flops(shape_10m(), Workload(1000, 1000**2, 200)) > apart


def test_formulas_are_what_torch_counts() -> None:
    shape, tokens, predicted = ModelShape(1, 32, 80, 50), 24, 5
    with FlopCounterMode(display=False) as counter:
        _one_layer_and_head(shape, tokens, predicted).sum().backward()
    assert counter.get_total_flops() == train_flops(shape, Workload(tokens, tokens**2, predicted))


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
