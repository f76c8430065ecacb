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
from tests.distributed.commands import Ended, commands
from tests.distributed.ranks import run_ranks
from tests.distributed.trained import EMPTY, NUM_CELLS, ONE_GENE, UNKNOWN, Trained

RARE, NO_LABEL = (0, 1, 2), 6
"""Cells of a label of their own, and one without any."""
FEATURES = ["PCA(10) of log counts", "untrained", "mine", "X_other"]
TIMEOUT_S = 280
"""umap compiles itself, once per process: ten seconds, and minutes on a busy machine."""
TREES = 10
"""Of a forest here; that it is scikit-learn's own is tests/unit/test_cross_validation.py's."""
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
    start = ["--checkpoint", f"mine={model.run}", "--input", str(model.h5ad), "--out", str(out)]
    return [*start, "--resamples", "50", *more]


@pytest.fixture(scope="module")
def folders(labelled: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with folders that the command makes, and what it prints first: with pictures;
    again, without them; and with another seed."""
    out = tmp_path_factory.mktemp("result")
    more = ("--untrained", "--obsm", "X_other")
    lines = [
        line(labelled, out / "types", *more),
        line(labelled, out / "again", *more, "--no-plots"),
        line(labelled, out / "other", *more, "--no-plots", "--seed", "1", "--donor", "none"),
    ]
    (ended,) = run_ranks(classified, 1, lines, timeout_s=TIMEOUT_S)
    assert [each.code for each in ended] == [0, 0, 0], ended
    return out, ended[0].out


@pytest.fixture(scope="module")
def result(folders: tuple[Path, str]) -> tuple[Path, str]:
    """The folder of the first, and what it prints."""
    return folders[0] / "types", folders[1]


def test_the_folder_holds_figures_predictions_and_pictures(result: tuple[Path, str]) -> None:
    folder, printed = result
    found = json.loads((folder / "results.json").read_text())
    assert [scheme["name"] for scheme in found["schemes"]] == [
        "stratified 5-fold",
        "leave one donor out",
    ]
    for scheme in found["schemes"]:
        assert list(dict.fromkeys(row["features"] for row in scheme["rows"])) == FEATURES
        assert len(scheme["rows"]) == 3 * len(FEATURES)
    first = found["schemes"][0]
    assert first["labels"] == ["a", "b"]
    assert first["labels_left_out"] == {"rare": len(RARE)}
    assert first["cells"] == NUM_CELLS - len({*RARE, NO_LABEL, UNKNOWN, EMPTY})
    assert found["left_out"] == {"no_label": 1, "no_known_gene": 2}
    assert found["models"]["untrained"]["random_weights"]
    assert found["versions"]["torch"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*PICTURES, "predictions.csv", "results.json", "table.md"]
    )
    assert "labels left out as too rare: rare (3)" in printed
    assert "whether mine was trained on these cells could not be checked" in printed
    assert "--training-store" in printed
    assert printed.count("best of 3 on PCA: ") == 2
    assert printed.count("; best of 9 others: ") == 2
    assert printed.count("(not corrected for choosing the best of several)") == 1
    assert printed.count("against that PCA: no interval, so no verdict") == 1
    assert "3 folds; intervals need 5 donors" in printed
    for scheme in found["schemes"]:
        best, first = scheme["best"], scheme["rows"][:3]
        of_pca = max(row["macro_f1"]["value"] for row in first)
        others = max(row["macro_f1"]["value"] for row in scheme["rows"][3:])
        gain = best["macro_f1_over_best_pca"]
        assert gain["value"] == pytest.approx(others - of_pca)
        assert ("low" in gain) == (scheme["name"] == "stratified 5-fold")


def test_the_table_says_what_scikit_learn_says_of_the_predictions(
    result: tuple[Path, str],
) -> None:
    folder, printed = result
    with (folder / "predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    found = json.loads((folder / "results.json").read_text())
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


def test_labels_that_counts_can_tell_are_told(result: tuple[Path, str]) -> None:
    found = json.loads((result[0] / "results.json").read_text())
    by_counts = found["schemes"][0]["rows"][0]
    constant = next(r for r in found["schemes"][0]["rows"] if r["features"] == "X_other")
    assert by_counts["macro_f1"]["value"] > 0.8
    assert constant["macro_f1"]["value"] < 0.6, "X_other is the same for every cell"
    assert constant["macro_f1_over_baseline"]["high"] < 0


def test_it_repeats_by_seed_and_random_weights_are_not_the_models(
    folders: tuple[Path, str],
) -> None:
    names = ("types", "again", "other")
    first, again, other = (
        json.loads((folders[0] / name / "results.json").read_text()) for name in names
    )
    assert first["schemes"] == again["schemes"]
    assert first["schemes"][0] != other["schemes"][0]
    assert len(other["schemes"]) == 1
    texts = [(folders[0] / name / "predictions.csv").read_text() for name in names[:2]]
    assert texts[0] == texts[1]


def test_wrong_input_is_answered_in_one_message(labelled: Trained, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(labelled.h5ad)
    wrong = {"negative": -1.0, "half": 0.5}
    for name, value in wrong.items():
        counts = cells.X.toarray()
        counts[0, 5] = value
        other = cells.copy()
        other.X = type(cells.X)(counts)
        other.write_h5ad(tmp_path / f"{name}.h5ad")
    out = tmp_path / "out"
    good = line(labelled, out, "--no-plots")
    start, rest = good[:2], good[4:]
    (tmp_path / "there").mkdir()
    cases = {
        "no column 'kind'": [*good, "--label", "kind"],
        "there are 1 (same)": [*good, "--label", "one"],
        "there are 0 (none)": [*good, "--label", "n"],
        "names 1 (same)": [*good, "--donor", "one"],
        "holds -1: negative": [*start, "--input", str(tmp_path / "negative.h5ad"), *rest],
        "holds 0.5: not a whole number": [*start, "--input", str(tmp_path / "half.h5ad"), *rest],
        "no matrix in layers/x": [*good, "--counts-layer", "x"],
        "obsm has no array 'X_no'": [*good, "--obsm", "X_no"],
        "nothing to judge": good[2:],
        "read from h5ad files only": [*rest, "--obsm", "X", "--input", str(tmp_path / "there")],
        "two checkpoints are called mine": [*good, *start],
        "no folder": [*good, "--checkpoint", "nowhere"],
        "no such file": [*start, "--input", str(tmp_path / "no.h5ad"), *rest],
        "exists already": line(labelled, tmp_path / "there"),
        "--resamples must be 0": [*good, "--resamples", "-1"],
        "from 0 (the embedding) to 4": [*good, "--layer", "9"],
    }
    cells.obs["n"] = [f"n{number}" for number in range(NUM_CELLS)]
    cells.write_h5ad(tmp_path / "named.h5ad")
    cases["there are 0 (none)"][3] = str(tmp_path / "named.h5ad")
    (found,) = run_ranks(commands, 1, "classify", list(cases.values()), timeout_s=TIMEOUT_S)
    for (text, words), ended in zip(cases.items(), found, strict=True):
        assert ended.code == 2, (words, ended)
        assert text in ended.err, (text, ended.err)
        assert not ended.out
        assert not out.exists()


def with_broken_pictures(words: list[str]) -> str:
    """How the command breaks when a picture cannot be drawn."""
    from geneformer_mcore.celltypes import plots

    def broken(*_: object) -> None:
        raise RuntimeError("no map today")

    plots._umaps = broken  # type: ignore[assignment]
    try:
        classified([words])
    except RuntimeError as error:
        return str(error)
    return ""


def test_figures_survive_a_picture_that_fails(labelled: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "--input",
        str(labelled.h5ad),
        "--obsm",
        "X_other",
        "--donor",
        "none",
        "--resamples",
        "0",
    ]
    (told,) = run_ranks(with_broken_pictures, 1, [*words, "--out", str(out)], timeout_s=TIMEOUT_S)
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
    assert {name: str(path) for name, path in launched._named(given).items()} == {
        "lr=1e-3": "runs/lr=1e-3",
        "small": "runs/lr=1e-3",
        "10m": "runs/10m",
        "plain": "runs/plain",
    }
