"""Events of a job on a cluster, and its recovery: the table of docs/cluster.md.

Every job runs the project's own script as it is, and ends with the weights of a job that nothing
disturbed, byte for byte. A soak (`make soak`, or pytest on this folder); a job that is signalled
once is in tests/end_to_end/run/test_slurm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.soak.slurm.cluster import Cluster
from tests.soak.slurm.conftest import Clean
from tests.soak.slurm.jobs import SLOW, Job, submit

pytestmark = pytest.mark.timeout(1800)
Submit = Callable[..., Job]


@pytest.fixture
def submitted(cluster: Cluster, store: Path, tmp_path: Path) -> Submit:
    """Submits a run of this test; again, it is the same run."""
    return partial(submit, cluster, tmp_path / "run", store)


def signal_usr1(job: Job) -> None:
    job.cluster.run("scancel", "--signal=USR1", "--batch", job.number)


def preempt(cluster: Cluster, sleep_s: int) -> str:
    """The number of a job that wants both nodes for itself."""
    urgent = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    return cluster.run("sbatch", "--parsable", *urgent, f"--wrap=sleep {sleep_s}").strip()


def run_to_end(job: Job, clean: Clean, reason: str) -> None:
    """It starts again once, for that reason, and finishes."""
    assert job.ended() == "COMPLETED", job.log
    assert job.restarts == 1, job.log
    (line,) = (each for each in job.lines() if each.startswith("restart "))
    assert line.startswith(f"restart 1 of job {job.number}: ")
    assert reason in line
    assert job.outcome()["exit_code"] == 0
    assert job.weights() == clean.job.weights()


def test_a_job_that_nothing_disturbs(clean: Clean) -> None:
    assert clean.job.state() == "COMPLETED"
    assert clean.job.shown("ExitCode") == "0:0"
    assert clean.job.restarts == 0
    log = clean.job.log
    assert "0 of 12 checks fail" in log, "no preflight, or not a good one"
    assert "2 rank(s) on cpu (tensor 1, pipeline 1" in log
    assert clean.job.lines()[-1].startswith("the run ended at step 120 as finished")
    assert clean.job.outcome()["outcome"] == "finished"


def test_the_tasks_of_srun_are_torchruns(clean: Clean, cluster: Cluster) -> None:
    for node in cluster.nodes:
        (task,) = clean.tasks[node]
        line = " ".join(task)
        assert task[1].endswith("/bin/torchrun"), line
        assert "--nnodes=2 --nproc-per-node=1 --max-restarts=0 --shutdown-timeout=600" in line
        assert "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in line
        assert "launch/pretrain.py --config configs/geneformer_106m.yaml" in line


def test_usr1_to_the_script(clean: Clean, submitted: Submit) -> None:
    job = submitted()
    job.at_step(20)
    signal_usr1(job)
    run_to_end(job, clean, "as interrupted (signal SIGUSR1; saved at step ")


def test_requeued(cluster: Cluster, clean: Clean, submitted: Submit) -> None:
    job = submitted()
    job.at_step(20)
    cluster.run("scontrol", "requeue", job.number)
    run_to_end(job, clean, "as interrupted (signal SIGTERM; saved at step ")


@pytest.mark.parametrize(
    ("options", "signal"),
    [
        # SLURM may send it up to a minute early.
        pytest.param(("--time=2", "--signal=B:USR1@60"), "SIGUSR1", id="a_signal_before"),
        pytest.param(("--time=1", "--signal=B:CONT@1"), "SIGTERM", id="no_signal_before"),
    ],
)
def test_the_time_is_up(
    options: tuple[str, ...], signal: str, clean: Clean, submitted: Submit
) -> None:
    """The ranks stand still until then: a limit has whole minutes, and they would be ready."""
    job = submitted("parallel.timeout_s=300", options=options)
    job.at_step(20)
    with standing_still():
        job.wait_until(lambda: "closing signal" in job.log)
    run_to_end(job, clean, f"as interrupted (signal {signal}; saved at step ")


def test_preempted(cluster: Cluster, clean: Clean, submitted: Submit) -> None:
    job = submitted(options=("--partition=low",))
    job.at_step(20)
    other = preempt(cluster, sleep_s=3)
    run_to_end(job, clean, "as interrupted (signal SIGTERM; saved at step ")
    assert "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", other)


def test_preempted_before_it_trains(cluster: Cluster, clean: Clean, submitted: Submit) -> None:
    """SLURM signals its steps alone, and they die of it."""
    job = submitted(options=("--partition=low",), preflight=True)
    job.wait_until(lambda: any(cluster.tasks(node) for node in cluster.nodes))
    preempt(cluster, sleep_s=1)
    assert job.ended() == "COMPLETED", job.log
    assert job.restarts == 1, job.log
    assert job.weights() == clean.job.weights()


def test_cancelled_is_saved_and_not_started_again(
    cluster: Cluster, clean: Clean, submitted: Submit
) -> None:
    job = submitted()
    job.at_step(20)
    cluster.run("scancel", job.number)
    assert job.ended() == "CANCELLED"
    assert job.outcome()["exit_code"] == 75
    assert job.restarts == 0
    completes(submitted(), clean)


def test_a_killed_rank_ends_the_job_which_is_not_started_again(
    clean: Clean, submitted: Submit
) -> None:
    job = submitted(*SLOW)
    job.at_step(45)
    ranks_of("n2")[0].kill()
    assert job.ended() == "FAILED"
    assert job.shown("ExitCode") == "1:0"
    assert job.restarts == 0
    assert "rank 1 of 2 is lost" in job.outcome()["reason"]
    completes(submitted(*SLOW), clean)


def test_a_node_loses_its_power(cluster: Cluster, clean: Clean, submitted: Submit) -> None:
    job = submitted(*SLOW)
    job.at_step(45)
    cluster.kill_node("n2")
    job.wait_until(lambda: job.restarts > 0)
    cluster.start_node("n2")
    run_to_end(job, clean, "as failed (rank 1 of 2 is lost")
    # Whichever comes first: the end of the peers, or SLURM's own judgement.
    waits = "a node does not answer: waiting for SLURM to start this job again"
    stopped = "stopped by SLURM, which starts this job again if it was requeued and not cancelled"
    assert {waits, stopped} & set(job.lines()), job.log
    assert "continues from" in job.log


def test_a_dead_slurmd(cluster: Cluster, clean: Clean, submitted: Submit) -> None:
    """The daemon alone: its children continue, until SLURM takes the node for lost."""
    job = submitted("parallel.timeout_s=300")
    job.at_step(20)
    with standing_still():
        cluster.kill_daemon("n2")
        job.wait_until(lambda: "closing signal" in job.log)
    job.wait_until(lambda: job.restarts > 0)
    cluster.start_node("n2")
    run_to_end(job, clean, "as interrupted (signal SIGTERM; saved at step ")


def test_on_one_node_nothing_listens_to_others(submitted: Submit) -> None:
    job = submitted(nodes=1)
    job.at_step(5)
    (rank,) = ranks_of("n1") + ranks_of("n2")
    launcher = rank.parent()
    assert launcher is not None
    connections = rank.net_connections() + launcher.net_connections()
    found = {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    assert job.ended() == "COMPLETED"
    assert found == {"127.0.0.1"}


def test_restarts_are_bounded(submitted: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENEFORMER_MAX_RESTARTS", "1")
    job = submitted("train.steps=2000")
    job.at_step(20)
    signal_usr1(job)
    job.wait_until(lambda: job.restarts == 1)
    job.at_step(40, restarts=1)
    signal_usr1(job)
    assert job.ended() == "FAILED"
    assert (job.shown("ExitCode"), job.restarts) == ("75:0", 1)
    first, last = (line for line in job.lines() if "started again: " in line)
    assert first.startswith("to be started again: signal SIGUSR1; saved at step ")
    assert last == "not started again: GENEFORMER_MAX_RESTARTS is 1"


def completes(again: Job, clean: Clean) -> None:
    """Submitted once more, it ends as if it had never stopped."""
    assert again.ended() == "COMPLETED", again.log
    assert "continues from" in again.log
    assert again.weights() == clean.job.weights()


@contextmanager
def standing_still() -> Iterator[None]:
    """No rank continues meanwhile; their launchers do."""
    ranks = ranks_of("n1") + ranks_of("n2")
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


def ranks_of(node: str) -> list[psutil.Process]:
    """Those of launch/pretrain.py on that node."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "launch/pretrain.py" in (process.info["cmdline"] or [])
        and "torchrun" not in " ".join(process.info["cmdline"])
        and process.environ().get("SLURMD_NODENAME") == node
    ]
