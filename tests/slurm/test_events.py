"""What befalls a job on a cluster, and what becomes of it: the table of docs/cluster.md.

Every job runs the project's own script as it is, and ends with the weights of a job that nothing
disturbed, byte for byte. Most of them take minutes: `make test-slurm`.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Clean
from tests.slurm.jobs import SLOW, Job, submit

pytestmark = pytest.mark.timeout(600)


def run_to_end(job: Job, clean: Clean, reason: str, restarts: int | None = 1) -> None:
    """It starts again for that reason, as often as told (None: once or more), and finishes."""
    assert job.ended() == "COMPLETED", job.log
    found = job.restarts
    assert found == restarts or (restarts is None and found >= 1)
    told = [line for line in job.lines() if line.startswith("restart ")]
    assert [line.split(" of job")[0] for line in told] == [f"restart {i + 1}" for i in range(found)]
    assert all(reason in line for line in told), told
    assert job.outcome()["exit_code"] == 0
    assert job.weights() == clean.job.weights()


def test_a_job_that_nothing_befalls(clean: Clean) -> None:
    assert clean.job.state() == "COMPLETED"
    assert clean.job.shown("ExitCode") == "0:0"
    assert clean.job.restarts == 0
    log = clean.job.log
    assert "0 of 12 checks fail" in log, "no preflight, or not a good one"
    assert "2 rank(s) on cpu (tensor 1, pipeline 1" in log
    assert clean.job.lines()[-1].startswith("the run ended at step 120 as finished")
    assert clean.job.outcome()["outcome"] == "finished"


def test_what_runs_under_srun_is_torchrun(clean: Clean, cluster: Cluster) -> None:
    for node in cluster.nodes:
        (task,) = clean.tasks[node]
        line = " ".join(task)
        assert task[1].endswith("/bin/torchrun"), line
        assert "--nnodes=2 --nproc-per-node=1 --max-restarts=0 --shutdown-timeout=600" in line
        assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in line
        assert "launch/pretrain.py --config configs/geneformer_106m.yaml" in line


def test_usr1_to_the_script(cluster: Cluster, clean: Clean, store: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", store)
    job.at_step(20)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    run_to_end(job, clean, "as interrupted (signal SIGUSR1; saved at step ")


@pytest.mark.usefixtures("every_event")
def test_requeued(cluster: Cluster, clean: Clean, store: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", store)
    job.at_step(20)
    cluster.run("scontrol", "requeue", job.number)
    run_to_end(job, clean, "as interrupted (signal SIGTERM; saved at step ")


@pytest.mark.usefixtures("every_event")
def test_usr1_before_the_time_is_up(
    cluster: Cluster, clean: Clean, store: Path, tmp_path: Path
) -> None:
    """SLURM may send it up to a minute early."""
    options = ("--time=2", "--signal=B:USR1@60")
    job = submit(cluster, tmp_path / "run", store, *SLOW, options=options)
    run_to_end(job, clean, "as interrupted (signal SIGUSR1; saved at step ", restarts=None)


@pytest.mark.usefixtures("every_event")
def test_the_time_limit_without_a_signal_before_it(
    cluster: Cluster, clean: Clean, store: Path, tmp_path: Path
) -> None:
    options = ("--time=1", "--signal=B:CONT@1")
    job = submit(cluster, tmp_path / "run", store, *SLOW, options=options)
    run_to_end(job, clean, "as interrupted (signal SIGTERM; saved at step ", restarts=None)


@pytest.mark.usefixtures("every_event")
def test_preempted(cluster: Cluster, clean: Clean, store: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path / "run", store, options=("--partition=low",))
    job.at_step(20)
    urgent = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    other = cluster.run("sbatch", "--parsable", *urgent, "--wrap=sleep 3").strip()
    run_to_end(job, clean, "as interrupted (signal SIGTERM; saved at step ")
    assert "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", other)


@pytest.mark.usefixtures("every_event")
def test_cancelled_is_saved_and_not_started_again(
    cluster: Cluster, clean: Clean, store: Path, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path / "run", store)
    job.at_step(20)
    cluster.run("scancel", job.number)
    assert job.ended() == "CANCELLED"
    assert job.outcome()["exit_code"] == 75
    assert job.restarts == 0
    run_again(job, clean, store)


@pytest.mark.usefixtures("every_event")
def test_a_killed_rank_ends_the_job_which_is_not_started_again(
    cluster: Cluster, clean: Clean, store: Path, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path / "run", store, *SLOW)
    job.at_step(45)
    ranks_of("n2")[0].kill()
    assert job.ended() == "FAILED"
    assert job.shown("ExitCode") == "1:0"
    assert job.restarts == 0
    assert "rank 1 of 2 is lost" in job.outcome()["reason"]
    run_again(job, clean, store, *SLOW)


@pytest.mark.usefixtures("every_event")
@pytest.mark.parametrize("cut", ["slurmd", "all"])
def test_a_dead_node(cut: str, cluster: Cluster, clean: Clean, store: Path, tmp_path: Path) -> None:
    """slurmd: the daemon alone dies, its ranks go on; all: the node's power is cut."""
    job = submit(cluster, tmp_path / "run", store, *SLOW)
    job.at_step(45)
    if cut == "all":
        cluster.kill_node("n2")
    else:
        cluster.kill_daemon("n2")
    deadline = time.monotonic() + 120
    while job.restarts == 0 and time.monotonic() < deadline:
        time.sleep(0.5)
    cluster.start_node("n2")
    reason = "as failed (rank 1 of 2 is lost" if cut == "all" else "the start before ended"
    run_to_end(job, clean, reason)


@pytest.mark.usefixtures("every_event")
def test_restarts_are_bounded(
    cluster: Cluster, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENEFORMER_MAX_RESTARTS", "1")
    job = submit(cluster, tmp_path / "run", store, "train.steps=2000")
    for start in range(2):
        job.at_step(10 + 100 * start, restarts=start)
        cluster.run("scancel", "--signal=USR1", "--batch", job.number)
        while job.lines()[-1].startswith("restart ") or job.restarts < start:
            time.sleep(0.2)
    assert job.ended() == "FAILED"
    assert (job.shown("ExitCode"), job.restarts) == ("75:0", 1)
    assert job.lines()[-1] == "not started again: GENEFORMER_MAX_RESTARTS is 1"


def run_again(job: Job, clean: Clean, store: Path, *settings: str) -> None:
    """Submitted once more, it ends as if it had never stopped."""
    again = submit(job.cluster, job.run, store, *settings)
    assert again.ended() == "COMPLETED", again.log
    assert "continues from" in again.log
    assert again.weights() == clean.job.weights()


def ranks_of(node: str) -> list[psutil.Process]:
    """Those of launch/pretrain.py on that node."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "launch/pretrain.py" in (process.info["cmdline"] or [])
        and "torchrun" not in " ".join(process.info["cmdline"])
        and process.environ().get("SLURMD_NODENAME") == node
    ]
