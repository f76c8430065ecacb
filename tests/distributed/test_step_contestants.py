"""The contestants of benchmarks/train_step.py: they learn, from the same cells, what they say."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers.all_steps import HF_DYNAMIC, HF_PADDED, contestants
from benchmarks.peers.step_contestant import Job, StepContestant
from benchmarks.peers.steps_te import TEBert
from benchmarks.side_by_side.step_cells import StepCells
from geneformer_mcore.backends import is_available
from geneformer_mcore.contracts import PAD, Batch
from geneformer_mcore.model import flops
from geneformer_mcore.model.flops import ModelShape, Work, train_flops
from geneformer_mcore.parallel import groups
from tests.distributed import toy
from tests.distributed.ranks import run_ranks
from tests.step_job import job_in

PADDED_SHAPE = ModelShape(4, 32, 64, 1024)
"""As multiplied: the vocabulary is rounded up."""
HERE = ("ours_padded", HF_DYNAMIC, "hf_grouped", HF_PADDED, "megatron")
"""What can run on a CPU without what is not there yet."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A small model and 120 cells."""
    return job_in(tmp_path_factory.mktemp("flat"))


def made(job: Job, name: str, micro_batch: int = 4) -> StepContestant:
    """A contestant in this process, which is a rank."""
    groups.build_groups(job.config().parallel)
    return contestants()[name](job, micro_batch, toy.CPU)


def on_a_rank(function: Any, *arguments: Any) -> Any:
    """What the function returns in a process that Megatron-Core can be used in."""
    (found,) = run_ranks(function, 1, *arguments)
    return found


def changed(job: Job, *changes: str) -> Job:
    """The same with other settings."""
    return replace(job, changes=(*job.changes, *changes))


def needs(name: str) -> None:
    """Skips the test where the contestant's package is not installed."""
    if name.startswith("hf") and not is_available("transformers"):
        pytest.skip("transformers is not installed")


def losses_of(job: Job, name: str) -> list[float]:
    one = made(job, name)
    steps = [one.placed(one.batches(number)) for number in (0, 1)] * 6
    return [one.step(placed) for placed in steps]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", HERE)
def test_every_contestant_learns(job: Job, name: str, precision: str) -> None:
    needs(name)
    losses = on_a_rank(losses_of, changed(job, f"train.precision={precision}"), name)
    assert losses[0] == pytest.approx(math.log(toy.VOCABULARY), abs=0.25)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.3, losses


def first_losses(job: Job, names: tuple[str, ...], micro_batches: tuple[int, ...]) -> list[float]:
    groups.build_groups(job.config().parallel)
    found = []
    for name in names:
        for micro_batch in micro_batches:
            one = contestants()[name](job, micro_batch, toy.CPU)
            found.append(one.step(one.placed(one.batches(0))))
    return found


def test_plain_megatron_is_the_same_model_with_the_same_weights(job: Job) -> None:
    losses = on_a_rank(first_losses, job, ("ours_padded", "megatron"), (2, 16))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_plain_megatron_also_takes_the_same_steps(job: Job) -> None:
    mine, theirs = (on_a_rank(losses_of, job, name) for name in ("ours_padded", "megatron"))
    assert mine == pytest.approx(theirs, rel=1e-4)


def test_micro_batches_do_not_change_what_a_peer_computes(job: Job) -> None:
    needs(HF_DYNAMIC)
    losses = on_a_rank(first_losses, job, (HF_DYNAMIC, "hf_grouped", HF_PADDED), (1, 16))
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)


def seen(job: Job, names: tuple[str, ...]) -> list[list[tuple[list[int], list[int]]]]:
    """Of each contestant: (tokens as shown, labels) of every cell of steps 0 and 1, sorted."""
    groups.build_groups(job.config().parallel)
    found = []
    for name in names:
        one = contestants()[name](job, 4, toy.CPU)
        found.append(sorted(_cells([*one.batches(0), *one.batches(1)])))
    return found


def _cells(batches: list[Batch]) -> Iterator[tuple[list[int], list[int]]]:
    for batch in batches:
        cell_M = batch.selected_M // batch.tokens_BS.shape[1]
        for row, tokens_S in enumerate(batch.tokens_BS):
            yield tokens_S[tokens_S != PAD].tolist(), batch.labels_M[cell_M == row].tolist()


def test_all_see_the_same_cells_masked_alike(job: Job) -> None:
    names = HERE if is_available("transformers") else ("ours_padded", "megatron")
    ours, *others = on_a_rank(seen, job, names)
    assert len(ours) == 32
    assert sum(len(labels) for _, labels in ours) > 100
    assert all(theirs == ours for theirs in others)


def counted(job: Job, name: str) -> tuple[float, Work, Work]:
    """FLOPs of a step as torch counts them, what is said to be computed on, and what is needed."""
    one = made(job, name)
    batches = one.batches(0)
    cells = StepCells.open(job.cells, one.config, toy.VOCABULARY)
    needed = cells.needed(0, sum(len(batch.labels_M) for batch in batches))
    placed = one.placed(batches)
    with FlopCounterMode(display=False) as counter:
        one.step(placed)
    return counter.get_total_flops(), one.computed(batches, needed), needed


@pytest.mark.parametrize("name", ["ours_padded", HF_DYNAMIC, HF_PADDED, "megatron"])
def test_what_is_computed_is_what_torch_counts(job: Job, name: str) -> None:
    """With plain attention: torch counts nothing for fused attention on a CPU."""
    needs(name)
    job = changed(job, "model.attention=plain", "model.attention_dropout=0.1")  # HF: eager
    total, computed, needed = on_a_rank(counted, job, name)
    assert total == pytest.approx(train_flops(PADDED_SHAPE, computed), rel=0.01)
    attention = flops.forward_breakdown(PADDED_SHAPE, computed).attention * 3
    assert attention > 0.05 * total, "attention must weigh enough for the test to see it"
    assert computed.tokens > needed.tokens
    predicted = needed.num_predicted if name == "ours_padded" else computed.tokens
    assert computed.num_predicted == predicted


def test_hf_has_the_same_sizes_but_for_its_token_types(job: Job) -> None:
    needs(HF_PADDED)
    from benchmarks.peers.steps_hf import TOKEN_TYPES

    one = contestants()[HF_PADDED](job, 4, toy.CPU)
    total = sum(weights.numel() for weights in one.model.parameters())  # type: ignore[attr-defined]
    expected = flops.num_parameters(PADDED_SHAPE, toy.SEQ_LENGTH)
    assert total - TOKEN_TYPES * PADDED_SHAPE.hidden_size == expected


class StandInLayer(torch.nn.Module):
    """What Transformer Engine's layer is, as far as a CPU can tell."""

    def __init__(self, width: int, ffn: int, heads: int, **known: Any) -> None:
        super().__init__()
        assert known["self_attn_mask_type"] == "padding"
        self.layer = torch.nn.TransformerEncoderLayer(
            width, heads, ffn, 0.0, known["activation"], batch_first=True, norm_first=True
        )

    def forward(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden, src_key_padding_mask=attention_mask[:, 0, 0])


def te_losses(job: Job) -> list[float]:
    stand_in = types.ModuleType("transformer_engine.pytorch")
    stand_in.TransformerLayer = StandInLayer  # type: ignore[attr-defined]
    sys.modules["transformer_engine"] = types.ModuleType("transformer_engine")
    sys.modules["transformer_engine"].pytorch = stand_in  # type: ignore[attr-defined]
    sys.modules["transformer_engine.pytorch"] = stand_in
    one = contestants()["te_layers"](job, 8, toy.CPU)
    placed = [one.placed(one.batches(number)) for number in (0, 1)] * 6
    assert isinstance(one.model, TEBert)  # type: ignore[attr-defined]
    return [one.step(each) for each in placed]


def test_the_model_around_te_layers_learns(job: Job) -> None:
    losses = on_a_rank(te_losses, job)
    assert losses[0] == pytest.approx(math.log(toy.VOCABULARY), abs=0.25)
    assert losses[-1] < losses[0] - 0.3, losses
