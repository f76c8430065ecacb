"""Every layout trains the same model: from the seed, and from a checkpoint of another layout."""

from __future__ import annotations

import pytest
import torch

from geneformer_mcore.training.step import StepResult
from tests.distributed import toy
from tests.distributed.parity import INTERLEAVED, PP2, TP2
from tests.distributed.ranks import run_ranks

STEPS, LOADED_AT = 10, 7
Seen = tuple[float, float, int, int, int, int]
LARGE_BATCHES = "train.micro_batch_size=8"

LAYOUTS = {
    "pp2-interleaved": (2, *INTERLEAVED),
    "tp2-pp2": (4, TP2, PP2),
    "tp2-dp2": (4, TP2),
    "recompute-all": (1, "parallel.recompute=full"),
    "recompute-attention": (1, "parallel.recompute=selective"),
}
"""tp2 with sequences, pp2 and dp2 alone are compared with plain PyTorch's curve: test_parity.py."""


def from_seed(folder: str) -> list[Seen]:
    """And a checkpoint in `folder`."""
    run = toy.make(LARGE_BATCHES)
    before = run.steps(LOADED_AT)
    run.write(folder)
    return seen(before + run.steps(STEPS - LOADED_AT))


def from_both(folder: str, *overrides: str) -> tuple[list[Seen], list[Seen]]:
    """From the seed, and from the checkpoint."""
    seeded = seen(toy.make(LARGE_BATCHES, *overrides).steps(STEPS))
    loaded = toy.loaded(folder, LOADED_AT, LARGE_BATCHES, *overrides)
    return seeded, seen(loaded.steps(STEPS - LOADED_AT))


def seen(results: list[StepResult]) -> list[Seen]:
    """(loss, gradient norm, genes predicted, cells, tokens, squared lengths) of each step."""
    assert all(result.updated for result in results)
    return [
        (t.loss, r.grad_norm, t.num_predicted, t.num_cells, t.num_tokens, t.sum_squared_lengths)
        for r, t in ((result, result.totals) for result in results)
    ]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Seen]]:
    """The checkpoint and the losses of one rank."""
    folder = str(tmp_path_factory.mktemp("layouts") / "step")
    (losses,) = run_ranks(from_seed, 1, folder)
    assert losses[-1][0] < losses[0][0] - 0.1, "the toy run must learn for this to mean anything"
    return folder, losses


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_losses_from_the_seed_and_from_a_checkpoint(
    name: str, serial: tuple[str, list[Seen]]
) -> None:
    checkpoint, expected = serial
    world_size, *overrides = LAYOUTS[name]
    for seeded, loaded in run_ranks(from_both, world_size, checkpoint, *overrides):
        assert_close(seeded, expected)
        assert_close(loaded, expected[LOADED_AT:])


def assert_close(seen_here: list[Seen], serial: list[Seen]) -> None:
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
    return run.losses(3), [len(batch.labels_M) for batches in steps for batch in batches]


def test_uneven_counts_per_rank_do_not_change_the_loss(serial: tuple[str, list[Seen]]) -> None:
    (losses, counts), (_, others) = run_ranks(unequal_ranks, 2)
    assert counts != others, "the two ranks should predict different numbers of genes"
    assert losses == pytest.approx([loss for loss, *_ in serial[1][:3]], rel=1e-6)
