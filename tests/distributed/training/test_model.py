"""Sizes, number formats and dropout of the model."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.utils.flop_counter import FlopCounterMode

from geneformer_mcore.config import load
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import flops, geneformer, megatron_config
from geneformer_mcore.types import padded_vocabulary_size
from tests.distributed import toy
from tests.distributed.parity import PACKED, TP2
from tests.distributed.ranks import in_turn, run_ranks

CARD_10M = ("train.precision=fp32",)
CARD_106M = (*CARD_10M, "model.num_layers=12", "model.hidden_size=768",
             "model.ffn_hidden_size=3072", "model.num_attention_heads=12")  # fmt: skip
CARDS = [
    (CARD_10M, 25_429, 10_288_981),
    (CARD_10M, 25_472, 10_300_032),
    (CARD_10M, None, 10_332_928),
    (CARD_106M, 25_429, 106_775_893),
    (CARD_106M, 25_472, 106_808_960),
    (CARD_106M, None, 106_907_392),
]
"""(settings, padded size of the vocabulary, parameters)."""
BF16 = "train.precision=bf16"


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


def test_parameter_counts_are_the_cards() -> None:
    """Expected: the model card's 10.3M and 106M, at the vocabulary, NVIDIA's padding and ours."""
    calls = [(count_parameters, (card, 25_429, padded)) for card, padded, _ in CARDS]
    (seen,) = run_ranks(in_turn, 1, *calls)
    assert seen == [expected for _, _, expected in CARDS]


def formats(*overrides: str) -> dict[str, set[torch.dtype]]:
    run = toy.make(BF16, "model.num_layers=2", *overrides)
    (stage,) = run.trainable.stages
    seen: dict[str, set[torch.dtype]] = {"stream": set(), "inside": set()}

    def note(kind: str, module: torch.nn.Module) -> None:
        def hook(_module: object, _inputs: object, output: torch.Tensor | tuple) -> None:
            seen[kind].add((output[0] if isinstance(output, tuple) else output).dtype)

        module.register_forward_hook(hook)

    for module in (stage.embedding, *stage.encoder.layers):
        note("stream", module)
    for layer in stage.encoder.layers:
        note("inside", layer.self_attention)
        note("inside", layer.mlp)
        if hasattr(layer, "post_attention_layernorm"):
            note("stream", layer.post_attention_layernorm)
    run.step()
    return seen | {"weights": {parameter.dtype for parameter in stage.parameters()}}


@pytest.mark.parametrize("norm", ["model.norm=pre", "model.norm=post"])
def test_the_residual_stream_stays_in_32_bits_unless_16_are_asked_for(norm: str) -> None:
    calls = ((formats, (norm,)), (formats, (norm, "model.fp32_residual=false")))
    ((wide, narrow),) = run_ranks(in_turn, 1, *calls)
    assert narrow == {kind: {torch.bfloat16} for kind in ("stream", "inside", "weights")}
    assert wide == narrow | {"stream": {torch.float32}}


def embedded() -> tuple[float, float]:
    run = toy.make("model.norm=post", "model.hidden_dropout=0.5")
    (stage,) = run.trainable.stages
    tokens_BS = run.feed.step(0)[0].tokens_BS.long()
    shares = []
    for is_training in (True, False):
        stage.train(is_training)
        found = stage.embedding(tokens_BS, torch.zeros_like(tokens_BS))
        shares.append(float((found == 0).float().mean()))
    return shares[0], shares[1]


def test_the_embedding_is_normalised_before_its_dropout() -> None:
    """As BERT does it; a norm behind dropout would leave no zeros."""
    ((training, evaluating),) = run_ranks(embedded, 1)
    assert 0.45 < training < 0.55
    assert evaluating == 0


def draws(*overrides: str) -> tuple[list[float], list[float]]:
    toy.make(*overrides)
    hidden = torch.rand(4).tolist()
    with get_cuda_rng_tracker().fork():
        return hidden, torch.rand(4).tolist()


def test_tensor_ranks_share_hidden_dropout_alone_and_data_ranks_none() -> None:
    by_rank = run_ranks(in_turn, 2, (draws, (TP2,)), (draws, ()))
    ((shared, split), (first, _)), ((shared_1, split_1), (second, _)) = by_rank
    assert shared == shared_1
    assert split != split_1
    assert first != second


def refuse_non_finite() -> tuple[bool, bool]:
    run = toy.make()
    run.step()
    before = run.digest()
    if run.topology.rank == 1:  # only this rank sees the infinite gradient
        bias = run.trainable.stages[0].encoder.final_layernorm.bias
        bias.register_hook(lambda grad: grad * float("nan"))
    return run.step().updated, run.digest() == before


def test_a_nan_on_one_rank_updates_no_rank() -> None:
    assert run_ranks(refuse_non_finite, 2) == [(False, True), (False, True)]


def counted(*overrides: str) -> tuple[int, list[int], int]:
    """Of a packed step: FLOPs as torch counts them, lengths of its cells, genes predicted."""
    run = toy.make("model.attention=plain", PACKED, "data.pad_multiple=1", *overrides)
    batches = run.feed.step(0)
    with FlopCounterMode(display=False) as counter:
        run.step()
    lengths = [length for batch in batches for length in batch.lengths_N.tolist()]
    return counter.get_total_flops(), lengths, sum(len(batch.labels_M) for batch in batches)


def test_executed_flops_are_what_torch_counts() -> None:
    """With plain attention (of fused attention on a CPU torch counts nothing), and the vocabulary
    as it is multiplied."""
    room = f"data.tokens_per_micro_batch={16 * toy.SEQ_LENGTH}"  # one row, without padding
    ((total, lengths, predicted),) = run_ranks(counted, 1, room)
    assert len(lengths) == 16
    work = flops.Workload(sum(lengths), sum(length**2 for length in lengths), predicted)
    shape = flops.ModelShape(4, 32, 64, padded_vocabulary_size(toy.VOCABULARY))
    assert total == pytest.approx(flops.executed_flops(shape, work), rel=0.01)
    attention = 3 * flops.forward_breakdown(shape, work).attention
    assert attention > 0.05 * total, "attention must weigh enough for the test to see it"
    across = flops.Workload(sum(lengths), sum(lengths) ** 2, predicted)
    assert flops.executed_flops(shape, across) > 2 * total, "attention across cells would be seen"
