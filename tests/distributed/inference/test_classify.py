"""launch/classify.py on a small trained run: what it writes, what it says, what it refuses."""

from __future__ import annotations

import csv
import json
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
    """A command line."""
    start = (f"--checkpoint mine={model.run} --input", model.h5ad, "--out", out)
    return words(*start, "--resamples 50", *more)


@pytest.fixture(scope="module")
def folders(labelled: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with folders that the command makes, and what it prints first: with pictures;
    again, without them; and with another seed."""
    out, more = tmp_path_factory.mktemp("result"), "--untrained --obsm X_other"
    lines = [
        line(labelled, out / "types", more),
        line(labelled, out / "again", more, "--no-plots"),
        line(labelled, out / "other", more, "--no-plots --seed 1 --donor none"),
    ]
    return out, succeed(lines, work=classified)[0].out


@pytest.fixture(scope="module")
def result(folders: tuple[Path, str]) -> tuple[Path, dict[str, Any], str]:
    """The folder of the first, its results, and what it prints."""
    folder = folders[0] / "types"
    return folder, json.loads((folder / "results.json").read_text()), folders[1]


def test_the_folder_holds_figures_predictions_and_pictures(
    result: tuple[Path, dict[str, Any], str],
) -> None:
    folder, found, printed = result
    names = [scheme["name"] for scheme in found["schemes"]]
    assert names == ["stratified 5-fold", "leave one donor out"]
    for scheme in found["schemes"]:
        features = [row["features"] for row in scheme["rows"]]
        assert features == [each for each in FEATURES for _ in range(3)]
    first = found["schemes"][0]
    assert first["labels"] == ["a", "b"]
    assert first["labels_left_out"] == {"rare": len(RARE)}
    assert first["cells"] == NUM_CELLS - len({*RARE, NO_LABEL, UNKNOWN, EMPTY})
    assert found["left_out"] == {"no_label": 1, "no_known_gene": 2}
    assert found["models"]["untrained"]["random_weights"]
    assert found["versions"]["torch"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    files = [*PICTURES, "predictions.csv", "results.json", "table.md"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
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
        f1 = [row["macro_f1"]["value"] for row in scheme["rows"]]
        gain = scheme["best"]["macro_f1_over_best_pca"]
        assert gain["value"] == pytest.approx(max(f1[3:]) - max(f1[:3]))
        assert ("low" in gain) == (scheme["name"] == "stratified 5-fold")


def test_the_table_says_what_scikit_learn_says_of_the_predictions(
    result: tuple[Path, dict[str, Any], str],
) -> None:
    folder, found, printed = result
    with (folder / "predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    for scheme in found["schemes"]:
        for row in scheme["rows"]:
            key = (scheme["name"], row["features"], row["classifier"])
            mine = [p for p in predictions if (p["scheme"], p["features"], p["classifier"]) == key]
            truth, guess = ([p[name] for p in mine] for name in ("label", "predicted"))
            assert len({p["cell"] for p in mine}) == len(mine) == scheme["cells"]
            assert row["macro_f1"]["value"] == f1_score(truth, guess, average="macro")
            assert row["accuracy"]["value"] == accuracy_score(truth, guess)
            (shown,) = [text for text in _block(printed, key[0]) if text[:2] == key[1:]]
            assert f"{row['macro_f1']['value']:.3f}" in shown[2]
    donors = {p["cell"]: p["fold"] for p in predictions if p["scheme"] == "leave one donor out"}
    assert set(donors.values()) == {"d1", "d2", "d3"}
    assert all(fold == f"d{int(cell[4:]) % 3 + 1}" for cell, fold in donors.items())


def _block(printed: str, scheme: str) -> list[tuple[str, str, str]]:
    """(features, classifier, rest) of the lines of a scheme's table."""
    part = printed[printed.index(f"\n{scheme}:") :].split("\n\n")[1]
    cells = [[cell for cell in row.split("  ") if cell] for row in part.splitlines()[1:]]
    return [(c[0].strip(), c[1].strip(), " ".join(c[2:])) for c in cells]


def test_labels_that_counts_can_tell_are_told(result: tuple[Path, dict[str, Any], str]) -> None:
    rows = result[1]["schemes"][0]["rows"]
    constant = next(row for row in rows if row["features"] == "X_other")
    assert rows[0]["macro_f1"]["value"] > 0.8
    assert constant["macro_f1"]["value"] < 0.6, "X_other is the same for every cell"
    assert constant["macro_f1_over_baseline"]["high"] < 0


def test_it_repeats_by_seed_and_random_weights_are_not_the_models(
    folders: tuple[Path, str],
) -> None:
    places = [folders[0] / name for name in ("types", "again", "other")]
    schemes = [json.loads((each / "results.json").read_text())["schemes"] for each in places]
    assert schemes[0] == schemes[1]
    assert schemes[0][0] != schemes[2][0]
    assert len(schemes[2]) == 1
    assert len({(each / "predictions.csv").read_text() for each in places[:2]}) == 1


def test_wrong_input_is_answered_in_one_message(labelled: Trained, tmp_path: Path) -> None:
    cells, out = anndata.read_h5ad(labelled.h5ad), tmp_path / "out"
    for name, value in {"negative": -1.0, "half": 0.5}.items():
        other, counts = cells.copy(), cells.X.toarray()
        counts[0, 5] = value
        other.X = type(cells.X)(counts)
        other.write_h5ad(tmp_path / f"{name}.h5ad")
    cells.obs["n"] = [f"n{number}" for number in range(NUM_CELLS)]
    cells.write_h5ad(tmp_path / "named.h5ad")
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
    """How the command breaks when a picture cannot be drawn."""
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
    out = tmp_path / "out"
    more = "--obsm X_other --donor none --resamples 0 --out"
    line = words("--input", labelled.h5ad, more, out)
    (told,) = run_ranks(with_broken_pictures, 1, line, timeout_s=LIMIT_S)
    assert told == "no map today"
    found = json.loads((out / "results.json").read_text())
    assert found["schemes"][0]["rows"]
    table = (out / "table.md").read_text()
    assert "no interval, so no verdict" in table
    assert "(-)" not in table
    left = sorted(path.name for path in out.iterdir())
    assert left == ["confusion.png", "predictions.csv", "results.json", "scores.png", "table.md"]


def test_a_folder_may_have_an_equals_sign_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "lr=1e-3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    given = ["runs/lr=1e-3", "small=runs/lr=1e-3", "10m=runs/10m", "runs/plain"]
    named = {name: str(path) for name, path in launched._named(given).items()}
    folders = {"lr=1e-3": "runs/lr=1e-3", "small": "runs/lr=1e-3", "10m": "runs/10m"}
    assert named == folders | {"plain": "runs/plain"}
