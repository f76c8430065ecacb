"""Fine-tuning on ranks: gradients of the plain reference, frozen weights, resuming, validation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from geneformer_mcore.checkpoint import state
from geneformer_mcore.model import lora
from geneformer_mcore.model.init import sharded_parameters, slice_of
from geneformer_mcore.training.finetuning import LabelledCells
from geneformer_mcore.training.step import run_schedule
from geneformer_mcore.types import Batch
from tests.distributed import parity, toy
from tests.distributed.inference import tuned
from tests.distributed.inference.tuned import LORA
from tests.distributed.parity import OVERLAP, PACKED, SEQUENCE, TP2, in_rows
from tests.distributed.ranks import in_turn, run_ranks
from tests.support.reference import Reference

UNEVEN = (PACKED, "train.global_batch_size=5", "data.tokens_per_micro_batch=192")
FROZEN, PROBE = ("finetune.frozen_layers=2",), ("finetune.frozen_layers=4",)


@dataclass(frozen=True)
class Truth:
    """Plain PyTorch's answer in fp64: mean loss over the cells of a global batch, its gradients."""

    loss: float
    gradients: dict[str, np.ndarray]


def reference_of(weights: dict[str, torch.Tensor], lora_scale: float = 1.0) -> Reference:
    return Reference(weights, 4, toy.VOCABULARY, lora_scale=lora_scale)


def class_logits(reference: Reference, batch: Batch, by_cls: bool = False) -> torch.Tensor:
    return reference.class_logits(in_rows(batch)[0], batch.lengths_N, by_cls)


def plain(*overrides: str) -> Truth:
    run = tuned.enlarged(*overrides)
    weights = dict(run.trainable.stages[0].named_parameters())
    reference = reference_of(weights, tuned.LORA_SCALE)
    by_cls = run.config.finetune.pooling.value == "cls"
    batches = run.feed.step(0)
    logits = torch.cat([class_logits(reference, batch, by_cls) for batch in batches])
    loss = F.cross_entropy(logits, torch.cat([batch.labels_M for batch in batches]))
    loss.backward()
    trained = {name for name, each in weights.items() if each.requires_grad}
    return Truth(loss.item(), {name: reference.w[name].grad.numpy() for name in trained})


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
ALONE = ("whole", "lora")
"""Those that one rank trains, too."""


def test_gradients_are_those_of_the_plain_reference() -> None:
    of_one: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in ALONE]
    of_two = [(name, layout) for name, (_, layouts) in KINDS.items() for layout in layouts]
    wanted = sorted(
        {(name, UNEVEN if layout == UNEVEN else ()) for name, layout in of_one + of_two}
    )
    calls = [(plain, (*KINDS[name][0], *uneven)) for name, uneven in wanted]
    (truths,) = run_ranks(in_turn, 1, *calls)
    expected = dict(zip(wanted, truths, strict=True))
    for truth in truths:
        assert max(np.abs(each).max() for each in truth.gradients.values()) > 1e-3
    for ranks, cases in ((1, of_one), (2, of_two)):
        truths = [expected[name, UNEVEN if layout == UNEVEN else ()] for name, layout in cases]
        calls = [(compare, (truth, *KINDS[name][0], *layout))
                 for truth, (name, layout) in zip(truths, cases, strict=True)]  # fmt: skip
        by_rank = run_ranks(in_turn, ranks, *calls)
        for found in by_rank:
            for case, truth, (loss, worst, seen, _) in zip(cases, truths, found, strict=True):
                assert loss < 1e-5 * truth.loss, case
                assert worst < 1e-5, case
                assert seen == set(truth.gradients), case
    for number, (_, layout) in enumerate(of_two):
        if layout == UNEVEN:
            assert {found[number][-1] for found in by_rank} == {2, 3}


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
            assert not frozen_that_moved, case
            assert first in moved, case
            assert not still, case
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


AGO = 2
"""Steps before the checkpoint, and after it."""
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "finetune.dropout=0.2")


def train_and_save(folder: str, *overrides: str) -> tuple[list[float], dict[str, str]]:
    run = tuned.make(*DROPOUT, *overrides)
    run.steps(AGO)
    run.write(folder)
    return run.losses(AGO), run.digest()


def resume(folder: str, *overrides: str) -> tuple[list[float], dict[str, str]]:
    run = tuned.make(*DROPOUT, "train.seed=99", *overrides)
    state.load(run.trainable, Path(folder), run.topology.rank)
    same = replace(run.config.train, seed=toy.Config().train.seed)
    run.feed = tuned.feed(replace(run.config, train=same), run.topology)
    run.position = AGO * run.config.train.global_batch_size
    return run.losses(AGO), run.digest()


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    resumed = {
        "whole": UNEVEN,
        "lora": (*LORA, *SEQUENCE, PACKED),
        "frozen": (*FROZEN, TP2, "train.precision=bf16"),
    }
    calls = [(str(tmp_path / name), *overrides) for name, overrides in resumed.items()]
    undisturbed = run_ranks(in_turn, 2, *((train_and_save, call) for call in calls))
    assert run_ranks(in_turn, 2, *((resume, call) for call in calls)) == undisturbed


def validated(*overrides: str) -> dict[str, float]:
    """What validation says."""
    run = tuned.enlarged(*overrides)
    held_out = LabelledCells(run.feed, tuned.CLASSES, 100, run.topology, toy.CPU)
    return held_out.evaluate(run.trainable, True, lambda: None)


def validated_plainly() -> tuple[float, list[int], list[int]]:
    """Loss, labels and answers of the plain model."""
    run = tuned.enlarged()
    reference = reference_of(dict(run.trainable.stages[0].named_parameters()))
    logits, labels = [], []
    for batch in (
        batch for start in range(0, 120, 16) for batch in run.feed.validation_step(start)
    ):
        with torch.no_grad():
            logits.append(class_logits(reference, batch)[: len(batch.labels_M)])
        labels.append(batch.labels_M)
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    loss = F.cross_entropy(all_logits, all_labels).item()
    return loss, all_labels.tolist(), all_logits.argmax(dim=1).tolist()


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
    if run.topology.data_rank == 1:
        assert sum(len(batch.labels_M) for batch in batches) == 0
    run_schedule(run.trainable.chunks, batches, run.topology, forward_only=False)
    return losses


def test_a_rank_without_cells() -> None:
    calls = ((no_cell_for_a_rank, ()), (no_cell_for_a_rank, PROBE))
    first, second = run_ranks(in_turn, 2, *calls)
    assert first == second
    assert np.isfinite(first).all()
