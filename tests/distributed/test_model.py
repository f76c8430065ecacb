"""Sizes, number formats and dropout of the model."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.utils.flop_counter import FlopCounterMode

from geneformer_mcore.config import load
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import flops, geneformer, megatron_config
from tests.distributed import toy
from tests.distributed.ranks import in_turn, run_ranks

CARD_10M = ("train.precision=fp32",)
CARD_106M = (
    "train.precision=fp32",
    "model.num_layers=12",
    "model.hidden_size=768",
    "model.ffn_hidden_size=3072",
    "model.num_attention_heads=12",
)


def count_parameters(overrides: tuple[str, ...], vocabulary: int, padded: int) -> int:
    config, _ = load(None, overrides)
    groups.stop(stay=True)
    groups.build_groups(config.parallel)
    core = megatron_config.transformer_config(
        config.model, config.parallel, config.train.precision, toy.CPU
    )
    core.perform_initialization = False  # only sizes matter here
    (stage,) = geneformer.build(config.model, core, toy.CPU, vocabulary, 2048, padded_size=padded)
    return sum(parameter.numel() for parameter in stage.parameters())


CARDS = [
    (CARD_10M, 25_429, 10_288_981),
    (CARD_10M, 25_472, 10_300_032),
    (CARD_10M, None, 10_332_928),
    (CARD_106M, 25_429, 106_775_893),
    (CARD_106M, 25_472, 106_808_960),
    (CARD_106M, None, 106_907_392),
]
"""(settings, padded size of the vocabulary, parameters)."""


def test_parameter_counts_are_the_cards() -> None:
    """Expected: the model card's 10.3M and 106M, at the vocabulary, NVIDIA's padding and ours."""
    calls = [(count_parameters, (card, 25_429, padded)) for card, padded, _ in CARDS]
    (seen,) = run_ranks(in_turn, 1, *calls)
    assert seen == [expected for _, _, expected in CARDS]


def formats(*overrides: str) -> dict[str, set[str]]:
    run = toy.make("train.precision=bf16", "model.num_layers=2", *overrides)
    (stage,) = run.trainable.stages
    seen: dict[str, set[str]] = {"stream": set(), "inside": set(), "weights": set()}

    def note(kind: str):  # type: ignore[no-untyped-def]
        def hook(_module, _inputs, output) -> None:  # type: ignore[no-untyped-def]
            tensor = output[0] if isinstance(output, tuple) else output
            seen[kind].add(str(tensor.dtype))

        return hook

    stage.embedding.register_forward_hook(note("stream"))
    for layer in stage.encoder.layers:
        layer.register_forward_hook(note("stream"))
        layer.self_attention.register_forward_hook(note("inside"))
        layer.mlp.register_forward_hook(note("inside"))
    run.step()
    seen["weights"] = {str(parameter.dtype) for parameter in stage.parameters()}
    return seen


def test_the_residual_stream_stays_in_32_bits_unless_16_are_asked_for() -> None:
    ((wide, narrow),) = run_ranks(
        in_turn, 1, (formats, ()), (formats, ("model.fp32_residual=false",))
    )
    assert wide == {
        "stream": {"torch.float32"},
        "inside": {"torch.bfloat16"},
        "weights": {"torch.bfloat16"},
    }
    assert narrow["stream"] == {"torch.bfloat16"}


def losses(*overrides: str) -> list[float]:
    return [result.totals.loss for result in toy.make(*overrides).steps(6)]


def test_bf16_follows_fp32() -> None:
    ((exact, rounded),) = run_ranks(in_turn, 1, (losses, ()), (losses, ("train.precision=bf16",)))
    torch.testing.assert_close(torch.tensor(rounded), torch.tensor(exact), rtol=5e-3, atol=0)
    assert rounded != exact


def same_draws() -> tuple[list[float], list[float]]:
    run = toy.make("parallel.tensor=2")
    shared = torch.rand(4).tolist()
    with get_cuda_rng_tracker().fork():
        split = torch.rand(4).tolist()
    assert run.topology.world_size == 2
    return shared, split


def test_tensor_ranks_share_hidden_dropout_and_split_attention_dropout() -> None:
    (shared_0, split_0), (shared_1, split_1) = run_ranks(same_draws, 2)
    assert shared_0 == shared_1
    assert split_0 != split_1


def data_draws() -> list[float]:
    toy.make()
    return torch.rand(4).tolist()


def test_data_ranks_drop_differently() -> None:
    first, second = run_ranks(data_draws, 2)
    assert first != second


def refuse_non_finite() -> tuple[bool, bool]:
    run = toy.make()
    (stage,) = run.trainable.stages
    run.step()
    before = [parameter.detach().clone() for parameter in stage.parameters()]
    if run.topology.rank == 1:  # only this rank sees the infinite gradient
        stage.encoder.final_layernorm.bias.register_hook(lambda grad: grad * float("nan"))
    result = run.step()
    after = list(stage.parameters())
    return result.updated, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_nan_on_one_rank_updates_no_rank() -> None:
    assert run_ranks(refuse_non_finite, 2) == [(False, True), (False, True)]


def counted_and_expected() -> tuple[float, float, float]:
    run = toy.make("model.attention=plain")
    shape = flops.ModelShape(4, 32, 64, vocabulary_size=1024)  # padded: that is what is multiplied
    batch = run.feed.step(0)[0]
    full = type(batch)(
        batch.tokens_BS,
        torch.full_like(batch.lengths_N, batch.tokens_BS.shape[1]),
        batch.selected_M,
        batch.labels_M,
        batch.keys_N,
    )
    cells, positions = full.tokens_BS.shape
    work = flops.Workload(cells * positions, cells * positions**2, len(full.labels_M))
    with FlopCounterMode(display=False) as counter:
        run.trainable.chunks[0](full).sum().backward()
    attention = flops.forward_breakdown(shape, work).attention * flops.TRAIN_OVER_FORWARD
    return counter.get_total_flops(), flops.train_flops(shape, work), attention


def test_the_flop_formula_is_what_torch_counts() -> None:
    """With plain attention: torch counts nothing for fused attention on a CPU."""
    ((counted, expected, attention),) = run_ranks(counted_and_expected, 1)
    assert counted == pytest.approx(expected, rel=0.01)
    assert attention > 0.05 * expected, "attention must weigh enough for the test to see it"
