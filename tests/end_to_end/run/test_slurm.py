"""A job of the project's own script on a real SLURM: started, signalled, requeued, and finished.

All that can happen to a job: tests/soak/slurm.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.end_to_end.forked import Run
from tests.soak.slurm import cluster as slurm
from tests.soak.slurm.cluster import Cluster
from tests.soak.slurm.jobs import CONFIGURATION, ROOT, TOY, submit

STEPS = "train.steps=12"
# What Python runs first in every process of the job: in the ranks of its first start step 6 waits
# for the signal, so that this comes in time on any machine.
SITE = """
import os
if "LOCAL_RANK" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    from tests.end_to_end.instants import wait_for_a_signal
    wait_for_a_signal("geneformer_mcore.training.trainer:train_step", 6)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(slurm.missing() != "", reason=slurm.missing())
def test_a_signalled_job_is_requeued_and_ends_as_if_it_had_not_been(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one rank each; the run that nothing disturbs is one without SLURM."""
    whole = Run(tmp_path / "whole", ("--config", CONFIGURATION, f"data.store={store}", *TOY, STEPS))
    whole.check(ranks=2)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    # Short: the path of a socket has 107 characters at most.
    with (
        tempfile.TemporaryDirectory(prefix="slurm_", ignore_cleanup_errors=True) as folder,
        Cluster(Path(folder)) as cluster,
    ):
        job = submit(cluster, tmp_path / "run", store, STEPS)
        job.at_step(5)
        cluster.run("scancel", "--signal=USR1", "--batch", job.number)
        assert job.ended() == "COMPLETED", job.log
        assert (job.restarts, job.shown("ExitCode")) == (1, "0:0"), job.log
        (why,) = (line for line in job.lines() if line.startswith("restart "))
        assert f"restart 1 of job {job.number}: " in why
        assert "as interrupted (signal SIGUSR1; saved at step 6 of 12)" in why
    assert job.weights() == whole.state()
