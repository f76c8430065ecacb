"""The one-rank model against the plain reference: logits, losses and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import toy
from tests.distributed.ranks import in_turn, run_ranks
from tests.reference import Reference

SPREAD = 8.0
"""Initial weights are so small that most mistakes would hide below 1e-5: make them larger."""


def compare(*overrides: str) -> dict[str, float]:
    run = toy.make(*overrides)
    (chunk,) = run.trainable.chunks
    stage = chunk.module
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(SPREAD)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    gelu = run.config.model.activation.value == "gelu"
    reference = Reference(
        stage.state_dict(),
        run.config.model.num_attention_heads,
        toy.VOCABULARY,
        F.gelu if gelu else F.relu,
        F.relu if run.config.model.head_activation else None,
    )
    batch = run.feed.step(0)[0]
    logits = stage.logits(stage.encode(batch), batch.selected_M).detach()
    wanted = reference.logits(batch.tokens_BS, batch.lengths_N).flatten(0, 1)[batch.selected_M]
    loss = chunk(batch).sum()
    loss.backward()
    wanted = wanted.detach()
    expected = reference.loss_sum(
        batch.tokens_BS, batch.lengths_N, batch.selected_M, batch.labels_M
    )
    expected.backward()
    worst = 0.0
    for name, parameter in stage.named_parameters():
        theirs = reference.w[name].grad
        worst = max(worst, float((parameter.main_grad - theirs).norm() / theirs.norm()))
    return {
        "logits": float((logits[:, : toy.VOCABULARY] - wanted).abs().max()),
        "spread": float(wanted.std()),
        "padding": float(logits[:, toy.VOCABULARY :].exp().sum()),
        "loss": abs(loss.item() - expected.item()) / expected.item(),
        "gradients": worst,
    }


VARIANTS = (
    ("model.attention=plain",),
    ("model.attention=sdpa",),
    ("model.activation=gelu",),
    ("model.activation=gelu", "model.head_activation=relu"),
    ("model.norm=post",),
    ("model.norm=post", "model.activation=gelu"),
)


@pytest.fixture(scope="module")
def compared() -> dict[tuple[str, ...], dict[str, float]]:
    """`compare` of every variant."""
    (found,) = run_ranks(in_turn, 1, *((compare, variant) for variant in VARIANTS))
    return dict(zip(VARIANTS, found, strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_equals_the_reference(
    variant: tuple[str, ...], compared: dict[tuple[str, ...], dict[str, float]]
) -> None:
    seen = compared[variant]
    assert seen["spread"] > 0.5, "weights too small for the comparison to mean anything"
    assert seen["logits"] < 1e-5
    assert seen["loss"] < 1e-6
    assert seen["gradients"] < 1e-5
    assert seen["padding"] == 0


def idle_cells_and_empty_batches() -> tuple[float, float, int]:
    run = toy.make()
    (stage,) = run.trainable.stages
    batch = run.feed.step(0)[0]
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = type(batch)(batch.tokens_BS, batch.lengths_N, nothing, nothing, batch.keys_N)
    loss = run.trainable.chunks[0](empty).sum()
    loss.backward()
    gradient = max(float(parameter.main_grad.abs().max()) for parameter in stage.parameters())
    # The last validation batch is filled up with cells in which nothing is predicted.
    last = run.feed.order.num_cells // 16 * 16
    filled = run.feed.validation_step(last)
    cells = {int(k) for b in filled for k, n in zip(b.keys_N, counts(b), strict=True) if n}
    return loss.item(), gradient, len(cells)


def counts(batch) -> list[int]:  # type: ignore[no-untyped-def]
    cell_M = batch.selected_M // batch.tokens_BS.shape[1]
    return torch.bincount(cell_M, minlength=len(batch.keys_N)).tolist()


def test_nothing_to_predict_is_no_special_case() -> None:
    ((loss, gradient, cells),) = run_ranks(idle_cells_and_empty_batches, 1)
    assert loss == 0
    assert gradient == 0
    assert cells <= 120 % 16
