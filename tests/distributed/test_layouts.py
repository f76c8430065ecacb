"""Every layout trains the same model: from the seed, and from a checkpoint of another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geneformer_mcore.checkpoint import state
from geneformer_mcore.training.step import StepResult
from tests.distributed import toy
from tests.distributed.ranks import run_ranks

STEPS, LOADED_AT = 10, 7
Seen = tuple[float, float, int, int, int, int]
LARGE_BATCHES = "train.micro_batch_size=8"

LAYOUTS = {
    "pp2-interleaved": (2, "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "tp2-pp2": (4, "parallel.tensor=2", "parallel.pipeline=2"),
    "tp2-dp2": (4, "parallel.tensor=2"),
    "recompute-all": (1, "parallel.recompute=full"),
    "recompute-attention": (1, "parallel.recompute=selective"),
}
"""tp2 with sequences, pp2 and dp2 alone are compared with plain PyTorch's curve: test_parity.py."""


def from_seed(*overrides: str) -> list[Seen]:
    return seen(toy.make(LARGE_BATCHES, *overrides).steps(STEPS))


def save_at(folder: str, step: int) -> None:
    run = toy.make(LARGE_BATCHES)
    run.steps(step)
    Path(folder).mkdir()
    state.save(run.trainable, Path(folder), run.topology.rank)


def from_checkpoint(folder: str, *overrides: str) -> list[Seen]:
    run = toy.make("train.seed=99", LARGE_BATCHES, *overrides)  # its own weights must not matter
    state.load(run.trainable, Path(folder), None)
    run.feed = toy.feed(toy.load(None, [*toy.SETTINGS, LARGE_BATCHES, *overrides])[0], run.topology)
    run.position = LOADED_AT * run.config.train.global_batch_size
    return seen(run.steps(STEPS - LOADED_AT))


def seen(results: list[StepResult]) -> list[Seen]:
    """(loss, gradient norm, genes predicted, cells, tokens, squared lengths) of each step."""
    assert all(result.updated for result in results)
    totals = [result.totals for result in results]
    return [
        (t.loss, r.grad_norm, t.num_predicted, t.num_cells, t.num_tokens, t.sum_squared_lengths)
        for r, t in zip(results, totals, strict=True)
    ]


def from_both(folder: str, *overrides: str) -> tuple[list, list]:
    return from_seed(*overrides), from_checkpoint(folder, *overrides)


@pytest.fixture(scope="module")
def serial() -> list[Seen]:
    (losses,) = run_ranks(from_seed, 1)
    assert losses[-1][0] < losses[0][0] - 0.1, "the toy run must learn for this to mean anything"
    return losses


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("layouts") / "step")
    run_ranks(save_at, 1, folder, LOADED_AT)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_losses_from_the_seed_and_from_a_checkpoint(
    name: str, serial: list, checkpoint: str
) -> None:
    world_size, *overrides = LAYOUTS[name]
    for seeded, loaded in run_ranks(from_both, world_size, checkpoint, *overrides):
        assert_close(seeded, serial)
        assert_close(loaded, serial[LOADED_AT:])


def assert_close(seen_here: list, serial: list) -> None:
    (losses, norms, *counts), (serial_losses, serial_norms, *serial_counts) = (
        torch.tensor(steps, dtype=torch.float64).T for steps in (seen_here, serial)
    )
    # A sum that every tensor rank takes part in leaves the mean loss as it is, and doubles these.
    assert torch.equal(torch.stack(counts), torch.stack(serial_counts))
    torch.testing.assert_close(losses, serial_losses, rtol=1e-4, atol=0)
    # The norm tells a factor that Adam would hide. At equal weights, that is: later the last bits
    # of tiny gradients, which Adam makes as large as the others, have moved the weights apart.
    torch.testing.assert_close(norms[0], serial_norms[0], rtol=1e-5, atol=0)


def unequal_ranks() -> tuple[list[float], list[int]]:
    run = toy.make(LARGE_BATCHES)
    steps = [run.feed.step(number * run.config.train.global_batch_size) for number in range(3)]
    counts = [len(batch.labels_M) for batches in steps for batch in batches]
    return [result.totals.loss for result in run.steps(3)], counts


def test_uneven_counts_per_rank_do_not_change_the_loss(serial: list) -> None:
    results = run_ranks(unequal_ranks, 2)
    assert results[0][1] != results[1][1], "the two ranks should predict different numbers of genes"
    losses = [loss for loss, *_ in serial[:3]]
    assert results[0][0] == pytest.approx(losses, rel=1e-6)
