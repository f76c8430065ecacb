"""launch/finetune.py as a user meets it: it learns, stops, goes on, predicts, and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from geneformer_mcore.checkpoint import weights_reader
from tests.distributed.commands import assert_refused, succeed
from tests.end_to_end.conftest import NUM_CELLS
from tests.end_to_end.forked import Run, Start, before
from tests.end_to_end.run.test_pretrain import signalled
from tests.support import commands

LEARN = ("train.steps=40", "optim.lr=3e-3", "train.validate_every_steps=20")
LORA = ("parallel.tensor=2", "finetune.lora_rank=2")
WITHOUT_VALIDATION = "train.validate_every_steps=0"
FILES = ["confusion.png", "predictions.csv", "report.json"]


@pytest.fixture(scope="module")
def base(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small pretraining run."""
    run = Run(tmp_path_factory.mktemp("base") / "run", settings)
    run.check("train.steps=6", WITHOUT_VALIDATION)
    return run


@dataclass(frozen=True)
class Tuning(Run):
    """A run of launch/finetune.py; two ranks train LoRA."""

    def start(self, *more: str, ranks: int = 2, **others: Any) -> Start:
        lora = LORA if ranks == 2 else ()
        return super().start(*lora, *more, ranks=ranks, command="finetune", **others)

    def check(self, *more: str, ranks: int = 2, **others: Any) -> str:
        return super().check(*more, ranks=ranks, **others)

    def test_files(self) -> list[str]:
        """What is in its folder `test`."""
        return sorted(path.name for path in (self.folder / "test").iterdir())

    def weights(self) -> dict[str, torch.Tensor]:
        return weights_reader.read_weights(weights_reader.step_of(self.folder))


@pytest.fixture(scope="module")
def finished(base: Run, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuning:
    """A fine-tuning run of two ranks that has learned."""
    given = ("--checkpoint", str(base.folder), "--store", str(store), "--label", "cell_type")
    run = Tuning(tmp_path_factory.mktemp("tuned") / "run", (*given, *LEARN))
    printed = run.check()
    assert "cell_type: 2 classes, 175 training cells" in printed
    assert printed.count("test: 11 cells, accuracy") == 1
    return run


@pytest.fixture
def tuning(finished: Tuning, tmp_path: Path) -> Tuning:
    """One that has not begun."""
    return replace(finished, folder=tmp_path / "run")


@pytest.fixture
def copy(finished: Tuning, tuning: Tuning) -> Tuning:
    """The finished one, in another folder to go on with."""
    shutil.copytree(finished.folder, tuning.folder)
    return tuning


def assert_same_weights(run: Run, found: dict[str, torch.Tensor]) -> None:
    """Of the weights of `run` none is another one in `found`."""
    before = weights_reader.read_weights(weights_reader.step_of(run.folder))
    assert all((found[name] == weights).all() for name, weights in before.items())


def test_it_learns_an_easy_label(finished: Tuning, base: Run) -> None:
    assert finished.outcome()["outcome"] == "finished"
    assert finished.test_files() == FILES
    test = finished.folder / "test"
    report = json.loads((test / "report.json").read_text())
    assert report["accuracy"] > 0.9 > report["majority_class"]["accuracy"]
    predicted = pd.read_csv(test / "predictions.csv")
    assert (predicted["label"] == predicted["predicted"]).mean() == report["accuracy"]
    assert predicted["probability"].between(0.5, 1).all()
    assert (test / "confusion.png").read_bytes().startswith(b"\x89PNG")
    labels = json.loads((finished.folder / "labels.json").read_text())
    assert labels["classes"] == ["a", "b"]
    assert sum(sum(each.values()) for each in labels["counts"].values()) == NUM_CELLS
    first, *_, last = finished.records()
    assert last["val_accuracy"] > 0.9
    assert last["val_macro_f1"] > 0.9
    assert last["val_loss"] < 0.4
    assert first["tflops_executed"] is None
    assert_same_weights(base, finished.weights())


@pytest.mark.parametrize("more", ["train.steps=20", "finetune.frozen_layers=1"])
def test_without_corrections(tuning: Tuning, more: str) -> None:
    tuning.check(more, ranks=1)
    assert tuning.records()[-1]["val_accuracy"] > 0.9


def test_a_signal_saves_and_the_same_command_goes_on(finished: Tuning, tuning: Tuning) -> None:
    tuning.check(trouble=(signalled, 13, signal.SIGTERM), code=75)
    assert tuning.outcome()["exit_code"] == 75
    assert not (tuning.folder / "test").exists()
    assert "continues from" in tuning.check()
    for kept in ("loss", "grad_norm", "val_loss", "val_accuracy"):
        found = [[each[kept] for each in run.records(kept)] for run in (tuning, finished)]
        assert found[0] == found[1]
    assert_same_weights(finished, tuning.weights())
    one, other = (run.folder / "test" / "predictions.csv" for run in (tuning, finished))
    assert one.read_text() == other.read_text()


def test_a_finished_run_predicts_its_test_cells_again(copy: Tuning) -> None:
    shutil.rmtree(copy.folder / "test")
    assert "the run is finished" in copy.check()
    assert copy.test_files() == FILES


def interrupted(_rank: int, number: signal.Signals) -> None:
    """Trouble: the signal comes while test cells are being predicted."""
    before("geneformer_mcore.inference.encoder:per_cell", 1, partial(os.kill, os.getpid(), number))


def test_a_signal_during_predictions_is_not_lost(copy: Tuning) -> None:
    shutil.rmtree(copy.folder / "test")
    copy.check(trouble=(interrupted, signal.SIGUSR1), code=75)
    assert "signal SIGUSR1; the last step is done" in copy.outcome()["reason"]
    assert not (copy.folder / "test").exists()
    copy.check()
    assert copy.test_files() == FILES


def test_the_model_it_began_with_may_have_gone_on(copy: Tuning, base: Run, tmp_path: Path) -> None:
    longer = base.at(Path(shutil.copytree(base.folder, tmp_path / "base")))
    longer.check("train.steps=8", WITHOUT_VALIDATION)
    assert "the run is finished" in copy.check("--checkpoint", str(longer.folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--label", "other"], "no label column 'other'; label columns: cell_type"),
        (["optim.lr=1e-4"], "optim.lr: 0.003 -> 0.0001"),
        (["finetune.lora_rank=3"], "finetune.lora_rank: 2 -> 3"),
        (["--checkpoint", "OTHER"], "pretrained: step_0000000006, sha256"),
    ],
)
def test_another_model_or_label_does_not_go_on(
    copy: Tuning, base: Run, tmp_path: Path, change: list[str], message: str
) -> None:
    other = base.at(tmp_path / "other")
    if "OTHER" in change:
        other.check("train.steps=2", WITHOUT_VALIDATION)
    changed = [each.replace("OTHER", str(other.folder)) for each in change]
    assert message in copy.check(*changed, code=2)
    assert copy.outcome()["exit_code"] == 2


def predict(run: Run, source: Path, output: Path, *more: str, ranks: int = 1) -> str:
    line = ["--checkpoint", str(run.folder), "--predict", str(source), "--output", str(output)]
    (ended,) = succeed([["finetune", *line, *more]], ranks)
    return ended.out


def test_it_predicts_new_cells_on_any_number_of_ranks(
    finished: Run, h5ad: Path, store: Path, tmp_path: Path
) -> None:
    printed = predict(finished, h5ad, tmp_path / "one.h5ad")
    assert f"{NUM_CELLS} cells, 0 without a known gene" in printed
    one = anndata.read_h5ad(tmp_path / "one.h5ad")
    given = anndata.read_h5ad(h5ad)
    assert (one.obs_names == given.obs_names).all()
    assert (one.X != given.X).nnz == 0
    right = one.obs["predicted_cell_type"].astype(str) == given.obs["cell_type"].astype(str)
    assert right.mean() > 0.9
    chances = one.obsm["predicted_cell_type_probabilities"]
    np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(one.obs["predicted_cell_type_probability"], chances.max(axis=1))
    assert one.uns["geneformer_predicted_cell_type"]["classes"].tolist() == ["a", "b"]
    # The test cells, one by one, as the run itself has predicted them.
    tested = pd.read_csv(finished.folder / "test" / "predictions.csv", index_col="cell_id")
    assert (one.obs.loc[tested.index, "predicted_cell_type"] == tested["predicted"]).all()
    predict(finished, h5ad, tmp_path / "two.h5ad", "parallel.tensor=2", ranks=2)
    predict(finished, store, tmp_path / "stored.h5ad")
    for name in ("two", "stored"):
        again = anndata.read_h5ad(tmp_path / f"{name}.h5ad")[one.obs_names]
        found = again.obsm["predicted_cell_type_probabilities"]
        np.testing.assert_allclose(found, chances, rtol=0, atol=1e-6)


def test_its_encoder_embeds_with_the_corrections(
    finished: Run, base: Run, h5ad: Path, tmp_path: Path
) -> None:
    paths = {run: tmp_path / f"{name}.npy" for name, run in (("tuned", finished), ("base", base))}
    words = (
        ["embed", "--checkpoint", run.folder, "--input", h5ad, "--output", path]
        for run, path in paths.items()
    )
    succeed([list(map(str, line)) for line in words])
    tuned, plain = map(np.load, paths.values())
    assert np.abs(tuned - plain).max() > 0.01
    is_a = anndata.read_h5ad(h5ad).obs["cell_type"].to_numpy() == "a"
    of_tuned, of_plain = (
        np.linalg.norm(found[is_a].mean(0) - found[~is_a].mean(0)) for found in (tuned, plain)
    )
    assert of_tuned > 2 * of_plain


def test_mistakes_get_one_message_and_exit_code_2(
    finished: Run, base: Run, h5ad: Path, store: Path, tmp_path: Path
) -> None:
    first, tuned = (["--checkpoint", str(run.folder)] for run in (base, finished))
    rest = ["--store", str(store), "--label", "cell_type", f"run.dir={tmp_path / 'run'}"]
    good = [*first, *rest]
    asked = ["--predict", str(h5ad), "--output", str(tmp_path / "b.h5ad")]
    cases = {
        "fine-tuning needs --label": [*first, "--store", str(store)],
        "no label column 'kind'; label columns: cell_type": [*good, "--label", "kind"],
        "no folder": ["--checkpoint", "nowhere", *rest],
        "not a finished store": [*good, "--store", str(tmp_path / "nothing")],
        "model.num_layers: 2 -> 3": [*good, "model.num_layers=3"],
        "data.seq_length: 100 -> 64": [*good, "data.seq_length=64"],
        "must be within 0..2": [*good, "finetune.frozen_layers=3"],
        "set one of them to 0": [*good, "finetune.frozen_layers=1", "finetune.lora_rank=2"],
        "without pipeline parallel": [*good, "parallel.pipeline=2"],
        "no gradient behind": [*good, "finetune.lora_rank=2", "parallel.recompute=full"],
        "corrections are not corrected again": [*tuned, *rest],
        "is of a pretrained model": [*first, *asked],
        "go together": [*tuned, *asked[:2]],
        "another file than the input": [*tuned, *asked[:3], str(h5ad)],
        "must end in .h5ad": [*tuned, *asked[:3], "b.csv"],
        "Did you mean `finetune.lora_rank`": [*good, "finetune.lora_ranks=2"],
    }
    assert_refused("finetune", cases)
    assert not (tmp_path / "b.h5ad").exists()


def test_a_store_of_other_genes_is_refused(tuning: Tuning, h5ad: Path, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(h5ad)[:, :250].copy()
    cells.write_h5ad(tmp_path / "fewer.h5ad")
    store = tmp_path / "store"
    commands.check("data_prep/build_store.py", "--out", store, tmp_path / "fewer.h5ad")
    printed = tuning.check("--store", str(store), ranks=1, code=2)
    assert "token ids mean other genes" in printed


def test_pretraining_leaves_its_settings_alone(run: Run) -> None:
    assert "finetune.* is for launch/finetune.py" in run.check("finetune.lora_rank=2", code=2)
