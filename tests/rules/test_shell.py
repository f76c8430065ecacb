"""Shell scripts stop at the first error and hold no secrets; jobs have the cells that they say."""

from __future__ import annotations

import re

import pytest

from geneformer_mcore.config import load
from tests.rules.sources import ROOT

SOURCED = ("environment.sh", "job.sh")
"""Read by other scripts, whose `set` holds for them."""


def test_scripts() -> None:
    for path in (ROOT / ".ci" / "run", *ROOT.glob("tests/*.sh"), *ROOT.glob("slurm/*.sh")):
        text = path.read_text()
        assert path.name in SOURCED or "set -euo pipefail" in text, path
        assert not re.search(r"\beval\b|0\.0\.0\.0|password|token=|secret", text, re.I), path


def test_jobs_differ_in_nothing_but_their_size() -> None:
    texts = [(ROOT / "slurm" / f"pretrain_{size}.sh").read_text() for size in ("10m", "106m")]
    small, large = (text.replace("106m", "10m").splitlines() for text in texts)
    differing = [b for a, b in zip(small, large, strict=True) if a != b]
    assert len(differing) == 2
    assert differing[0].startswith("# ")
    assert differing[1] == "#SBATCH --nodes=16"


@pytest.mark.parametrize(("size", "nodes"), [("10m", 8), ("106m", 16)])
def test_nodes_and_micro_batches_make_the_global_batch(size: str, nodes: int) -> None:
    script = (ROOT / "slurm" / f"pretrain_{size}.sh").read_text()
    assert f"#SBATCH --nodes={nodes}\n#SBATCH --gpus-per-node=8\n" in script
    config, _ = load(ROOT / "configs" / f"geneformer_{size}.yaml")
    assert 8 * nodes * config.train.micro_batch_size == config.train.global_batch_size == 2048
