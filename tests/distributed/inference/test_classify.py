"""launch/classify.py on a small trained run: what it writes, what it says, what it refuses."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, f1_score

from launch import classify as launched
from tests.distributed.commands import LIMIT_S, Ended, assert_refused, commands, succeed
from tests.distributed.inference.trained import EMPTY, NUM_CELLS, ONE_GENE, UNKNOWN, Trained, words
from tests.distributed.ranks import run_ranks

RARE, NO_LABEL = (0, 1, 2), 6
"""Cells of a label of their own, and one without any."""
FEATURES = ["PCA(10) of log counts", "untrained", "mine", "X_other"]
TREES = 10
"""Of a forest here; tests/unit/inference/test_celltypes.py compares scikit-learn's own."""
PICTURES = ["confusion.png", "scores.png", "umap.png"]
FOLDS, DONORS = "stratified 5-fold", "leave one donor out"


@pytest.fixture(scope="module")
def labelled(model: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small trained run, and its cells with labels that counts can tell, and donors."""
    cells = anndata.read_h5ad(model.h5ad)
    counts = cells.X.toarray()
    kinds = np.array(["a", "b"])[np.arange(NUM_CELLS) % 2].astype(object)
    marked = (kinds == "a") & ~np.isin(np.arange(NUM_CELLS), [ONE_GENE, UNKNOWN, EMPTY])
    counts[marked, :20] += 20
    kinds[list(RARE)], kinds[NO_LABEL] = "rare", None
    cells.X = type(cells.X)(counts)
    cells.obs["cell_type"] = kinds
    cells.obs["donor"] = np.array(["d1", "d2", "d3"])[np.arange(NUM_CELLS) % 3]
    cells.obs["one"] = "same"
    h5ad = tmp_path_factory.mktemp("labelled") / "cells.h5ad"
    cells.write_h5ad(h5ad)
    return replace(model, h5ad=h5ad)


def classified(lines: list[list[str]]) -> list[Ended]:
    """launch/classify.py with each of `lines`, and small forests on one core."""
    from geneformer_mcore.celltypes import cross_validation

    def small(**settings: Any) -> RandomForestClassifier:
        return RandomForestClassifier(**settings | {"n_estimators": TREES, "n_jobs": None})

    cross_validation.RandomForestClassifier = small  # type: ignore[misc]
    return commands("classify", lines)


def line(model: Trained, out: Path, *more: str) -> list[str]:
    start = (f"--checkpoint mine={model.run} --input", model.h5ad, "--out", out)
    return words(*start, "--resamples 50", *more)


@pytest.fixture(scope="module")
def folder(labelled: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that the command makes: with pictures; again, without them; and with another seed.
    Its file "printed" is what it prints first."""
    out, more = tmp_path_factory.mktemp("result"), "--untrained --obsm X_other"
    lines = [
        line(labelled, out / "types", more),
        line(labelled, out / "again", more, "--no-plots"),
        line(labelled, out / "other", more, "--no-plots --seed 1 --donor none"),
    ]
    (out / "printed").write_text(succeed(lines, work=classified)[0].out)
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_folder_holds_figures_predictions_and_pictures(folder: Path) -> None:
    found, there = results(folder / "types"), folder / "types"
    assert [each["name"] for each in found["schemes"]] == [FOLDS, DONORS]
    first = found["schemes"][0]
    assert first["labels"] == ["a", "b"]
    assert first["labels_left_out"] == {"rare": len(RARE)}
    assert first["cells"] == NUM_CELLS - len({*RARE, NO_LABEL, UNKNOWN, EMPTY})
    assert found["left_out"] == {"no_label": 1, "no_known_gene": 2}
    assert found["models"]["untrained"]["random_weights"]
    assert found["versions"]["torch"]
    assert all((there / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    files = [*PICTURES, "predictions.csv", "results.json", "table.md"]
    assert sorted(path.name for path in there.iterdir()) == sorted(files)
    printed = (folder / "printed").read_text()
    for text, times in {
        "labels left out as too rare: rare (3)": 1,
        "whether mine was trained on these cells could not be checked": 1,
        "--training-store": 1,
        "best of 3 on PCA: ": 2,
        "; best of 9 others: ": 2,
        "(not corrected for choosing the best of several)": 1,
        "against that PCA: no interval, so no verdict": 1,
        "3 folds; intervals need 5 donors": 1,
    }.items():
        assert printed.count(text) == times, text
    for scheme in found["schemes"]:
        features = [row["features"] for row in scheme["rows"]]
        assert features == [each for each in FEATURES for _ in range(3)]
        f1 = [row["macro_f1"]["value"] for row in scheme["rows"]]
        gain = scheme["best"]["macro_f1_over_best_pca"]
        assert gain["value"] == pytest.approx(max(f1[3:]) - max(f1[:3]))
        assert ("low" in gain) == (scheme["name"] == FOLDS)
    constant = next(row for row in first["rows"] if row["features"] == "X_other")
    assert first["rows"][0]["macro_f1"]["value"] > 0.8, "counts can tell the labels"
    assert constant["macro_f1"]["value"] < 0.6, "X_other is the same for every cell"
    assert constant["macro_f1_over_baseline"]["high"] < 0


def test_the_table_says_what_scikit_learn_says_of_the_predictions(folder: Path) -> None:
    found, printed = results(folder / "types"), (folder / "printed").read_text()
    with (folder / "types" / "predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    for scheme in found["schemes"]:
        for row in scheme["rows"]:
            key = (scheme["name"], row["features"], row["classifier"])
            mine = [p for p in predictions if (p["scheme"], p["features"], p["classifier"]) == key]
            truth, guess = ([p[name] for p in mine] for name in ("label", "predicted"))
            assert len({p["cell"] for p in mine}) == len(mine) == scheme["cells"]
            assert row["macro_f1"]["value"] == f1_score(truth, guess, average="macro")
            assert row["accuracy"]["value"] == accuracy_score(truth, guess)
            table = printed[printed.index(f"\n{key[0]}:") :].split("\n\n")[1].splitlines()
            shown = [text for text in table if re.split(r" {2,}", text.strip())[:2] == [*key[1:]]]
            assert f"{row['macro_f1']['value']:.3f}" in shown[0]
    donors = {p["cell"]: p["fold"] for p in predictions if p["scheme"] == DONORS}
    assert set(donors.values()) == {"d1", "d2", "d3"}
    assert all(fold == f"d{int(cell[4:]) % 3 + 1}" for cell, fold in donors.items())


def test_it_repeats_by_seed_and_random_weights_are_not_the_models(folder: Path) -> None:
    first, again, other = (results(folder / n)["schemes"] for n in ("types", "again", "other"))
    assert first == again
    assert first[0] != other[0]
    assert len(other) == 1
    texts = {(folder / name / "predictions.csv").read_text() for name in ("types", "again")}
    assert len(texts) == 1


def test_wrong_input(labelled: Trained, tmp_path: Path) -> None:
    cells, out = anndata.read_h5ad(labelled.h5ad), tmp_path / "out"
    cells.obs["n"] = [f"n{number}" for number in range(NUM_CELLS)]
    cells.write_h5ad(tmp_path / "named.h5ad")
    for name, value in {"negative": -1.0, "half": 0.5}.items():
        cells.X.data[0] = value
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    (tmp_path / "there").mkdir()
    more = {
        "no column 'kind'": "--label kind",
        "there are 1 (same)": "--label one",
        "there are 0 (none)": f"--label n --input {tmp_path}/named.h5ad",
        "names 1 (same)": "--donor one",
        "holds -1: negative": f"--input {tmp_path}/negative.h5ad",
        "holds 0.5: not a whole number": f"--input {tmp_path}/half.h5ad",
        "no matrix in layers/x": "--counts-layer x",
        "obsm has no array 'X_no'": "--obsm X_no",
        "two checkpoints are called mine": f"--checkpoint mine={labelled.run}",
        "no folder": "--checkpoint nowhere",
        "no such file": f"--input {tmp_path}/no.h5ad",
        "exists already": f"--out {tmp_path}/there",
        "--resamples must be 0": "--resamples -1",
        "from 0 (the embedding) to 4": "--layer 9",
    }
    good = line(labelled, out, "--no-plots")
    cases = {text: [*good, *each.split()] for text, each in more.items()}
    cases["nothing to judge"] = good[2:]
    cases["from h5ad files only"] = words(*good[2:], "--obsm X --input", tmp_path / "there")
    assert_refused("classify", cases)
    assert not out.exists()


def with_broken_pictures(line: list[str]) -> str:
    from geneformer_mcore.celltypes import plots

    def broken(*_: object) -> None:
        raise RuntimeError("no map today")

    plots._umaps = broken  # type: ignore[assignment]
    try:
        classified([line])
    except RuntimeError as error:
        return str(error)
    return ""


def test_figures_survive_a_picture_that_fails(labelled: Trained, tmp_path: Path) -> None:
    out, more = tmp_path / "out", "--obsm X_other --donor none --resamples 0 --out"
    line = words("--input", labelled.h5ad, more, out)
    assert run_ranks(with_broken_pictures, 1, line, timeout_s=LIMIT_S) == ["no map today"]
    assert not out.exists()
    out = tmp_path / ".out.kept"  # until the same command is started again
    assert results(out)["schemes"][0]["rows"]
    table = (out / "table.md").read_text()
    assert "no interval, so no verdict" in table
    assert "(-)" not in table
    left = sorted(path.name for path in out.iterdir())
    assert left == ["confusion.png", "predictions.csv", "results.json", "scores.png", "table.md"]


def test_a_folder_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "lr=1e-3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = ["runs/lr=1e-3", "small=runs/lr=1e-3", "10m=runs/10m", "runs/plain"]
    named = {name: str(path) for name, path in launched._named(given).items()}
    folders = {"lr=1e-3": "runs/lr=1e-3", "small": "runs/lr=1e-3", "10m": "runs/10m"}
    assert named == folders | {"plain": "runs/plain"}
