"""Gradients and weights that travel during the passes: complete whenever somebody reads them."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from geneformer_mcore.checkpoint import state
from geneformer_mcore.distributed import groups
from geneformer_mcore.training.step import evaluate
from tests.distributed import toy
from tests.distributed.parity import INTERLEAVED, OVERLAP
from tests.distributed.ranks import run_ranks

LAYOUTS = {
    "dp2": (2, ()),
    "pp2 interleaved dp2": (4, INTERLEAVED),
}


def weights(run: toy.Toy) -> torch.Tensor:
    """All weights of this rank, end to end."""
    parts = [w.detach().flatten() for stage in run.trainable.stages for w in stage.parameters()]
    return torch.cat(parts).clone()


def whole(run: toy.Toy) -> bool:
    """Whether this rank's weights are those of its data-parallel neighbours."""
    group = run.trainable.chunks[0].dp_group
    mine = weights(run)
    theirs = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(theirs, mine, group=group)
    return all(torch.equal(mine, each) for each in theirs)


def seen(folder: str, *settings: str) -> tuple[list[bool], list[float], tuple]:
    run = toy.make(*OVERLAP, *settings)
    run.steps(3)
    wholes = [whole(run)]
    if run.topology.rank == 0:
        Path(folder).mkdir()
    torch.distributed.barrier()
    state.save(run.trainable, Path(folder), run.topology.rank)
    wholes.append(whole(run))
    run.step()
    validation = astuple(evaluate(run.trainable, run.feed, 2, run.topology, toy.CPU))
    wholes.append(whole(run))
    return wholes, [result.totals.loss for result in run.steps(3)], validation


def plain(*settings: str) -> tuple[list[float], tuple]:
    run = toy.make(*settings)
    run.steps(4)
    validation = astuple(evaluate(run.trainable, run.feed, 2, run.topology, toy.CPU))
    return [result.totals.loss for result in run.steps(3)], validation


def both(folder: str, *settings: str) -> tuple[tuple, tuple]:
    without = plain(*settings)
    groups.stop(stay=True)
    return without, seen(folder, *settings)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_whole_when_saved_and_when_validated(name: str, tmp_path: Path) -> None:
    ranks, settings = LAYOUTS[name]
    found = run_ranks(both, ranks, str(tmp_path / "step"), *settings)
    (losses, validation), _ = found[0]
    for _, (wholes, losses_here, sums) in found:
        assert wholes == [False, True, True], "after an update, a save, a validation"
        assert losses_here == pytest.approx(losses, rel=1e-5)
        assert sums == pytest.approx(validation, rel=1e-5)


def buckets() -> list[int]:
    """With overlap, and without."""
    found = []
    for settings in (OVERLAP, ()):
        (chunk,) = toy.make(*settings).trainable.chunks
        found.append(sum(len(buffer.buckets) for buffer in chunk.buffers))
        groups.stop(stay=True)
    return found


def test_a_small_model_has_several_buckets_to_overlap() -> None:
    ((overlapping, plainly),) = run_ranks(buckets, 1)
    assert overlapping >= 3
    assert plainly == 1
