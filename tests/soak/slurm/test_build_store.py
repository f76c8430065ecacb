"""A store built by an array of tasks is the one that a single process builds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import anndata
import pytest

from tests.soak.slurm.cluster import Cluster
from tests.soak.slurm.jobs import ROOT

TASKS = 4
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def inputs(h5ad: Path, tmp_path: Path) -> list[str]:
    """The cells of the fixture in six files."""
    cells = anndata.read_h5ad(h5ad)
    paths = [tmp_path / f"cells_{number}.h5ad" for number in range(6)]
    for number, path in enumerate(paths):
        cells[number::6].copy().write_h5ad(path)
    return [str(path) for path in paths]


@pytest.fixture
def vocabulary(inputs: list[str], tmp_path: Path) -> str:
    path = str(tmp_path / "vocabulary.json")
    prepare("build_vocabulary.py", "--out", path, *inputs)
    return path


def test_an_array_of_four_tasks_gives_the_store_of_one_process(
    cluster: Cluster, inputs: list[str], vocabulary: str, tmp_path: Path
) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    prepare("build_store.py", "--out", str(one), "--vocabulary", vocabulary, *inputs)
    # In the environment: the job that puts the store together is submitted by a task.
    asked = ["env", f"SBATCH_OUTPUT={tmp_path}/%x_%A_%a.log", "sbatch", "--parsable"]
    asked += ["--cpus-per-task=1", f"--array=0-{TASKS - 1}", "slurm/build_store.sh"]
    asked += ["--out", str(many), "--vocabulary", vocabulary, *inputs]
    number = cluster.run(*asked, cwd=ROOT).strip()
    deadline = time.monotonic() + 300
    while cluster.run("squeue", "--noheader").strip() and time.monotonic() < deadline:
        time.sleep(0.5)
    logs = {path.name: path.read_text() for path in tmp_path.glob("build_store_*.log")}
    parts = [name for name in logs if name.startswith(f"build_store_{number}_")]
    assert len(parts) == TASKS, logs
    for task in range(TASKS):
        log = logs[f"build_store_{number}_{task}.log"]
        assert f"{many}: part {task}/{TASKS} is done" in log, log
    assert len(logs) == TASKS + 1
    assert content_hash(many) == content_hash(one), logs


def content_hash(store: Path) -> str:
    return str(json.loads((store / "manifest.json").read_text())["content_hash"])


def prepare(name: str, *arguments: str) -> None:
    command = [sys.executable, f"data_prep/{name}", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
