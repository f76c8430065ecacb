"""benchmarks/scaling.py: the arithmetic of an estimated step, and a small run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import readme_tables, scaling
from benchmarks.harness import scaling_model
from benchmarks.harness.common import RESULTS
from benchmarks.harness.scaling_model import MODELS, Assumptions, Balance, Curve, Inputs, step
from geneformer_mcore.errors import DataError

CURVE = Curve((2048 * 16.0, 2048 * 32.0), (0.1, 0.16), (1000.0, 1600.0))
INPUTS = Inputs({("106m", True): CURVE, ("106m", False): CURVE}, 1024.0, {}, 10_000.0, 5_000.0)


def terms(packed: bool, nodes: int, balance: Balance, **assumed: object) -> dict[str, float]:
    inputs = replace(INPUTS, balances={8 * nodes: balance})
    return step(inputs, MODELS[1], packed, nodes, "H200", replace(Assumptions(), **assumed))


def test_terms_by_hand() -> None:
    """1 GB of gradients, 2 nodes: 2 * 7/8 / 230 + 2 * 1/2 * (1/8) / 20 + 20 * 8 us, in seconds."""
    found = scaling_model.all_reduce_s(1e9, 2, Assumptions())
    assert found == pytest.approx(0.0076087 + 0.00625 + 0.00016, rel=1e-4)
    even, uneven = Balance(1.0, 1.0, 0.0), Balance(1.25, 2.0, 0.002)
    # 128 full cells of a GPU are four passes of 32; 16 of 2 x 1,024 tokens are one of 16.
    assert terms(False, 2, even)["compute_s"] == pytest.approx(4 * 0.16)
    assert terms(False, 2, even)["origin"] == terms(False, 16, even)["origin"] == "measured"
    small = terms(False, 16, even, overlap=0.0)
    assert small["exposed_s"] == small["all_reduce_s"]
    assert small["step_s"] == pytest.approx((0.1 + small["all_reduce_s"]) / 0.96)
    assert small["cells_per_s"] == pytest.approx(2048 / small["step_s"])
    assert small["hours"] == pytest.approx(115_430 * small["step_s"] / 3600)
    assert terms(False, 16, even)["exposed_s"] == pytest.approx(0.06 * small["all_reduce_s"])
    # Packed, half the tokens: below the measured steps, on their line, 0.04 s and 3.75 ms a cell.
    packed = terms(True, 16, uneven)
    assert (packed["origin"], packed["fixed_s"]) == ("extrapolated", pytest.approx(0.04))
    assert packed["compute_s"] == pytest.approx(0.04 + 0.00375 * 8 * 1.25)
    assert packed["waiting_s"] == pytest.approx(0.00375 * 8 * 0.25)
    assert packed["peak_mib"] == pytest.approx(700)
    assert packed["loader_s"] == pytest.approx(16 / 10_000 + 0.002)
    slow = terms(True, 16, uneven, is_balanced=False, from_store=True)
    assert slow["compute_s"] == pytest.approx(0.04 + 0.00375 * 16)
    assert slow["step_s"] == pytest.approx((2048 / 5_000 + 0.002) / 0.96)


def test_simulated_ranks_are_the_real_packing() -> None:
    lengths = np.random.default_rng(0).integers(20, 2048, 4096)
    found = scaling_model.balance(lengths, 128, steps=3)
    assert 1 < found.packed < 1.03 < 1.1 < found.dealt
    assert found.pack_s > 0


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "DEMO_STORE", tmp_path / "none")
    words = ["--steps", "1", "--json", tmp_path / "scaling.json", "--svg", tmp_path / "a.svg"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, words)])
    assert scaling.main() == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    rows = json.loads((RESULTS / scaling_model.H200).read_text())["rows"]
    padded = next(each for each in found["layouts"] if not each["packed"] and each["nodes"] == 16)
    assert padded["compute_s"] == rows[0]["step_s"], "16 full cells of the 106M model"
    page = readme_tables.filled("<!-- table: scaling -->\n<!-- end table -->\n", tmp_path)
    assert (
        "| estimate, not measured | 10M padded | 10M packed | 106M padded | 106M packed |" in page
    )
    assert (
        f"| cells/s on 128 H200 | {found['layouts'][0]['cells_per_s_of']['H200'][4]:,.0f} |" in page
    )
    assert "Estimates. Measured: steps of one H200" in page
    assert (tmp_path / "a.svg").read_bytes().count(b"<path") > 10
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--results", str(tmp_path)])
    with pytest.raises(DataError, match="Remedy: python benchmarks/gpu_session"):
        scaling.main()
