"""Tables of a Classification: console, Markdown, JSON, and all predictions as CSV.

Classification  ->  lines for the console  |  table.md  |  results.json  |  predictions.csv
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_mcore.celltypes.classify import Classification, Judged
from geneformer_mcore.celltypes.cross_validation import BY_DONOR, MIN_DONORS
from geneformer_mcore.inference import data_leakage
from geneformer_mcore.io.files import whole_file, write_json
from geneformer_mcore.metrics.provenance import provenance
from geneformer_mcore.report.results import aligned

HEADINGS = (
    *("features", "classifier", "macro F1", "95 %", "accuracy", "95 %", "F1 over folds"),
    "F1 over PCA + forest",
)
_MOST_NAMED = 8


def lines(found: Classification) -> list[str]:
    """Lines for the console."""
    shown = [*_about(found), ""]
    for judged in found.judged:
        shown += [*_about_scheme(judged), "", *aligned([HEADINGS, *_rows(judged)]), ""]
    shown += [best(judged) for judged in found.judged]
    return shown + [f"note: {note}" for note in found.notes]


def markdown(found: Classification) -> str:
    """The same as Markdown."""
    shown = [f"# Cell types of {found.facts['input']}", "", *_about(found), ""]
    for judged in found.judged:
        shown += [f"## {judged.scheme.name}", "", *_about_scheme(judged), ""]
        rows = [HEADINGS, ["---"] * len(HEADINGS), *_rows(judged)]
        shown += [*(f"| {' | '.join(row)} |" for row in rows), "", best(judged), ""]
    return "\n".join([*shown, *(f"- {note}" for note in found.notes)]).rstrip() + "\n"


def content(found: Classification) -> dict[str, Any]:
    """All results as plain JSON, with machine, versions and commit."""
    return {
        **found.facts,
        "schemes": [
            {
                "name": judged.scheme.name,
                "cells": len(judged.scheme.cells),
                "labels": judged.labels,
                "labels_left_out": judged.scheme.left_out,
                "rows": [
                    {"features": each.features, "classifier": each.classifier, **each.scores}
                    for each in judged.methods
                ],
                "best": {
                    "pca": judged.best.pca.classifier,
                    "features": judged.best.other.features,
                    "classifier": judged.best.other.classifier,
                    "macro_f1_over_best_pca": judged.best.gain,
                },
            }
            for judged in found.judged
        ],
        "notes": found.notes,
        **provenance(),
    }


def save(found: Classification, folder: Path) -> list[str]:
    """Write results.json, table.md and predictions.csv into a folder. Returns their names."""
    write_json(folder / "results.json", content(found))
    with whole_file(folder / "table.md") as partial:
        partial.write_text(markdown(found), encoding="utf-8")
    with (
        whole_file(folder / "predictions.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["cell", "scheme", "fold", "features", "classifier", "label", "predicted"])
        for judged in found.judged:
            writer.writerows(_predictions(found, judged))
    return ["results.json", "table.md", "predictions.csv"]


def _predictions(found: Classification, judged: Judged) -> list[list[str]]:
    scheme, cells = judged.scheme, found.cells
    fold_of = np.full(len(cells.names), "", object)
    for name, (_, test) in scheme.folds.items():
        fold_of[test] = name
    return [
        [
            *(cells.names[row], scheme.name, fold_of[row]),
            *(each.features, each.classifier, cells.labels_N[row], predicted),
        ]
        for each in judged.methods
        for row, predicted in zip(scheme.cells, each.predicted_N, strict=True)
    ]


def best(judged: Judged) -> str:
    """The best method on PCA compared with the best of all others."""
    pca, other, gain = judged.best.pca, judged.best.other, judged.best.gain
    of_pca = sum(each.features == pca.features for each in judged.methods)
    verdict = "no interval, so no verdict"
    if "low" in gain:
        found = "ahead" if gain["low"] > 0 else "behind" if gain["high"] < 0 else "not told apart"
        verdict = f"{found} (not corrected for choosing the best of several)"
    return (
        f"{judged.scheme.name}: best of {of_pca} on PCA: {pca.classifier}, "
        f"{pca.scores['macro_f1']['value']:.3f}; best of {len(judged.methods) - of_pca} others: "
        f"{other.features}, {other.classifier}, {other.scores['macro_f1']['value']:.3f}; "
        f"{_gain(gain)} against that PCA: {verdict}."
    )


def _about(found: Classification) -> list[str]:
    facts = found.facts
    donors = f", donors by {facts['donor']}" if facts["donor"] else ""
    left_out = facts["left_out"]
    reasons = [f"{number:,} with {why.replace('_', ' ')}" for why, number in left_out.items()]
    shown = [
        f"{facts['input']}: {facts['num_cells']:,} cells x {facts['num_genes']:,} genes, labels by "
        f"{facts['label']}{donors}; left out for every method: {', '.join(reasons)}"
    ]
    for name, model in facts["models"].items():
        shape, what = model["model"], f"step {model['step']:,}"
        if model["random_weights"]:
            what = f"random weights, seed {facts['seed']}"
        checked = facts["overlap"].get(name)
        seen = f"; {data_leakage.summary(checked)}" if checked else ""
        shown.append(
            f"{name}: {shape['num_layers']} layers x {shape['hidden_size']}, "
            f"{shape['seq_length']:,} tokens, {what}{seen}"
        )
    return shown


def _about_scheme(judged: Judged) -> list[str]:
    scheme = judged.scheme
    text = (
        f"{scheme.name}: {len(scheme.cells):,} cells, {len(judged.labels)} labels, "
        f"{len(scheme.folds)} folds"
    )
    if scheme.name == BY_DONOR:
        has_intervals = len(scheme.folds) >= MIN_DONORS
        text += "; intervals " + ("over donors" if has_intervals else f"need {MIN_DONORS} donors")
    if not scheme.left_out:
        return [text]
    named = [f"{label} ({cells})" for label, cells in scheme.left_out.items()][:_MOST_NAMED]
    more = ", ..." if len(scheme.left_out) > _MOST_NAMED else ""
    return [f"{text}; labels left out as too rare: {', '.join(named)}{more}"]


def _rows(judged: Judged) -> list[list[str]]:
    """The text of every method's row; the first method is the baseline."""
    rows: list[list[str]] = []
    for each in judged.methods:
        scores = each.scores
        of_folds = np.array([fold["macro_f1"] for fold in scores["folds"].values()])
        row = [
            *(each.features, each.classifier),
            *(f"{scores['macro_f1']['value']:.3f}", _span(scores["macro_f1"])),
            *(f"{scores['accuracy']['value']:.3f}", _span(scores["accuracy"])),
            f"{of_folds.mean():.3f} ± {of_folds.std(ddof=1):.3f}",
            _gain(scores["macro_f1_over_baseline"]) if rows else "-",
        ]
        rows.append(row)
    return rows


def _gain(gain: dict[str, float]) -> str:
    return f"{gain['value']:+.3f}" + (f" ({_span(gain)})" if "low" in gain else "")


def _span(interval: dict[str, float]) -> str:
    return f"{interval['low']:.3f} to {interval['high']:.3f}" if "low" in interval else "-"
