"""What an earlier version left behind opens, checks, resumes, embeds and evaluates as before.

tests/earlier/make.py made the archives, by the commands of the commit in their names. On the
processor that they were made on, results are equal to the bit; elsewhere sums may round otherwise.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from tests.earlier.make import FIRST, LAST, SETTINGS, processor
from tests.support import commands

ARCHIVES = sorted((Path(__file__).parents[2] / "earlier").glob("*.tar.xz"))
MEASURED = {"loss", "grad_norm", "lr", "cells_seen", "tokens_seen", "val_loss"}
"""Of metrics.jsonl: the rest are times and rates."""


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.split(".")[0])
def earlier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one version left behind."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(request.param) as packed:
        packed.extractall(folder, filter="data")
    return folder


def assert_same(now: Any, before: Any, folder: Path) -> None:
    """Bitwise on the processor that `folder` was made on, else to six digits."""
    made_on = json.loads((folder / "expected" / "machine.json").read_text())["processor"]
    if made_on == processor():
        np.testing.assert_array_equal(now, before)
    np.testing.assert_allclose(now, before, rtol=1e-5, atol=1e-6)


def measured(path: Path) -> Iterator[tuple[tuple[int, str], float]]:
    """((step, name), value) of every number that is no time and no rate."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        yield from (((record["step"], key), record[key]) for key in MEASURED & record.keys())


def test_store_is_sound(earlier: Path) -> None:
    assert "90" in commands.check("data_prep/check_store.py", "store", cwd=earlier)


def test_run_resumes(earlier: Path) -> None:
    words = ("data.store=store", "run.dir=run", LAST, "checkpoint.save_every_steps=3", *SETTINGS)
    commands.check("launch/pretrain.py", *words, cwd=earlier)
    now = dict(measured(earlier / "run" / "metrics.jsonl"))
    before = dict(measured(earlier / "expected" / "metrics.jsonl"))
    assert now.keys() == before.keys()
    assert {step for step, _ in now} == {1, 2, 3, 4, 5, 6}
    assert_same([now[key] for key in before], list(before.values()), earlier)


@pytest.mark.parametrize("model", ["run", "converted"])
def test_model_embeds(earlier: Path, model: str) -> None:
    step = {"run": "run/checkpoints/step_0000000003"}.get(model, model)
    words = ("--checkpoint", step, "--input", "cells.h5ad", "--output", f"{model}.npy")
    commands.check("launch/embed.py", *words, cwd=earlier)
    before = np.load(earlier / "expected" / f"{model}.npy")
    assert_same(np.load(earlier / f"{model}.npy"), before, earlier)


def test_model_is_exported_again(earlier: Path) -> None:
    words = ("to-hf", "run/checkpoints/step_0000000003", "--out", "again")
    commands.check("launch/convert.py", *words, cwd=earlier)
    name = "model.safetensors"
    assert (earlier / "again" / name).read_bytes() == (earlier / "hf" / name).read_bytes()


def test_run_evaluates(earlier: Path) -> None:
    words = ("--checkpoint", "run/checkpoints/step_0000000003", "--store", "store")
    words += ("--split", "validation", "--json", "now.json")
    commands.check("launch/evaluate.py", *words, cwd=earlier)
    now, before = (
        json.loads((earlier / name).read_text())
        for name in ("now.json", "expected/evaluation.json")
    )
    assert before.keys() <= now.keys()
    numbers = [key for key, value in before.items() if isinstance(value, int | float)]
    assert len(numbers) > 5
    assert_same([now[key] for key in numbers], [before[key] for key in numbers], earlier)


def test_fine_tuned_run_predicts_and_is_finished(earlier: Path) -> None:
    words = ("--checkpoint", "tuned", "--predict", "cells.h5ad", "--output", "predicted.h5ad")
    commands.check("launch/finetune.py", *words, cwd=earlier)
    predicted = anndata.read_h5ad(earlier / "predicted.h5ad")
    assert set(predicted.obs["cell_type"]) == {"a", "b"}
    words = ("--checkpoint", "run", "--label", "cell_type", "--store", "store", "run.dir=tuned")
    assert "finished" in commands.check(
        "launch/finetune.py", *words, FIRST, *SETTINGS[4:], cwd=earlier
    )
