"""The post-LN variant in every kind of layout: what plain PyTorch computes, and trained alike."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import parity, toy
from tests.distributed.parity import Truth
from tests.distributed.ranks import in_turn, run_ranks

POST = "model.norm=post"
SMALL = (POST, "train.global_batch_size=8")


@pytest.fixture(scope="module")
def truth() -> Truth:
    return parity.truth(settings=SMALL)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("tp1 pp1 dp1", ()),
        ("tp1 pp1 dp1", ("parallel.recompute=selective",)),
        ("tp2 pp1 dp1", ()),
        ("tp2 sequence", ("parallel.recompute=full",)),
        ("pp2 interleaved", ()),
        ("dp2 overlap packed", ()),
        ("tp2 pp2 sequence packed", ()),
    ],
)
def test_one_step(name: str, more: tuple[str, ...], truth: Truth) -> None:
    found = parity.parity(name, truth, settings=(*SMALL, *more))
    assert found.logits <= 1e-5
    for key, error in found.gradients.items():
        assert error <= 1e-5, key
    assert found.norm <= 1e-5
    assert found.loss <= 1e-6


def test_its_parameters_are_those_of_a_post_norm_model(truth: Truth) -> None:
    norms = {key for key in truth.weights if "norm" in key and key.endswith("weight")}
    layers = {f"encoder.layers.{n}.post_{part}_layernorm.weight" for n in range(4)
              for part in ("attention", "mlp")}  # fmt: skip
    assert norms == layers | {"embedding.layer_norm.weight", "lm_head.layer_norm.weight"}
    assert all(gradient.any() for gradient in truth.gradients.values())


def formats(*overrides: str) -> tuple[set[str], set[str], list[float]]:
    run = toy.make("train.precision=bf16", POST, *overrides)
    (stage,) = run.trainable.stages
    stream: set[str] = set()
    inside: set[str] = set()

    def note(seen: set[str]):  # type: ignore[no-untyped-def]
        def hook(_module, _inputs, output) -> None:  # type: ignore[no-untyped-def]
            seen.add(str((output[0] if isinstance(output, tuple) else output).dtype))

        return hook

    stage.embedding.register_forward_hook(note(stream))
    for layer in stage.encoder.layers:
        layer.register_forward_hook(note(stream))
        layer.post_attention_layernorm.register_forward_hook(note(stream))
        layer.self_attention.register_forward_hook(note(inside))
        layer.mlp.register_forward_hook(note(inside))
    losses = [result.totals.loss for result in run.steps(6)]
    return stream, inside, losses


def exact_losses() -> list[float]:
    return [result.totals.loss for result in toy.make(POST).steps(6)]


def test_its_residual_stream_stays_in_32_bits_unless_16_are_asked_for() -> None:
    narrow = ("model.fp32_residual=false",)
    (found,) = run_ranks(in_turn, 1, (formats, ()), (exact_losses, ()), (formats, narrow))
    (stream, inside, losses), exact, (narrow_stream, narrow_inside, _) = found
    assert (stream, inside) == ({"torch.float32"}, {"torch.bfloat16"})
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(exact), rtol=5e-3, atol=0)
    assert narrow_stream == narrow_inside == {"torch.bfloat16"}


def embedded() -> tuple[float, float]:
    run = toy.make(POST, "model.hidden_dropout=0.5")
    (stage,) = run.trainable.stages
    shares = []
    for is_training in (True, False):
        stage.train(is_training)
        batch = run.feed.step(0)[0]
        found = stage.embedding(batch.tokens_BS.long(), torch.zeros_like(batch.tokens_BS).long())
        shares.append(float((found == 0).float().mean()))
    return shares[0], shares[1]


def test_the_embedding_is_normalised_before_its_dropout() -> None:
    """As BERT does it; a norm behind dropout would leave no zeros."""
    ((training, evaluating),) = run_ranks(embedded, 1)
    assert 0.45 < training < 0.55
    assert evaluating == 0
