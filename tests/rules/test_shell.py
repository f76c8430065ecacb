"""Shell scripts are sound: to bash, and to shellcheck where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from geneformer_mcore.config import load
from tests.rules.sources import ROOT, name_of

SCRIPTS = [
    ROOT / ".ci" / "run",
    *sorted((ROOT / "tests").glob("*.sh")),
    *sorted((ROOT / "slurm").glob("*.sh")),
]
SOURCED = ("environment.sh", "job.sh")
"""Read by other scripts, whose `set` holds for them."""


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts(path: Path) -> None:
    checks = [["bash", "-n"]]
    if shutil.which("shellcheck"):
        checks.append(["shellcheck", "--external-sources"])
    for check in checks:
        command = [*check, name_of(path)]
        checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    text = path.read_text()
    assert path.name in SOURCED or "set -euo pipefail" in text
    assert not re.search(r"\beval\b|0\.0\.0\.0|password|token=|secret", text, re.IGNORECASE)


def test_jobs_differ_in_nothing_but_their_size() -> None:
    """What all jobs do stands in the files that they share."""
    small, large = (
        (ROOT / "slurm" / f"pretrain_{size}.sh").read_text() for size in ("10m", "106m")
    )
    differing = [
        (a, b)
        for a, b in zip(small.splitlines(), large.splitlines(), strict=True)
        if a.replace("10m", "106m") != b
    ]
    assert [b for _, b in differing] == [
        "# The model card's 106M variant: 16 nodes x 8 GPUs, 16 cells per GPU, 2,048 per step.",
        "#SBATCH --nodes=16",
    ]


@pytest.mark.parametrize(("size", "nodes"), [("10m", 8), ("106m", 16)])
def test_nodes_and_micro_batches_make_the_global_batch(size: str, nodes: int) -> None:
    script = (ROOT / "slurm" / f"pretrain_{size}.sh").read_text()
    assert f"#SBATCH --nodes={nodes}\n#SBATCH --gpus-per-node=8\n" in script
    config, _ = load(ROOT / "configs" / f"geneformer_{size}.yaml")
    assert 8 * nodes * config.train.micro_batch_size == config.train.global_batch_size == 2048
