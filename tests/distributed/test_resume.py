"""A run continued in its own layout is bitwise the run that was never stopped, dropout on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from geneformer_mcore.checkpoint import state
from tests.distributed import toy
from tests.distributed.parity import PACKED, SEQUENCE
from tests.distributed.ranks import run_ranks

DROPOUT = (
    "model.num_layers=2",
    "train.micro_batch_size=8",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
)
STEPS = 2
"""Before and after the checkpoint."""


def train_and_save(folder: str, *overrides: str) -> tuple[list[float], str]:
    run = toy.make(*DROPOUT, *overrides)
    run.steps(STEPS)
    if run.topology.rank == 0:
        Path(folder).mkdir()
    toy.torch.distributed.barrier()
    state.save(run.trainable, Path(folder), run.topology.rank)
    return [result.totals.loss for result in run.steps(STEPS)], digest(run)


def resume(folder: str, *overrides: str) -> tuple[list[float], str]:
    run = toy.make(*DROPOUT, "train.seed=99", *overrides)
    state.load(run.trainable, Path(folder), run.topology.rank)
    run.feed = toy.feed(toy.load(None, [*toy.SETTINGS, *DROPOUT, *overrides])[0], run.topology)
    run.position = STEPS * run.config.train.global_batch_size
    return [result.totals.loss for result in run.steps(STEPS)], digest(run)


def digest(run: toy.Toy) -> str:
    """SHA-256 of this rank's weights."""
    sha = hashlib.sha256()
    for stage in run.trainable.stages:
        for _, parameter in sorted(stage.named_parameters()):
            sha.update(parameter.detach().float().numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (2, ()),
        (2, ("parallel.tensor=2",)),
        (2, ("parallel.pipeline=2", "train.precision=bf16")),
        (2, (*SEQUENCE, PACKED, "model.attention=blockwise")),
    ],
)
def test_bitwise(world_size: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    folder = str(tmp_path / "step")
    undisturbed = run_ranks(train_and_save, world_size, folder, *overrides)
    assert run_ranks(resume, world_size, folder, *overrides) == undisturbed
