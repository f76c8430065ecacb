"""Fine-tuning on ranks: gradients of the plain reference, frozen weights, resuming, validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from geneformer_mcore.checkpoint import state
from geneformer_mcore.distributed import groups
from geneformer_mcore.model import lora
from geneformer_mcore.model.init import sharded_parameters, slice_of
from geneformer_mcore.training.finetuning import LabelledCells
from geneformer_mcore.training.step import run_schedule
from geneformer_mcore.types import Batch
from tests.distributed import parity, toy, tuned
from tests.distributed.parity import OVERLAP, PACKED, SEQUENCE, TP2, in_rows
from tests.distributed.ranks import run_ranks
from tests.distributed.tuned import LORA
from tests.reference import Reference

UNEVEN = (PACKED, "train.global_batch_size=5", "data.tokens_per_micro_batch=192")
FROZEN, PROBE = ("finetune.frozen_layers=2",), ("finetune.frozen_layers=4",)


@dataclass(frozen=True)
class Truth:
    """Plain PyTorch's answer in fp64: mean loss over the cells of a global batch, its gradients."""

    loss: float
    gradients: dict[str, np.ndarray]


def plain(*overrides: str) -> Truth:
    run = tuned.make(*overrides)
    tuned.redraw(run)
    (stage,) = run.trainable.stages
    reference = reference_of(stage, run)
    by_cls = run.config.finetune.pooling.value == "cls"
    logits, labels = [], []
    for batch in run.feed.step(0):
        logits.append(reference.class_logits(*cells_in(batch), by_cls))
        labels.append(batch.labels_M)
    loss = F.cross_entropy(torch.cat(logits), torch.cat(labels))
    loss.backward()
    trained = {name for name, each in stage.named_parameters() if each.requires_grad}
    return Truth(loss.item(), {name: reference.w[name].grad.numpy() for name in trained})


def reference_of(stage: torch.nn.Module, run: toy.Toy) -> Reference:
    weights = dict(stage.named_parameters())
    scale = tuned.LORA_SCALE if run.config.finetune.lora_rank else 1.0
    return Reference(weights, num_heads=4, vocabulary_size=toy.VOCABULARY, lora_scale=scale)


def cells_in(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, lengths) with a row per cell."""
    return in_rows(batch)[0], batch.lengths_N


def compare(expected: Truth, *overrides: str) -> tuple[float, float, set[str], int]:
    """(error of the loss, worst relative error of a gradient, those compared, cells here)."""
    run = tuned.make(*overrides)
    tuned.redraw(run)
    (chunk,) = run.trainable.chunks
    batches = run.feed.step(0)
    totals = parity._run_twice(run, batches)
    parity._gather_gradients(chunk)
    gradients = {each.data_ptr(): each.main_grad for each in trained_of(chunk.module)}
    worst, seen = 0.0, set()
    for entry in sharded_parameters(chunk.module):
        if entry.data.data_ptr() not in gradients:
            continue
        wanted = slice_of(entry, torch.from_numpy(expected.gradients[entry.key]))
        error = (gradients[entry.data.data_ptr()].double() - wanted).norm()
        # The bias of keys has no gradient but rounding: softmax does not see what all share.
        worst = max(worst, float(error / max(wanted.norm(), 1e-4)))
        seen.add(entry.key)
    here = sum(len(batch.labels_M) for batch in batches)
    return abs(totals.loss - expected.loss), worst, seen, here


def trained_of(stage: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [each for each in stage.parameters() if each.requires_grad]


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
Compared = tuple[float, float, set[str], int]


def truths() -> dict[tuple[str, bool], Truth]:
    """(kind, whether the batch is the uneven one) -> the truth."""
    wanted = {(name, layout == UNEVEN) for name, (_, layouts) in KINDS.items()
              for layout in layouts} | {(name, False) for name in ALONE}  # fmt: skip
    found = {}
    for name, is_uneven in sorted(wanted):
        found[name, is_uneven] = plain(*KINDS[name][0], *(UNEVEN if is_uneven else ()))
        groups.stop(stay=True)
    return found


def compared(
    expected: dict[tuple[str, bool], Truth], layouts: dict[str, list[tuple[str, ...]]]
) -> list[tuple[str, tuple[str, ...], Compared]]:
    """[(kind, layout, what was found)]."""
    found = []
    for name, each in layouts.items():
        for layout in each:
            truth = expected[name, layout == UNEVEN]
            found.append((name, layout, compare(truth, *KINDS[name][0], *layout)))
            groups.stop(stay=True)
    return found


def test_gradients_are_those_of_the_plain_reference() -> None:
    (expected,) = run_ranks(truths, 1)
    for truth in expected.values():
        assert max(np.abs(each).max() for each in truth.gradients.values()) > 1e-3
    of_two = {name: layouts for name, (_, layouts) in KINDS.items()}
    alone: dict[str, list[tuple[str, ...]]] = {name: [()] for name in ALONE}
    here_of: dict[str, set[int]] = {}
    for ranks, layouts in ((1, alone), (2, of_two)):
        for of_rank in run_ranks(compared, ranks, expected, layouts):
            for name, layout, (loss, worst, seen, here) in of_rank:
                truth = expected[name, layout == UNEVEN]
                assert loss < 1e-5 * truth.loss, (name, layout)
                assert worst < 1e-5, (name, layout)
                assert seen == set(truth.gradients), (name, layout)
                if layout == UNEVEN:
                    here_of.setdefault(name, set()).add(here)
    assert here_of == {"whole": {2, 3}, "lora": {2, 3}}


def steps(*overrides: str) -> tuple[set[str], set[str], set[str]]:
    """Names of (trained weights that moved, those that did not, frozen ones that moved)."""
    run = tuned.make(*overrides)
    frozen, trained = tuned.digest(run, trained=False), tuned.digest(run, trained=True)
    run.steps(3)
    moved = {name for name, was in trained.items() if tuned.digest(run)[name] != was}
    gone = {name for name, was in frozen.items() if tuned.digest(run)[name] != was}
    return moved, set(trained) - moved, gone


MOVED: dict[str, tuple[tuple[str, ...], str, int]] = {
    "whole": ((), "embedding.word_embeddings.weight", 4 * 12 + 2 + 2 + 2),
    "frozen": (FROZEN, "encoder.layers.2.self_attention.linear_qkv.weight", 2 * 12 + 2 + 2),
    "probe": (PROBE, "class_head.weight", 2),
    "lora": (LORA, "encoder.layers.0.self_attention.lora_qkv.down", 4 * 8 + 2),
}
"""Name -> (settings, a weight that is trained, how many are)."""


def steps_of_all() -> dict[tuple[str, tuple[str, ...]], tuple[set[str], set[str], set[str]]]:
    found = {}
    for name, (kind, *_) in MOVED.items():
        for layout in ((), (TP2,)):
            found[name, layout] = steps(*kind, *layout)
            groups.stop(stay=True)
    return found


def test_what_is_frozen_stays_bit_for_bit() -> None:
    for of_rank in run_ranks(steps_of_all, 2):
        for (name, layout), (moved, still, frozen_that_moved) in of_rank.items():
            _, first, count = MOVED[name]
            assert not frozen_that_moved, (name, layout)
            assert first in moved, (name, layout)
            assert not still, (name, layout)
            assert len(moved) == count, (name, layout)


def begins_as_it_was(*overrides: str) -> tuple[float, float]:
    """(largest difference that corrections make at first; after a step)."""
    run = tuned.make(*LORA, *overrides)
    (stage,) = run.trainable.stages
    batch = run.feed.step(0)[0]
    stage.eval()

    def difference() -> float:
        bare = {n: w for n, w in stage.named_parameters() if ".lora_" not in n}
        plain_model = Reference(bare, num_heads=4, vocabulary_size=toy.VOCABULARY)
        with torch.no_grad():
            logits = stage.class_logits(stage.encode(batch), batch)
            return float((logits - plain_model.class_logits(*cells_in(batch))).abs().max())

    first = difference()
    run.steps(1)
    stage.eval()
    return first, difference()


def corrections() -> tuple[tuple[float, float], float]:
    first = begins_as_it_was()
    groups.stop(stay=True)
    return first, folded_is_the_same()


def test_corrections_begin_without_effect_and_can_be_added_to_the_matrices() -> None:
    (((first, then), difference),) = run_ranks(corrections, 1)
    assert first < 1e-6
    assert then > 1e-4
    assert difference < 1e-5


def folded_is_the_same(*overrides: str) -> float:
    run = tuned.make(*LORA, *overrides)
    tuned.redraw(run)
    (stage,) = run.trainable.stages
    batch = run.feed.step(0)[0]
    weights = {name: each.detach() for name, each in stage.named_parameters()}
    bare = lora.folded(weights, run.config.finetune)
    assert len(bare) == len(weights) - 4 * 8
    reference = Reference(bare, num_heads=4, vocabulary_size=toy.VOCABULARY)
    with torch.no_grad():
        logits = stage.class_logits(stage.encode(batch), batch)
        return float((logits - reference.class_logits(*cells_in(batch))).abs().max())


AGO = 2
"""Steps before the checkpoint, and after it."""
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "finetune.dropout=0.2")


def train_and_save(folder: str, *overrides: str) -> tuple[list[float], dict[str, str]]:
    run = tuned.make(*DROPOUT, *overrides)
    run.steps(AGO)
    if run.topology.rank == 0:
        Path(folder).mkdir()
    torch.distributed.barrier()
    state.save(run.trainable, Path(folder), run.topology.rank)
    return [result.totals.loss for result in run.steps(AGO)], tuned.digest(run)


def resume(folder: str, *overrides: str) -> tuple[list[float], dict[str, str]]:
    run = tuned.make(*DROPOUT, "train.seed=99", *overrides)
    state.load(run.trainable, Path(folder), run.topology.rank)
    same = replace(run.config.train, seed=toy.Config().train.seed)
    run.feed = tuned.feed(replace(run.config, train=same), run.topology)
    run.position = AGO * run.config.train.global_batch_size
    return [result.totals.loss for result in run.steps(AGO)], tuned.digest(run)


RESUMED = {
    "whole": UNEVEN,
    "lora": (*LORA, *SEQUENCE, PACKED),
    "frozen": (*FROZEN, TP2, "train.precision=bf16"),
}


def each_resumed(work: Callable[..., Any], folder: str) -> dict[str, Any]:
    found = {}
    for name, overrides in RESUMED.items():
        found[name] = work(f"{folder}/{name}", *overrides)
        groups.stop(stay=True)
    return found


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    undisturbed = run_ranks(each_resumed, 2, train_and_save, str(tmp_path))
    assert run_ranks(each_resumed, 2, resume, str(tmp_path)) == undisturbed


def validated(*overrides: str) -> tuple[dict[str, float], float, list[int], list[int]]:
    """(what validation says; loss, labels and answers of the plain model)."""
    run = tuned.make(*overrides)
    tuned.redraw(run)
    held_out = LabelledCells(run.feed, tuned.CLASSES, 100, run.topology, toy.CPU)
    said = held_out.evaluate(run.trainable, True, lambda: None)
    if run.config.parallel.tensor > 1:
        return said, 0.0, [], []
    alone = replace(run.topology, data_rank=0, data_size=1)
    reference = reference_of(run.trainable.stages[0], run)
    losses, labels, answers = [], [], []
    whole = tuned.feed(run.config, alone)
    for start in range(0, 120, 16):
        for batch in whole.validation_step(start):
            with torch.no_grad():
                logits = reference.class_logits(*cells_in(batch))
            asked = logits[: len(batch.labels_M)]
            losses.append(F.cross_entropy(asked, batch.labels_M, reduction="sum").item())
            labels += batch.labels_M.tolist()
            answers += asked.argmax(dim=1).tolist()
    return said, sum(losses) / len(labels), labels, answers


def validated_in(layouts: list[tuple[str, ...]]) -> list[dict[str, float]]:
    found = []
    for layout in layouts:
        found.append(validated(*layout)[0])
        groups.stop(stay=True)
    return found


def test_validation_counts_every_cell_once_on_any_layout() -> None:
    ((said, loss, labels, answers),) = run_ranks(validated, 1)
    assert len(labels) == said["val_cells"] == 120
    assert abs(said["val_loss"] - loss) < 1e-6 * loss
    assert said["val_accuracy"] == pytest.approx(metrics.accuracy_score(labels, answers))
    f1 = metrics.f1_score(labels, answers, average="macro", zero_division=0)
    assert said["val_macro_f1"] == pytest.approx(f1)
    for of_rank in run_ranks(validated_in, 2, [(), (TP2,), (PACKED,)]):
        for again in of_rank:
            assert again == pytest.approx(said, rel=1e-6)


def no_cell_for_a_rank(*overrides: str) -> list[float]:
    run = tuned.make(PACKED, "train.global_batch_size=1", *overrides)
    batches = run.feed.step(0)
    losses = [result.totals.loss for result in run.steps(2)]
    if run.topology.data_rank == 1:
        assert sum(len(batch.labels_M) for batch in batches) == 0
    run_schedule(run.trainable.chunks, batches, run.topology, forward_only=False)
    return losses


def both_without_cells() -> list[list[float]]:
    found = []
    for kind in ((), PROBE):
        found.append(no_cell_for_a_rank(*kind))
        groups.stop(stay=True)
    return found


def test_a_rank_without_cells() -> None:
    first, second = run_ranks(both_without_cells, 2)
    assert first == second
    assert np.isfinite(first).all()
