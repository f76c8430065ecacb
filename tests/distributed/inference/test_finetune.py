"""Fine-tuning on ranks: gradients of the plain reference, frozen weights, resuming, validation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from geneformer_mcore.model import lora
from geneformer_mcore.model.init import sharded_parameters, slice_of
from geneformer_mcore.training.finetuning import LabelledCells
from geneformer_mcore.training.step import run_schedule
from geneformer_mcore.types import Batch
from tests.distributed import parity, toy
from tests.distributed.inference import tuned
from tests.distributed.inference.tuned import LORA
from tests.distributed.parity import OVERLAP, PACKED, SEQUENCE, TP2, Truth, in_rows
from tests.distributed.ranks import in_turn, run_ranks
from tests.support.reference import Reference

UNEVEN = (PACKED, "train.global_batch_size=5", "data.tokens_per_micro_batch=192")
FROZEN, PROBE = ("finetune.frozen_layers=2",), ("finetune.frozen_layers=4",)


def reference_of(weights: dict[str, torch.Tensor], lora_scale: float = 1.0) -> Reference:
    return Reference(weights, 4, toy.VOCABULARY, lora_scale=lora_scale)


def class_logits(reference: Reference, batch: Batch, by_cls: bool = False) -> torch.Tensor:
    return reference.class_logits(in_rows(batch)[0], batch.lengths_N, by_cls)


def plain(*overrides: str) -> Truth:
    """Mean loss over the cells of a global batch, and its gradients."""
    run = tuned.enlarged(*overrides)
    weights = dict(run.trainable.stages[0].named_parameters())
    reference = reference_of(weights, tuned.LORA_SCALE)
    by_cls = run.config.finetune.pooling.value == "cls"
    batches = run.feed.step(0)
    logits = torch.cat([class_logits(reference, batch, by_cls) for batch in batches])
    loss = F.cross_entropy(logits, torch.cat([batch.labels_M for batch in batches]))
    loss.backward()
    gradients = {n: reference.w[n].grad.numpy() for n, w in weights.items() if w.requires_grad}
    return Truth({}, ("relu", "relu"), gradients, loss.item())


def compare(expected: Truth, *overrides: str) -> tuple[float, float, set[str], int]:
    """(error of the loss, worst relative error of a gradient, those compared, cells here)."""
    run = tuned.enlarged(*overrides)
    (chunk,) = run.trainable.chunks
    batches = run.feed.step(0)
    totals = parity._run_twice(run, batches)
    parity._gather_gradients(chunk)
    gradients = {each.data_ptr(): each.main_grad.double() for each in chunk.module.parameters()
                 if each.requires_grad}  # fmt: skip
    worst, seen = 0.0, set()
    for entry in sharded_parameters(chunk.module):
        if entry.data.data_ptr() in gradients:
            wanted = slice_of(entry, torch.from_numpy(expected.gradients[entry.key]))
            error = (gradients[entry.data.data_ptr()] - wanted).norm()
            # The bias of keys has no gradient but rounding: softmax does not see what all share.
            worst = max(worst, float(error / max(wanted.norm(), 1e-4)))
            seen.add(entry.key)
    here = sum(len(batch.labels_M) for batch in batches)
    return abs(totals.loss - expected.loss), worst, seen, here


KINDS: dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]] = {
    "whole": ((), [UNEVEN, SEQUENCE, OVERLAP]),
    "cls": (("finetune.pooling=cls",), [(*SEQUENCE, PACKED)]),
    "lora": (LORA, [UNEVEN, (TP2,), (*SEQUENCE, PACKED)]),
    "frozen": (FROZEN, [(TP2,)]),
    "probe": (PROBE, [SEQUENCE]),
    "post-LN lora": (("model.norm=post", *LORA), [(TP2,)]),
}
"""Name -> (settings, layouts of two ranks)."""


def test_gradients_are_those_of_the_plain_reference() -> None:
    of_two = [(name, layout) for name, (_, layouts) in KINDS.items() for layout in layouts]
    wanted = [(settings, ()) for settings, _ in KINDS.values()]
    wanted += [(settings, UNEVEN) for settings, layouts in KINDS.values() if UNEVEN in layouts]
    (truths,) = run_ranks(in_turn, 1, *((plain, (*more, *uneven)) for more, uneven in wanted))
    expected = dict(zip(wanted, truths, strict=True))
    for truth in truths:
        assert max(np.abs(each).max() for each in truth.gradients.values()) > 1e-3
    for ranks, cases in ((1, [("whole", ()), ("lora", ())]), (2, of_two)):
        calls = [
            (expected[KINDS[name][0], UNEVEN if layout == UNEVEN else ()], *KINDS[name][0], *layout)
            for name, layout in cases
        ]
        by_rank = run_ranks(in_turn, ranks, *((compare, call) for call in calls))
        for found in by_rank:
            for case, (truth, *_), (loss, worst, seen, _) in zip(cases, calls, found, strict=True):
                assert loss < 1e-5 * truth.loss, case
                assert worst < 1e-5, case
                assert seen == set(truth.gradients), case
        cells_of_ranks = {found[of_two.index(("whole", UNEVEN))][-1] for found in by_rank}
    assert cells_of_ranks == {2, 3}


def steps(*overrides: str) -> tuple[set[str], set[str], set[str]]:
    """Names of (trained weights that moved, those that did not, frozen ones that moved)."""
    run = tuned.make(*overrides)
    frozen, trained = run.digest(trained=False), run.digest(trained=True)
    run.steps(3)
    now = run.digest()
    moved = {name for name, was in trained.items() if now[name] != was}
    return moved, set(trained) - moved, {name for name, was in frozen.items() if now[name] != was}


MOVED: dict[str, tuple[tuple[str, ...], str, int]] = {
    "whole": ((), "embedding.word_embeddings.weight", 4 * 12 + 2 + 2 + 2),
    "frozen": (FROZEN, "encoder.layers.2.self_attention.linear_qkv.weight", 2 * 12 + 2 + 2),
    "probe": (PROBE, "class_head.weight", 2),
    "lora": (LORA, "encoder.layers.0.self_attention.lora_qkv.down", 4 * 8 + 2),
}
"""Name -> (settings, a weight that is trained, how many are)."""


def test_what_is_frozen_stays_bit_for_bit() -> None:
    cases = [(name, layout) for name in MOVED for layout in ((), (TP2,))]
    calls = [(steps, (*MOVED[name][0], *layout)) for name, layout in cases]
    for of_rank in run_ranks(in_turn, 2, *calls):
        for case, (moved, still, frozen_that_moved) in zip(cases, of_rank, strict=True):
            _, first, count = MOVED[case[0]]
            assert not still | frozen_that_moved, case
            assert first in moved, case
            assert len(moved) == count, case


def difference(run: toy.Toy, weights: dict[str, torch.Tensor]) -> float:
    """The largest between a run's logits and those of the plain model with `weights`."""
    (stage,) = run.trainable.stages
    stage.eval()
    batch = run.feed.step(0)[0]
    with torch.no_grad():
        logits = stage.class_logits(stage.encode(batch), batch)
        return float((logits - class_logits(reference_of(weights), batch)).abs().max())


def corrections() -> tuple[float, float, float]:
    """Differences from the model without corrections at first, and after a step; and of large ones
    from the model that they were added to."""
    run = tuned.make(*LORA)
    weights = dict(run.trainable.stages[0].named_parameters())
    bare = {name: each for name, each in weights.items() if ".lora_" not in name}
    first = difference(run, bare)
    run.steps(1)
    then = difference(run, bare)
    run = tuned.enlarged(*LORA)
    weights = {n: each.detach() for n, each in run.trainable.stages[0].named_parameters()}
    folded = lora.folded(weights, run.config.finetune)
    assert len(folded) == len(weights) - 4 * 8
    return first, then, difference(run, folded)


def test_corrections_begin_without_effect_and_can_be_added_to_the_matrices() -> None:
    ((first, then, of_folded),) = run_ranks(corrections, 1)
    assert first < 1e-6
    assert then > 1e-4
    assert of_folded < 1e-5


def validated(*overrides: str) -> dict[str, float]:
    run = tuned.enlarged(*overrides)
    held_out = LabelledCells(run.feed, tuned.CLASSES, 100, run.topology, toy.CPU)
    return held_out.evaluate(run.trainable, True, lambda: None)


def validated_plainly() -> tuple[float, list[int], list[int]]:
    run = tuned.enlarged()
    reference = reference_of(dict(run.trainable.stages[0].named_parameters()))
    batches = [each for start in range(0, 120, 16) for each in run.feed.validation_step(start)]
    with torch.no_grad():
        rows = [class_logits(reference, batch)[: len(batch.labels_M)] for batch in batches]
    logits, labels = torch.cat(rows), torch.cat([batch.labels_M for batch in batches])
    loss = F.cross_entropy(logits, labels).item()
    return loss, labels.tolist(), logits.argmax(dim=1).tolist()


def test_validation_counts_every_cell_once_on_any_layout() -> None:
    ((said, (loss, labels, answers)),) = run_ranks(
        in_turn, 1, (validated, ()), (validated_plainly, ())
    )
    assert len(labels) == said["val_cells"] == 120
    assert abs(said["val_loss"] - loss) < 1e-6 * loss
    assert said["val_accuracy"] == pytest.approx(metrics.accuracy_score(labels, answers))
    f1 = metrics.f1_score(labels, answers, average="macro", zero_division=0)
    assert said["val_macro_f1"] == pytest.approx(f1)
    layouts = ((), (TP2,), (PACKED,))
    for of_rank in run_ranks(in_turn, 2, *((validated, layout) for layout in layouts)):
        for again in of_rank:
            assert again == pytest.approx(said, rel=1e-6)


def no_cell_for_a_rank(*overrides: str) -> list[float]:
    run = tuned.make(PACKED, "train.global_batch_size=1", *overrides)
    batches = run.feed.step(0)
    losses = run.losses(2)
    assert run.topology.data_rank == 0 or not any(len(batch.labels_M) for batch in batches)
    run_schedule(run.trainable.chunks, batches, run.topology, forward_only=False)
    return losses


def test_a_rank_without_cells() -> None:
    first, second = run_ranks(in_turn, 2, *((no_cell_for_a_rank, each) for each in ((), PROBE)))
    assert first == second
    assert np.isfinite(first).all()
