"""launch/finetune.py as a user meets it: it learns, stops, goes on, predicts, and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from geneformer_mcore.checkpoint import weights_reader
from tests.distributed.commands import commands
from tests.distributed.ranks import run_ranks
from tests.end_to_end import forked
from tests.end_to_end.conftest import NUM_CELLS
from tests.end_to_end.forked import outcome, records
from tests.end_to_end.run.test_pretrain import signalled
from tests.support import commands as built

LEARN = ("train.steps=40", "optim.lr=3e-3", "train.validate_every_steps=20")
LORA = ("parallel.tensor=2", "finetune.lora_rank=2")
FILES = ["confusion.png", "predictions.csv", "report.json"]


def pretrain(run: Path, store: Path, steps: int) -> None:
    settings = [f"data.store={store}", f"train.steps={steps}", "train.validate_every_steps=0"]
    forked.check(run, settings)


@pytest.fixture(scope="module")
def base(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pretraining run."""
    run = tmp_path_factory.mktemp("base") / "run"
    pretrain(run, store, 6)
    return run


def tune(
    run: Path,
    base: Path,
    store: Path,
    *more: str,
    ranks: int = 2,
    trouble: forked.Trouble | None = None,
    args: tuple = (),
    code: int = 0,
) -> str:
    """What launch/finetune.py prints; two ranks train LoRA."""
    line = ["--checkpoint", str(base), "--store", str(store), "--label", "cell_type", *LEARN]
    line += [*(LORA if ranks == 2 else ()), *more]
    return forked.check(run, line, ranks, trouble, args, code, command="finetune")


@pytest.fixture(scope="module")
def finished(base: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fine-tuning run of two ranks that has learned."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    printed = tune(run, base, store)
    assert "cell_type: 2 classes, 175 training cells" in printed
    assert printed.count("test: 11 cells, accuracy") == 1
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Its folder again, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_it_learns_an_easy_label(finished: Path, base: Path) -> None:
    assert outcome(finished)["outcome"] == "finished"
    assert sorted(path.name for path in (finished / "test").iterdir()) == FILES
    report = json.loads((finished / "test" / "report.json").read_text())
    assert report["accuracy"] > 0.9 > report["majority_class"]["accuracy"]
    predicted = pd.read_csv(finished / "test" / "predictions.csv")
    assert (predicted["label"] == predicted["predicted"]).mean() == report["accuracy"]
    assert predicted["probability"].between(0.5, 1).all()
    assert (finished / "test" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    labels = json.loads((finished / "labels.json").read_text())
    assert labels["classes"] == ["a", "b"]
    assert sum(sum(each.values()) for each in labels["counts"].values()) == NUM_CELLS
    last = records(finished)[-1]
    assert last["val_accuracy"] > 0.9
    assert last["val_macro_f1"] > 0.9
    assert last["val_loss"] < 0.4
    assert records(finished)[0]["tflops_executed"] is None
    before, after = (
        weights_reader.read_weights(weights_reader.step_of(run)) for run in (base, finished)
    )
    assert all((after[name] == weights).all() for name, weights in before.items())


@pytest.mark.parametrize("more", [("train.steps=20",), ("finetune.frozen_layers=1",)])
def test_without_corrections(base: Path, store: Path, tmp_path: Path, more: tuple) -> None:
    tune(tmp_path / "run", base, store, *more, ranks=1)
    assert records(tmp_path / "run")[-1]["val_accuracy"] > 0.9


def test_a_signal_saves_and_the_same_command_goes_on(
    finished: Path, base: Path, store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tune(run, base, store, trouble=signalled, args=(13, signal.SIGTERM), code=75)
    assert outcome(run)["exit_code"] == 75
    assert not (run / "test").exists()
    assert "continues from" in tune(run, base, store)
    for kept in ("loss", "grad_norm", "val_loss", "val_accuracy"):
        seen = [[each[kept] for each in records(of) if kept in each] for of in (run, finished)]
        assert seen[0] == seen[1]
    was, is_now = (
        weights_reader.read_weights(weights_reader.step_of(of)) for of in (finished, run)
    )
    assert all((is_now[name] == weights).all() for name, weights in was.items())
    predicted = [(of / "test" / "predictions.csv").read_text() for of in (finished, run)]
    assert predicted[0] == predicted[1]


def test_a_finished_run_predicts_its_test_cells_again(copy: Path, base: Path, store: Path) -> None:
    shutil.rmtree(copy / "test")
    assert "the run is finished" in tune(copy, base, store)
    assert sorted(path.name for path in (copy / "test").iterdir()) == FILES


def interrupted(_rank: int, number: signal.Signals) -> None:
    """Trouble: the signal comes while test cells are being predicted."""
    forked.before(
        "geneformer_mcore.inference.encoder:per_cell", 1, partial(os.kill, os.getpid(), number)
    )


def test_a_signal_during_predictions_is_not_lost(copy: Path, base: Path, store: Path) -> None:
    shutil.rmtree(copy / "test")
    tune(copy, base, store, trouble=interrupted, args=(signal.SIGUSR1,), code=75)
    assert "signal SIGUSR1 after the last step" in outcome(copy)["reason"]
    assert not (copy / "test").exists()
    tune(copy, base, store)
    assert sorted(path.name for path in (copy / "test").iterdir()) == FILES


def test_the_model_it_began_with_may_have_gone_on(
    copy: Path, base: Path, store: Path, tmp_path: Path
) -> None:
    longer = Path(shutil.copytree(base, tmp_path / "base"))
    pretrain(longer, store, 8)
    assert "the run is finished" in tune(copy, longer, store)


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
    copy: Path, base: Path, store: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    other = tmp_path / "other"
    if "OTHER" in change:
        pretrain(other, store, 2)
    changed = [each.replace("OTHER", str(other)) for each in change]
    assert message in tune(copy, base, store, *changed, code=2)
    assert outcome(copy)["exit_code"] == 2


def predict(run: Path, source: Path, output: Path, *more: str, ranks: int = 1) -> str:
    line = ["--checkpoint", str(run), "--predict", str(source), "--output", str(output), *more]
    ended = [each[0] for each in run_ranks(commands, ranks, "finetune", [line])]
    assert [each.code for each in ended] == [0] * ranks, ended
    return ended[0].out


def test_it_predicts_new_cells_on_any_number_of_ranks(
    finished: Path, h5ad: Path, store: Path, tmp_path: Path
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
    tested = pd.read_csv(finished / "test" / "predictions.csv", index_col="cell_id")
    assert (one.obs.loc[tested.index, "predicted_cell_type"] == tested["predicted"]).all()
    predict(finished, h5ad, tmp_path / "two.h5ad", "parallel.tensor=2", ranks=2)
    predict(finished, store, tmp_path / "stored.h5ad")
    for name in ("two", "stored"):
        again = anndata.read_h5ad(tmp_path / f"{name}.h5ad")[one.obs_names]
        found = again.obsm["predicted_cell_type_probabilities"]
        np.testing.assert_allclose(found, chances, rtol=0, atol=1e-6)


def test_its_encoder_embeds_with_the_corrections(
    finished: Path, base: Path, h5ad: Path, tmp_path: Path
) -> None:
    found = {}
    for name, run in {"tuned": finished, "base": base}.items():
        path = tmp_path / f"{name}.npy"
        line = ["--checkpoint", str(run), "--input", str(h5ad), "--output", str(path)]
        ((ended,),) = run_ranks(commands, 1, "embed", [line])
        assert ended.code == 0, ended.err
        found[name] = np.load(path)
    assert np.abs(found["tuned"] - found["base"]).max() > 0.01
    kinds = anndata.read_h5ad(h5ad).obs["cell_type"].to_numpy()
    of_tuned, of_base = (
        np.linalg.norm(found[name][kinds == "a"].mean(0) - found[name][kinds == "b"].mean(0))
        for name in ("tuned", "base")
    )
    assert of_tuned > 2 * of_base


def test_mistakes_get_one_message_and_exit_code_2(
    finished: Path, base: Path, h5ad: Path, store: Path, tmp_path: Path
) -> None:
    first = ["--checkpoint", str(base)]
    good = [*first, "--store", str(store), "--label", "cell_type", f"run.dir={tmp_path / 'run'}"]
    asked = ["--predict", str(h5ad), "--output", str(tmp_path / "b.h5ad")]
    cases = {
        "fine-tuning needs --label": [*first, "--store", str(store)],
        "no label column 'kind'; label columns: cell_type": [*good, "--label", "kind"],
        "no folder": ["--checkpoint", "nowhere", *good[2:]],
        "not a finished store": [*good, "--store", str(tmp_path / "nothing")],
        "model.num_layers: 2 -> 3": [*good, "model.num_layers=3"],
        "data.seq_length: 100 -> 64": [*good, "data.seq_length=64"],
        "must be within 0..2": [*good, "finetune.frozen_layers=3"],
        "set one of them to 0": [*good, "finetune.frozen_layers=1", "finetune.lora_rank=2"],
        "without pipeline parallel": [*good, "parallel.pipeline=2"],
        "no gradient behind": [*good, "finetune.lora_rank=2", "parallel.recompute=full"],
        "corrections are not corrected again": ["--checkpoint", str(finished), *good[2:]],
        "is of a pretrained model": [*first, *asked],
        "go together": ["--checkpoint", str(finished), *asked[:2]],
        "another file than the input": [
            *("--checkpoint", str(finished), "--predict", str(h5ad), "--output", str(h5ad))
        ],
        "must end in .h5ad": ["--checkpoint", str(finished), *asked[:3], "b.csv"],
        "Did you mean `finetune.lora_rank`": [*good, "finetune.lora_ranks=2"],
    }
    (found,) = run_ranks(commands, 1, "finetune", list(cases.values()))
    for (text, line), ended in zip(cases.items(), found, strict=True):
        assert ended.code == 2, (line, ended)
        assert text in ended.err, (text, ended.err)
        assert ended.err.count("error: ") == 1, ended.err
        assert "Traceback" not in ended.err
    assert not (tmp_path / "b.h5ad").exists()


def test_a_store_of_other_genes_is_refused(base: Path, h5ad: Path, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(h5ad)[:, :250].copy()
    cells.write_h5ad(tmp_path / "fewer.h5ad")
    store = tmp_path / "store"
    built.check("data_prep/build_store.py", "--out", store, tmp_path / "fewer.h5ad")
    printed = tune(tmp_path / "run", base, store, ranks=1, code=2)
    assert "token ids mean other genes" in printed


def test_pretraining_leaves_its_settings_alone(store: Path, tmp_path: Path) -> None:
    asked = [f"data.store={store}", "finetune.lora_rank=2"]
    assert "finetune.* is for launch/finetune.py" in forked.check(tmp_path / "run", asked, code=2)
