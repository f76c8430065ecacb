"""The sizes of a run: estimated before anything is built, refused with both numbers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from geneformer_mcore.config import load, plan
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.model.flops import ModelShape, num_parameters
from geneformer_mcore.training import sizes
from geneformer_mcore.training.datasets import RunCells

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
GB = 10**9
CPU = torch.device("cpu")


def run_cells(span_cells: int = 1024, window_spans: int = 32, cells: int = 10**6) -> RunCells:
    """Cells of a run, as far as sizes are asked for."""
    vocabulary = cast(Any, SimpleNamespace(size=25_429))
    return RunCells(
        name="store",
        vocabulary=vocabulary,
        content_hash="",
        rows={"train": (0, cells)},
        seq_length=2048,
        source=cast(Any, object()),
        span_cells=span_cells,
        window_spans=window_spans,
        names=lambda rows: [str(row) for row in rows],
        mean_tokens=1500.0,
    )


def checked(*settings: str, ranks: int = 1, peak: float = 1e15, **cells: int) -> None:
    config, _ = load(CONFIGS / "geneformer_10m.yaml", ["data.packing=false", *settings])
    sizes.check(config, plan(config, ranks), run_cells(**cells), CPU, peak)


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GB, one rank to each."""
    monkeypatch.setattr(sizes, "memory_bytes", lambda: 64 * GB)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("largest", "settings", "cells"),
    [
        ("weights", "model.hidden_size=32768 model.ffn_hidden_size=32768", {}),
        ("activations", "train.micro_batch_size=2048", {}),
        ("prepared", "train.global_batch_size=1048576 data.prefetch_steps=100", {}),
        ("cells to shuffle", "", {"span_cells": 1_000_000, "cells": 10**9}),
        ("cells to shuffle", "", {"window_spans": 1_000_000, "cells": 10**9}),
    ],
)
def test_what_no_memory_holds_is_refused_with_the_estimate(
    largest: str, settings: str, cells: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match=r"there are 64\.0 GB in this machine") as caught:
        checked(*settings.split(), **cells)
    parts = re.findall(r"([\d,.]+) GB of ([a-z ]+)", str(caught.value))
    assert len(parts) == 4
    size, name = max((float(size.replace(",", "")), name) for size, name in parts)
    assert name.startswith(largest)
    assert size > 30


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    large = ("model.hidden_size=8192", "model.ffn_hidden_size=8192", "train.micro_batch_size=1")
    checked(*large)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 rank\(s\)"):
        checked(*large)


def test_a_step_must_be_possible_within_its_time() -> None:
    checked(peak=1e12)
    with pytest.raises(ConfigError, match=r"parallel\.timeout_s \(600 s\), and takes about"):
        checked("train.global_batch_size=1048576", "data.prefetch_steps=0", peak=1e11)
    checked("train.global_batch_size=1048576", "data.prefetch_steps=0", peak=1e15)


@pytest.mark.parametrize("name", ["geneformer_10m", "geneformer_106m"])
def test_the_cards_are_held_by_one_gpu(name: str) -> None:
    config, _ = load(CONFIGS / f"{name}.yaml")
    cells = run_cells()
    found = sizes.estimate(config, plan(config, 64), cells)
    weights = num_parameters(ModelShape.of(config.model, cells.vocabulary.size), 2048)
    assert 6 * weights <= found.model <= 18 * weights
    assert found.model + found.activations < 80 * GB
    assert found.window == 64 * 1024 * (2 * 2048 + 24)


def test_what_is_frozen_takes_no_gradients() -> None:
    base, _ = load(CONFIGS / "geneformer_10m.yaml", ["data.packing=false"])
    tuned, _ = load(
        CONFIGS / "geneformer_10m.yaml", ["data.packing=false", "finetune.frozen_layers=6"]
    )
    whole, frozen = (sizes.estimate(each, plan(each, 1), run_cells()) for each in (base, tuned))
    assert whole.model == 18 / 2 * frozen.model
    assert whole.flops == 3 * frozen.flops
    assert frozen.activations == 0
