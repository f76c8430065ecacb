"""Packed training is padded training: the same losses and logits, and no look across a border."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from megatron.core import tensor_parallel
from torch.utils.flop_counter import FlopCounterMode

from geneformer_mcore.data.collate import make_batch, padded_length, positions_in_cells
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.model.flops import ModelShape, Workload, executed_flops, forward_breakdown
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.types import NUM_SPECIALS, Batch, padded_vocabulary_size
from tests.distributed import toy
from tests.distributed.curves import SMOOTH
from tests.distributed.parity import PACKED, SEQUENCE, TP2, enlarge
from tests.distributed.ranks import in_turn, run_ranks

STEPS = 15


def test_losses_of_15_steps() -> None:
    rooms = ((), (PACKED,), (PACKED, "data.tokens_per_micro_batch=104"))
    calls = [(toy.losses, (STEPS, *SMOOTH, *room)) for room in rooms]
    ((padded, *packed),) = run_ranks(in_turn, 1, *calls)
    assert padded[-1] < padded[0] - 0.1
    for found in packed:
        assert found == pytest.approx(padded, rel=1e-4)


def all_logits(stage: Geneformer, batch: Batch) -> torch.Tensor:
    """[places, V]"""
    with torch.no_grad():
        return stage.logits(stage.encode(batch), torch.arange(batch.tokens_BS.numel()))


def logits_by_cell(attention: str, packed: bool) -> dict[int, np.ndarray]:
    """cell_key -> logits [n, V] at every position."""
    run = toy.make(f"model.attention={attention}", f"data.packing={str(packed).lower()}")
    enlarge(run)
    found = {}
    for batch in run.feed.step(0):
        logits = all_logits(run.trainable.stages[0], batch)
        rows = torch.arange(len(batch.keys_N)) * batch.tokens_BS.shape[1]
        starts = rows if batch.bounds is None else batch.bounds
        for key, start, length in zip(batch.keys_N, starts, batch.lengths_N, strict=False):
            found[int(key)] = logits[start : start + length, : toy.VOCABULARY].numpy()
    return found


ATTENTIONS = ("plain", "sdpa", "blockwise")


def test_logits_of_every_cell() -> None:
    calls = [("plain", False), *((attention, True) for attention in ATTENTIONS)]
    ((padded, *found),) = run_ranks(in_turn, 1, *((logits_by_cell, call) for call in calls))
    for attention, packed in zip(ATTENTIONS, found, strict=True):
        assert packed.keys() == padded.keys()
        assert len(packed) == 16
        for key, logits in padded.items():
            np.testing.assert_allclose(packed[key], logits, rtol=0, atol=1e-5, err_msg=attention)


def with_another_neighbour(attention: str, *overrides: str) -> tuple[bool, bool]:
    """Whether the logits of all cells but the first, and those of the first, stay the same when
    every gene of the first is exchanged."""
    run = toy.make(f"model.attention={attention}", PACKED, *overrides)
    (stage,) = run.trainable.stages
    stage.eval()
    batch = next(batch for batch in run.feed.step(0) if len(batch.lengths_N) > 2)
    first = int(batch.lengths_N[0])
    tokens_BS = batch.tokens_BS.clone()
    genes = tokens_BS[0, 1:first] - NUM_SPECIALS
    tokens_BS[0, 1:first] = (genes + 17) % (toy.VOCABULARY - NUM_SPECIALS) + NUM_SPECIALS
    before, after = (
        all_logits(stage, each) for each in (batch, replace(batch, tokens_BS=tokens_BS))
    )
    return torch.equal(before[first:], after[first:]), torch.equal(before[:first], after[:first])


def test_no_cell_sees_its_neighbour() -> None:
    (found,) = run_ranks(in_turn, 1, *((with_another_neighbour, (each,)) for each in ATTENTIONS))
    assert dict(zip(ATTENTIONS, found, strict=True)) == dict.fromkeys(ATTENTIONS, (True, False))


def test_no_cell_sees_its_neighbour_under_tensor_and_sequence_parallel() -> None:
    assert run_ranks(with_another_neighbour, 2, "sdpa", *SEQUENCE) == [(True, False)] * 2


def gradients_in_both_ways(*overrides: str) -> tuple[float, float]:
    """Largest relative differences of loss and of any gradient between the masked-only head and
    the full one, on this rank."""
    run = toy.make("model.num_layers=2", *overrides)
    enlarge(run)
    (stage,) = run.trainable.stages
    batch = run.feed.step(0)[0]
    whole = torch.arange(batch.tokens_BS.numel())
    labels = torch.full((len(whole),), NUM_SPECIALS)
    labels[batch.selected_M] = batch.labels_M
    found = []
    for full in (False, True):
        stage.zero_grad()
        hidden = stage.encode(batch)
        if full:
            every = stage.logits(hidden, whole)
            loss_M = tensor_parallel.vocab_parallel_cross_entropy(every, labels)[batch.selected_M]
        else:
            loss_M = stage.loss(hidden, batch)
        loss_M.sum().backward()
        gradients = [weights.main_grad.clone() for weights in stage.parameters()]
        for weights in stage.parameters():
            weights.main_grad.zero_()
        found.append((loss_M.detach(), gradients))
    (masked, first), (wanted, second) = found
    return largest([masked], [wanted]), largest(first, second)


def largest(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Of a rank's part of a gradient that is 0, such as that of the padding of the vocabulary, the
    absolute difference."""
    pairs = zip(found, wanted, strict=True)
    return max(float((mine - theirs).norm() / (theirs.norm() or 1)) for mine, theirs in pairs)


@pytest.mark.parametrize(("ranks", "overrides"), [(1, ()), (2, (TP2,)), (2, SEQUENCE)])
def test_masked_only_head_is_the_full_head(ranks: int, overrides: tuple[str, ...]) -> None:
    calls = [(gradients_in_both_ways, (packing, *overrides))
             for packing in (PACKED, "data.packing=false")]  # fmt: skip
    for loss, gradient in chain.from_iterable(run_ranks(in_turn, ranks, *calls)):
        assert loss <= 1e-6
        assert gradient <= 1e-6


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
    work = Workload(sum(lengths), sum(length**2 for length in lengths), predicted)
    shape = ModelShape(4, 32, 64, padded_vocabulary_size(toy.VOCABULARY))
    assert total == pytest.approx(executed_flops(shape, work), rel=0.01)
    attention = 3 * forward_breakdown(shape, work).attention
    assert attention > 0.05 * total, "attention must weigh enough for the test to see it"
    across = Workload(sum(lengths), sum(lengths) ** 2, predicted)
    assert executed_flops(shape, across) > 2 * total, "attention across cells would be seen, too"


def test_positions_start_anew_in_every_cell() -> None:
    views = toy.views(toy.ToyCells().read(0, 5))
    room = padded_length(int(views.lengths_N.sum()), 64, 10_000)
    masking = Masking(0.15, (0.8, 0.02, 0.18), toy.VOCABULARY, 1)
    nothing = views.lengths_N * 0
    batch = make_batch(views, nothing, nothing.astype(bool), masking, room, packed=True)
    places = positions_in_cells(batch)[0]
    wanted = torch.cat([torch.arange(length) for length in batch.lengths_N])
    assert torch.equal(places[: len(wanted)], wanted)
    assert places.max() < toy.SEQ_LENGTH
