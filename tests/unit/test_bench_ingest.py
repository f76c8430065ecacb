"""benchmarks/ingest.py: the files hold the cells that were drawn, the arithmetic is as stated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import psutil
import pytest

from benchmarks import ingest
from tests.small_cells import random_counts, write_h5ad


def test_drawn_cells_are_those_of_the_source(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "ROWS_PER_WRITE", 13)
    counts = random_counts(rng, 30, 40)
    source = write_h5ad(tmp_path / "a.h5ad", counts, obs={"age": range(30)})
    ingest._draw(source, tmp_path / "b.h5ad", 100, 7)
    drawn = anndata.read_h5ad(tmp_path / "b.h5ad")
    assert drawn.shape == (100, 40)
    assert drawn.obs_names.is_unique
    rows = drawn.obs["age"].to_numpy()
    assert len(set(rows)) > 20
    np.testing.assert_array_equal(drawn.X.toarray(), counts[rows].toarray())
    with h5py.File(tmp_path / "b.h5ad") as file:
        assert file["X/data"].compression == "gzip"


def run_of(cells: int, **changes: Any) -> dict[str, Any]:
    return {
        "cells": cells,
        "seconds": cells / 4000,
        "cells_per_s": 4000,
        "tokenising_s": cells / 8000,
        "writing_s": cells / 20_000,
        "peak_pss_gb": 0.5,
        "input_bytes": cells * 1000,
        "store_bytes": cells * 3000,
    } | changes


def test_extrapolation_divides_what_the_cores_share() -> None:
    runs = [run_of(50_000), run_of(200_000, peak_pss_gb=0.6)]
    result = ingest._result(runs, 2, ["a.h5ad"])
    found = result["extrapolation"]
    assert (found["per_core"], found["merge"]) == (4000, 20_000)
    assert found["tokenise_s"] == round(23_600_000 / (4000 * 64))
    assert found["merge_s"] == 1180
    # Units of 16,384 rows, a power of two of buckets of at most 32,768 cells for each split.
    assert found["pieces"] == 1441 * 3 * 1024
    pieces_s = 1441 * 3072 * 50e-6
    assert found["minutes"] == round((23_600_000 / 256_000 + 1180 + pieces_s) / 60, 1)
    assert found["read_gb_per_s"] == 0.26
    assert result["growth"] == {"cells": 4, "seconds": 4, "memory_pss": 1.2, "store_bytes": 4}


def test_goals_are_of_the_largest_run_and_of_growth() -> None:
    runs = [run_of(50_000), run_of(200_000, seconds=60.0, peak_pss_gb=2.5)]
    rate, memory, time_growth, memory_growth = ingest._goals(runs)
    assert (rate.value, rate.met) == (4000, False)
    assert (memory.value, memory.met) == (2.5, False)
    assert time_growth.value == pytest.approx(1.2)
    assert time_growth.met is False
    assert memory_growth.value == 5
    assert all(goal.met for goal in ingest._goals([run_of(50_000, cells_per_s=5000)] * 2))


def test_a_phase_that_is_rounded_to_nothing_took_a_tenth_of_a_second() -> None:
    told = "5.0 s (looking at inputs 0.1, tokenising 4.2, writing rows 0.0)"
    assert ingest._phase_s("tokenising", told) == 4.2
    assert ingest._phase_s("writing rows", told) == 0.1


def test_memory_is_summed_over_all_processes() -> None:
    hold = "b = bytearray(60_000_000); print(flush=True); input()"
    parent = (
        "import subprocess, sys; b = bytearray(60_000_000); "
        f"subprocess.run([sys.executable, '-c', {hold!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = ingest._memory(process.pid)
        alone = psutil.Process(process.pid).memory_info().rss
        process.communicate(b"\n")
    assert found["rss"] > alone + 60_000_000 > 120_000_000
    assert 120_000_000 < found["pss"] <= found["rss"]
    assert ingest._memory(process.pid) == {"rss": 0, "pss": 0}


@pytest.mark.slow
def test_small_run(tmp_path: Path, repository: Path) -> None:
    arguments = ["--cells", "300", "--workers", "1", "--work", tmp_path / "work"]
    arguments += ["--json", tmp_path / "r.json"]
    result = subprocess.run(
        [sys.executable, repository / "benchmarks" / "ingest.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    assert [run["cells"] for run in content["runs"]] == [300, 600, 1200]
    assert all(run["peak_rss_gb"] > 0.05 and run["cpu_s"] > 0 for run in content["runs"])
    assert {"machine", "versions", "commit"} <= set(content)
    assert "1,200 cells" in result.stdout
    assert "ingest of 1,200 cells: " in result.stdout
    assert not (tmp_path / "work").exists()
