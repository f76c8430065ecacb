"""The plot of many perturbations counts each where it belongs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from geneformer_mcore.perturb import outputs


@pytest.mark.parametrize("goal", ["", "goal_"])
def test_what_has_no_p_is_not_counted_as_not_significant(goal: str) -> None:
    numbers = np.arange(1.0, 9.0)
    p = np.array([0.001, 0.002, 0.4, 0.5, 0.6, np.nan, np.nan, np.nan])
    rows = pd.DataFrame(
        {"shift": numbers, "control_shift": 2.0, "goal_shift": numbers, f"{goal}p": p,
         f"{goal}q": np.where(p < 0.01, 0.01, p)},
        index=[f"gene{number}" for number in range(8)],
    )  # fmt: skip
    axes = Figure().add_subplot()
    outputs._volcano(axes, rows, bool(goal))
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["q >= 0.05: 3", "q < 0.05: 2", "no p, not shown: 3"]
    assert sorted(text.get_text() for text in axes.texts) == [f"gene{n}" for n in range(5)]
