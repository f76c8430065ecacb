"""The table of cell types, out of what benchmarks/cell_types.py keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import readme_tables
from benchmarks.side_by_side import cell_type_pages, cell_type_sets


def scores(value: float, gain: float) -> dict[str, Any]:
    def around(middle: float) -> dict[str, float]:
        return {"value": middle, "low": middle - 0.05, "high": middle + 0.05}

    return {
        "macro_f1": around(value),
        "accuracy": around(value + 0.1),
        "macro_f1_over_baseline": around(gain),
    }


CONTENT = {
    "sets": [
        {
            "input": "blood.h5ad",
            "schemes": [
                {
                    "name": "stratified 5-fold",
                    "cells": 2600,
                    "labels": ["a", "b", "c"],
                    "rows": [
                        {"features": "PCA", "classifier": "forest", **scores(0.8, 0.0)},
                        {"features": "pretrained", "classifier": "forest", **scores(0.7, -0.1)},
                    ],
                }
            ],
            "trained_on": ["lung.h5ad"],
            "not_trained_on": {"raw.h5ad": 2600},
            "pretraining": {
                "num_layers": 2,
                "hidden_size": 128,
                "seq_length": 256,
                "steps": 200,
                "cells_per_step": 32,
                "wall_s": 620.0,
                "val_loss": 7.251,
            },
        }
    ],
    "nvidia": cell_type_sets.NVIDIA,
    "machine": "a machine",
    "versions": {"python": "3.11.7"},
    "commit": "abc",
}


def test_the_best_line_is_bold_and_the_baseline_gains_nothing(tmp_path: Path) -> None:
    (tmp_path / "cell_types.json").write_text(json.dumps(CONTENT))
    page = "<!-- table: cell_types -->\n<!-- end table -->\n"
    filled = readme_tables.filled(page, tmp_path)
    start = "| blood, 2,600 cells | stratified 5-fold, 3 labels |"
    assert (
        f"{start} PCA | forest | **0.800 (0.750 to 0.850)** | 0.900 (0.850 to 0.950) | - |"
    ) in filled
    assert "| pretrained | forest | 0.700 (0.650 to 0.750)" in filled
    assert "| -0.100 (-0.150 to -0.050) |" in filled
    assert "200 steps of 32 cells, 10 minutes, validation loss 7.25" in filled
    assert "pretrained on lung.h5ad, not on raw.h5ad" in filled
    assert "raw.h5ad (2,600 of the cells)" in filled
    assert "commit abc" in filled
    assert readme_tables.filled(filled, tmp_path) == filled


def test_the_cards_figures_stand_beside() -> None:
    """Those of the model card of geneformer-10M/106M-240530, downstream task accuracy."""
    (told,) = cell_type_pages.nvidia(CONTENT)
    assert "PCA(10) 0.561 / 0.775; about 100 steps 0.079 / 0.399" in told
    assert "10M 0.702 / 0.839; 106M 0.843 / 0.905" in told
    assert "on other cells" in told


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    page = "<!-- table: cell_types -->\n<!-- end table -->\n"
    assert "not measured" in readme_tables.filled(page, tmp_path)
