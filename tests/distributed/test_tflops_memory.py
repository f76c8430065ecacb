"""A measured model is let go: on a GPU the next row needs its memory."""

from __future__ import annotations

import gc
import weakref

import pytest

from benchmarks.side_by_side import tflops_steps
from benchmarks.side_by_side.tflops_grid import Setting
from benchmarks.side_by_side.tflops_run import Conditions
from geneformer_mcore.config.sections import ParallelConfig
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.parallel import groups
from tests.distributed import toy
from tests.distributed.ranks import run_ranks


def still_there(fails: bool) -> list[bool]:
    """Whether model and optimizer are, after they were measured or failed to be."""
    groups.build_groups(ParallelConfig())
    conditions = Conditions(seq_length=16, num_micro_batches=1, steps=1, warmup=0)
    setting = Setting("10m", "fp32", "padded", 0, "sdpa", 0.0, 1)
    seen: list[weakref.ref] = []
    make, step = tflops_steps._trainable, tflops_steps.train_step

    def watched(*given: object) -> optim.Trainable:
        found = make(*given)  # type: ignore[arg-type]
        seen.extend(weakref.ref(each) for each in (found.stages[0], found.optimizer))
        return found

    def failing(*_: object) -> None:
        raise MemoryError

    tflops_steps._trainable = watched
    tflops_steps.train_step = failing if fails else step  # type: ignore[assignment]
    try:
        config, cells = conditions.config(setting), conditions.cells(setting)
        tflops_steps.measure(config, cells, toy.CPU, 0, 1)
    except MemoryError:
        assert fails
    gc.collect()
    return [each() is not None for each in seen]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_model_is_left(fails: bool) -> None:
    assert run_ranks(still_there, 1, fails) == [[False, False]]
