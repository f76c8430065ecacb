"""A checkpoint of any layout continues under any other: weights, moments and steps all fit.

    save under A -> load under B -> save again: every tensor, read whole, is bitwise the same
                                 -> train on:   losses are those of A, had it gone on

The first loss after loading proves only the weights; the next ones prove fp32 copies, moments and
step. Two-layer stages make Megatron's gradient buckets end at places that need padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_tensors

from geneformer_mcore.checkpoint import plain_metadata, state
from tests.distributed import toy
from tests.distributed.parity import INTERLEAVED, OVERLAP, PACKED, PP2, SEQUENCE, TP2
from tests.distributed.ranks import run_ranks

SAVED_AT, CONTINUED = 3, 5
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp1 pp1 dp1": (1, ()),
    "tp2 pp1 dp1": (2, (TP2,)),
    "tp1 pp2 dp1": (2, (PP2,)),
    "tp1 pp1 dp2": (2, ()),
    "tp2 pp2 dp1": (4, (TP2, PP2)),
    "tp1 pp2 dp2": (4, (PP2,)),
}
OTHERS = {
    "pp2 interleaved": (2, INTERLEAVED),
    "pp2 dp2 overlap": (4, (PP2, *OVERLAP)),
    "dp2 overlap": (2, OVERLAP),
    "packed": (1, (PACKED,)),
    "tp2 pp2 sequence packed": (4, (*SEQUENCE, PP2, PACKED)),
    "dp4 packed": (4, (PACKED,)),
}
TWO_LAYERS = ("model.num_layers=2",)
GENTLE = ("optim.lr=1e-4",)
"""Adam moves a weight by lr whatever the size of its gradient. Layouts add up in different orders,
so where a gradient is nearly 0 even its sign may differ: a small lr keeps that out of the losses.
"""


PAIRS = [
    *product(LAYOUTS, LAYOUTS),
    ("pp2 interleaved", "pp2 interleaved"),
    ("pp2 interleaved", "tp1 pp1 dp1"),
    ("tp1 pp1 dp2", "pp2 interleaved"),
    ("pp2 dp2 overlap", "pp2 dp2 overlap"),
    ("pp2 dp2 overlap", "tp1 pp1 dp1"),
    ("tp2 pp2 dp1", "pp2 dp2 overlap"),
    ("dp2 overlap", "tp2 pp1 dp1"),
    ("packed", "dp4 packed"),
    ("dp4 packed", "tp2 pp2 sequence packed"),
    ("tp2 pp2 sequence packed", "packed"),
    ("packed", "tp1 pp1 dp1"),
]
"""(saver, loader)."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the losses of its own run when that went on."""

    folder: Path
    undisturbed: list[float]


def save(folder: str, *overrides: str) -> list[float]:
    run = toy.make(*overrides)
    run.steps(SAVED_AT)
    write(run, folder)
    return [result.totals.loss for result in run.steps(CONTINUED)]


def write(run: toy.Toy, folder: str) -> None:
    if run.topology.rank == 0:
        Path(folder).mkdir()
    torch.distributed.barrier()
    state.save(run.trainable, Path(folder), run.topology.rank)


def load(folders: dict[str, str], *overrides: str) -> dict[str, list[float]]:
    """Losses by folder. Loads each of `folders`, saves it again where its value says, and goes on;
    what the one before left in moments and weights must not matter."""
    run = toy.make("train.seed=99", *overrides)  # its own weights must not matter
    run.feed = toy.feed(toy.load(None, [*toy.SETTINGS, *overrides])[0], run.topology)
    losses = {}
    for folder, again in folders.items():
        state.load(run.trainable, Path(folder), None)
        write(run, again)
        run.position = SAVED_AT * run.config.train.global_batch_size
        losses[folder] = [result.totals.loss for result in run.steps(CONTINUED)]
    return losses


@cache
def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from its parts by torch alone."""
    with plain_metadata.read_by_torch(), warnings.catch_warnings():
        # It remarks on what it is told: that no other rank reads along.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        reader = FileSystemReader(folder)
        described = reader.read_metadata().state_dict_metadata
        whole = {
            key: torch.full(entry.size, float("nan"), dtype=entry.properties.dtype)
            for key, entry in described.items()
        }
        load_tensors(whole, storage_reader=reader, no_dist=True)
    return whole


def steps_counted(folder: Path) -> list[float]:
    """Updates made, as each group of parameters counts them."""
    common = torch.load(folder / "common.pt", weights_only=True)
    return [group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """A layout's checkpoint, written once."""
    root = tmp_path_factory.mktemp("saved")

    @cache
    def by(name: str) -> Saved:
        ranks, settings = (LAYOUTS | OTHERS)[name]
        folder = root / name.replace(" ", "_")
        (losses, *_) = run_ranks(save, ranks, str(folder), *GENTLE, *settings)
        return Saved(folder, losses)

    return by


@pytest.fixture(scope="session")
def loaded(
    saved: Callable[[str], Saved], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Saved]]:
    """What became of the savers' checkpoints under a layout, all loaded by the same ranks."""
    root = tmp_path_factory.mktemp("loaded")

    @cache
    def by(name: str) -> dict[str, Saved]:
        ranks, settings = (LAYOUTS | OTHERS)[name]
        savers = [saver for saver, loader in PAIRS if loader == name]
        again = {saver: root / f"{saver} under {name}".replace(" ", "_") for saver in savers}
        folders = {str(saved(saver).folder): str(again[saver]) for saver in savers}
        results = run_ranks(load, ranks, folders, *GENTLE, *settings)
        assert all(losses == results[0] for losses in results), "every rank knows the same losses"
        losses = results[0]
        return {s: Saved(again[s], losses[str(saved(s).folder)]) for s in savers}

    return by


@pytest.mark.parametrize(("saver", "loader"), PAIRS)
def test_nothing_is_lost(
    saver: str,
    loader: str,
    saved: Callable[[str], Saved],
    loaded: Callable[[str], dict[str, Saved]],
) -> None:
    before, after = saved(saver), loaded(loader)[saver]
    first, second = read_whole(before.folder), read_whole(after.folder)
    assert second.keys() == first.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key  # NaN, which nobody wrote, is equal to nothing
    assert set(steps_counted(before.folder)) == set(steps_counted(after.folder)) == {SAVED_AT}
    assert after.undisturbed == pytest.approx(before.undisturbed, rel=1e-6)


def test_a_checkpoint_holds_weights_and_moments_of_every_parameter(
    saved: Callable[[str], Saved],
) -> None:
    keys = read_whole(saved("tp1 pp1 dp1").folder).keys()
    parameters = {key for key in keys if not key.startswith("optimizer.")}
    kinds = ("param", "exp_avg", "exp_avg_sq")
    assert "encoder.layers.3.mlp.linear_fc2.weight" in parameters
    assert keys - parameters == {f"optimizer.state.{k}.{p}" for k in kinds for p in parameters}


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        ("tp1 pp2 dp1", "tp1 pp2 dp1"),
        ("tp1 pp2 dp1", "tp1 pp1 dp1"),
        ("tp1 pp1 dp1", "tp1 pp2 dp1"),
        ("tp2 pp1 dp1", "tp1 pp2 dp1"),
        ("tp2 pp2 dp1", "tp1 pp1 dp2"),
        ("tp1 pp1 dp2", "tp2 pp1 dp1"),
    ],
)
def test_losses_go_on_with_two_layers(saver: str, loader: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "step")
    ranks, overrides = LAYOUTS[saver]
    (undisturbed, *_) = run_ranks(save, ranks, folder, *TWO_LAYERS, *overrides)
    ranks, overrides = LAYOUTS[loader]
    again = {folder: str(tmp_path / "again")}
    for losses in run_ranks(load, ranks, again, *TWO_LAYERS, *overrides):
        assert losses[folder] == pytest.approx(undisturbed, rel=1e-5)


def test_bf16_keeps_its_fp32_weights(tmp_path: Path) -> None:
    folder, bf16 = str(tmp_path / "step"), ("train.precision=bf16", *TWO_LAYERS)
    (undisturbed, *_) = run_ranks(save, 2, folder, *bf16, PP2)
    (losses, *_) = run_ranks(load, 2, {folder: str(tmp_path / "again")}, *bf16, PP2)
    assert losses[folder] == undisturbed
