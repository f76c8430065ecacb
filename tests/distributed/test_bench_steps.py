"""Contestants of train_step.py learn the same from the same cells; tflops.py frees its models."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.harness import tflops_rows
from benchmarks.harness.peers.steps import CONTESTANTS, Job
from geneformer_mcore.backends import is_available
from geneformer_mcore.config.sections import ParallelConfig
from geneformer_mcore.distributed import groups
from geneformer_mcore.types import PAD, Batch
from tests.distributed import toy
from tests.distributed.ranks import run_ranks
from tests.support.step_job import job_in

HERE = ("ours_padded", "megatron")
HERE += ("hf_dynamic", "hf_padded") if is_available("transformers") else ()
"""Those that can be measured."""


class Found(NamedTuple):
    """losses: {precision: of twelve steps over the same two global batches};  first_losses: with
    two other micro batches;  seen: (tokens as shown, labels) of every cell of two steps, sorted."""

    losses: dict[str, list[float]]
    first_losses: list[float]
    seen: list[tuple[list[int], list[int]]]


def losses_of(
    job: Job, name: str, micro_batch: int = 8, repeats: int = 6, precision: str = "fp32"
) -> list[float]:
    job = replace(job, changes=(*job.changes, f"train.precision={precision}"))
    one = CONTESTANTS[name](job, micro_batch, toy.CPU)
    return [one.step(each) for each in [one.placed(one.batches(n)) for n in (0, 1)] * repeats]


def seen(batches: list[Batch]) -> Iterator[tuple[list[int], list[int]]]:
    for batch in batches:
        cell_M = batch.selected_M // batch.tokens_BS.shape[1]
        for row, tokens_S in enumerate(batch.tokens_BS):
            yield tokens_S[tokens_S != PAD].tolist(), batch.labels_M[cell_M == row].tolist()


def all_found(job: Job) -> dict[str, Found]:
    groups.build_groups(job.config().parallel)
    found = {}
    for name in HERE:
        shown = CONTESTANTS[name](job, 4, toy.CPU)
        found[name] = Found(
            {each: losses_of(job, name, precision=each) for each in ("fp32", "bf16")},
            [losses_of(job, name, micro_batch, repeats=1)[0] for micro_batch in (2, 16)],
            sorted(seen([batch for step in (0, 1) for batch in shown.batches(step)])),
        )
    return found


def test_contestants_learn_the_same_from_the_same_cells(tmp_path: Path) -> None:
    """Plain Megatron is ours; for the others micro batches and padding make no difference."""
    (found,) = run_ranks(all_found, 1, job_in(tmp_path))
    for name, each in found.items():
        for precision, losses in each.losses.items():
            assert losses[0] == pytest.approx(math.log(toy.VOCABULARY), abs=0.25), name
            assert all(map(math.isfinite, losses)), (name, precision)
            assert losses[-1] < losses[0] - 0.3, (name, precision)
        assert len(each.seen) == 32
        assert sum(len(labels) for _, labels in each.seen) > 100
        assert each.seen == found["ours_padded"].seen, name
    ours, megatron, *others = found.values()
    first = ours.losses["fp32"][0]
    assert ours.first_losses + megatron.first_losses == pytest.approx([first] * 4, rel=1e-5)
    assert megatron.losses["fp32"] == pytest.approx(ours.losses["fp32"], rel=1e-4)
    losses = [loss for other in others for loss in other.first_losses]
    assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-5)


def still_there() -> list[bool]:
    """Whether model and optimizer are, after they were measured and after that failed."""
    groups.build_groups(ParallelConfig())
    setting = tflops_rows.Setting("10m", "fp32", "padded", "sdpa", 0.0, 1)
    config, cells = setting.config(16), setting.cells(16)
    kept: list[weakref.ref] = []
    wrap: Any = tflops_rows.optim.wrap

    def watched(*given: object) -> Any:
        trainable = wrap(*given)
        kept.extend(weakref.ref(each) for each in (trainable.stages[0], trainable.optimizer))
        return trainable

    def failing(*_: object) -> Any:
        raise MemoryError

    tflops_rows.optim.wrap = watched
    tflops_rows.measure(config, cells, toy.CPU, 0, 1)
    tflops_rows.train_step = failing
    with pytest.raises(MemoryError):
        tflops_rows.measure(config, cells, toy.CPU, 0, 1)
    gc.collect()
    return [each() is not None for each in kept]


def test_nothing_of_a_measured_model_is_left() -> None:
    assert run_ranks(still_there, 1) == [[False] * 4]
