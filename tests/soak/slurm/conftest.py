"""One cluster for all tests of this folder, and the run that nothing disturbed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import h5ad, store  # noqa: F401  fixtures
from tests.soak.slurm import cluster as slurm
from tests.soak.slurm.cluster import Cluster
from tests.soak.slurm.jobs import Job, submit


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes; where SLURM is not installed the test is skipped."""
    reason = slurm.missing()
    if reason:
        pytest.skip(reason)
    # Short: the path of a socket has 107 characters at most.
    with (
        tempfile.TemporaryDirectory(prefix="slurm_", ignore_cleanup_errors=True) as folder,
        Cluster(Path(folder)) as started,
    ):
        yield started


@dataclass(frozen=True)
class Clean:
    """A job that has ended, undisturbed; tasks: what ran under its srun, by node."""

    job: Job
    tasks: dict[str, list[list[str]]]


@pytest.fixture(scope="session")
def clean(
    cluster: Cluster,
    store: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Clean:
    """It is looked at while it trains."""
    job = submit(cluster, tmp_path_factory.mktemp("clean") / "run", store, preflight=True)
    job.at_step(5)
    tasks = {node: cluster.tasks(node) for node in cluster.nodes}
    job.ended()
    return Clean(job, tasks)
