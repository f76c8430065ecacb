"""Gradients and weights that travel during the passes: complete whenever somebody reads them."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from geneformer_mcore.training.step import evaluate
from tests.distributed import toy
from tests.distributed.parity import INTERLEAVED, OVERLAP
from tests.distributed.ranks import in_turn, run_ranks


def whole(run: toy.Toy) -> bool:
    parts = [w.detach().flatten() for stage in run.trainable.stages for w in stage.parameters()]
    mine, group = torch.cat(parts), run.trainable.chunks[0].dp_group
    theirs = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(theirs, mine, group=group)
    return all(torch.equal(mine, each) for each in theirs)


def seen(folder: str, *settings: str) -> tuple[list[bool], list[float], tuple]:
    """Whether weights are whole after an update, a save, a validation; further losses, and what
    validation found."""
    run = toy.make(*settings)
    run.steps(3)
    wholes = [whole(run)]
    run.write(folder)
    wholes.append(whole(run))
    run.step()
    validation = astuple(evaluate(run.trainable, run.feed, 2, run.topology, toy.CPU))
    wholes.append(whole(run))
    return wholes, run.losses(3), validation


def buckets(*settings: str) -> int:
    (chunk,) = toy.make(*settings).trainable.chunks
    return sum(len(buffer.buckets) for buffer in chunk.buffers)


@pytest.mark.parametrize(("ranks", "settings"), [(2, ()), (4, INTERLEAVED)])
def test_weights_are_whole(ranks: int, settings: tuple[str, ...], tmp_path: Path) -> None:
    calls = [(seen, (str(tmp_path / f"{len(more)}"), *more, *settings)) for more in ((), OVERLAP)]
    found = run_ranks(in_turn, ranks, *calls)
    (_, losses, validation), _ = found[0]
    for (always, *_), (wholes, losses_here, sums) in found:
        assert always == [True, True, True]
        assert wholes == [False, True, True]
        assert losses_here == pytest.approx(losses, rel=1e-5)
        assert sums == pytest.approx(validation, rel=1e-5)


def test_a_small_model_has_several_buckets_to_overlap() -> None:
    ((overlapping, plainly),) = run_ranks(in_turn, 1, (buckets, OVERLAP), (buckets, ()))
    assert overlapping >= 3
    assert plainly == 1
