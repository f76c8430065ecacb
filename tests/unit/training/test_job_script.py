"""Decisions of the job scripts of slurm/, with stand-ins for SLURM's commands; the real ones:
tests/end_to_end/run/test_slurm.py and tests/soak/slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Of every command that is to run on nodes: noted, and answered as the test has it.
SRUN = """
echo "srun $*" >> "$NOTES"
if [[ -n $HOLD && "$*" == *"$HOLD"* ]]; then
    signalled=
    trap 'signalled=yes; echo signalled >> "$NOTES"' USR1
    touch "$RUN/held"
    until [[ -n $signalled || -f $RUN/released ]]; do /bin/sleep 0.05; done
    [[ -z $signalled || "$*" == *pretrain.py* ]] || exit 1
fi
case "$*" in
    *--dry-run*)
        ((SETTINGS_CODE == 0)) || echo 'error: a wrong setting' >&2
        echo "# run folder: $RUN"
        exit "$SETTINGS_CODE" ;;
    *launch/preflight.py*) exit "$PREFLIGHT_CODE" ;;
    *launch/pretrain.py*) [[ -z $OUTCOME ]] || cp "$OUTCOME" "$RUN/outcome.json"; exit 1 ;;
    *' true') exit "$NODES_CODE" ;;
esac
"""
SCONTROL = """
echo "scontrol $*" >> "$NOTES"
case "$1 $2" in
    'show hostnames') printf 'n1\\nn2\\n' ;;
    'show job') echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=$PREEMPTED" ;;
    'requeue 4711') exit "${REQUEUE_CODE:-0}" ;;
    'show node') echo "   NodeAddr=10.0.0.1 NodeHostName=$3 Version=22.05" ;;
    'show config') echo 'SlurmdTimeout           = 0 sec' ;;
esac
"""
# The comments of the user's jobs, the time limit of this one, or why it is signalled.
SQUEUE = """
case "$*" in *format=%k*) echo "$COMMENTS" ;; *%r*) echo "$REASON" ;; *) echo 12:00:00 ;; esac
"""
SBATCH = '\necho "sbatch $*" >> "$NOTES"\n'
STAND_INS = {
    "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "sbatch": SBATCH, "sleep": "\n"
}  # fmt: skip
ON_TWO_NODES = """
SLURM_JOB_ID=4711 SLURM_JOB_NODELIST=n[1-2] SLURM_NNODES=2
SLURM_GPUS_PER_NODE=2 SLURM_GPUS_ON_NODE=8 SLURM_JOB_CPUS_PER_NODE=16(x3),12,16
"""
TASK_5_OF_5_TO_8 = """
SLURM_JOB_ID=80 SLURM_JOB_NAME=build_store SLURM_JOB_PARTITION=low SLURM_NNODES=1
SLURM_JOB_CPUS_PER_NODE=16 SLURM_CPUS_PER_TASK=3
SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=5 SLURM_ARRAY_TASK_COUNT=4
SLURM_ARRAY_TASK_MIN=5 SLURM_ARRAY_TASK_MAX=8
"""
PREEMPTED = {"PREEMPTED": "2026-01-01T00:00:00"}
ELSEWHERE = {"GENEFORMER_IMAGE": "/shared/g.sqsh", "RUN": "/not/here/run"}
OUTCOMES = {0: "finished", 1: "failed", 2: "refused", 75: "interrupted"}
REQUEUE = "scontrol requeue 4711"
TRAINING = "launch/pretrain.py --config"


class Job:
    """A script as SLURM runs it; its run ends with exit code 0 unless set otherwise."""

    def __init__(self, folder: Path, script: str, slurm: str) -> None:
        self.script = script
        self.run, self.outcome, self.notes = (folder / name for name in ("run", "end", "notes"))
        self.run.mkdir()
        self.notes.touch()
        programs = folder / "bin"
        programs.mkdir()
        for name, text in STAND_INS.items():
            (programs / name).write_text(f"#!/bin/bash{text}")
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "RUN": str(self.run),
            "GENEFORMER_VENV": str(folder / "no_venv"),
            "OUTCOME": str(self.outcome),
            **dict.fromkeys(("HOLD", "COMMENTS"), ""),
            **dict.fromkeys(("SETTINGS_CODE", "PREFLIGHT_CODE", "NODES_CODE"), "0"),
            **dict.fromkeys(("REASON", "PREEMPTED"), "None"),
            **dict(variable.split("=") for variable in slurm.split()),
        }
        self.ends(0, "done")

    def ends(self, code: int, reason: str = "", restart: int = 0, before: bool = False) -> None:
        """The run will write this outcome; before: the start before this one has written it."""
        found = {"outcome": OUTCOMES[code], "exit_code": code, "step": 40, "reason": reason}
        path = self.run / "outcome.json" if before else self.outcome
        path.write_text(json.dumps({**found, "restart": restart}, indent=1) + "\n")

    def start(
        self, *arguments: str, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command, env = ["bash", self.script, *arguments], {**self.environment, **environment}
        return subprocess.run(
            command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )

    @contextmanager
    def held(self, stage: str, **environment: str) -> Iterator[subprocess.Popen]:
        """The script, in the midst of the command on nodes that has `stage` in it."""
        env = {**self.environment, "HOLD": stage, **environment}
        started = subprocess.Popen(
            ["bash", self.script], env=env, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 20
            while not (self.run / "held").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            yield started
        finally:
            started.kill()
            started.wait()
            (self.run / "released").touch()

    def noted(self) -> str:
        """The commands that were given to SLURM."""
        return self.notes.read_text()

    def commands(self, program: str = "srun") -> list[str]:
        return [line for line in self.noted().splitlines() if line.startswith(f"{program} ")]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, "slurm/pretrain_106m.sh", ON_TWO_NODES)


@pytest.mark.parametrize(
    ("end", "environment", "code", "printed", "num_requeues"),
    [
        ((0, "all, done"), {}, 0, "ended at step 40 as finished (all, done)", 0),
        ((1, "some reason"), {}, 1, "ended at step 40 as failed (some reason)", 0),
        ((2, "some reason"), {}, 2, "ended at step 40 as refused (some reason)", 0),
        ((75, "some reason"), {}, 75, "ended at step 40 as interrupted (some reason)", 1),
        ((1, "rank 1 is lost"), {"NODES_CODE": "1"}, 75, "a node does not answer: waiting for", 1),
        # SLURM informs its steps alone that it preempts a job: before the training and in it.
        ((1, ""), PREEMPTED | {"SETTINGS_CODE": "143"}, 75, "", 1),
        ((1, ""), PREEMPTED | {"PREFLIGHT_CODE": "143"}, 75, "", 1),
        ((1, ""), PREEMPTED | {"OUTCOME": ""}, 75, "", 1),
        ((1, "rank 0 is lost"), PREEMPTED, 75, "", 1),
        # SLURM is asked again when it does not answer.
        ((75, ""), {"REQUEUE_CODE": "1"}, 75, "SLURM does not take the requeue", 7),
    ],
)
def test_its_code_is_that_of_the_run(
    job: Job, end: tuple, environment: dict[str, str], code: int, printed: str, num_requeues: int
) -> None:
    job.ends(*end)
    ended = job.start("train.steps=5", "run.dir=a folder", **environment)
    assert ended.returncode == code, ended.stderr
    assert job.noted().count(REQUEUE) == num_requeues
    assert printed in ended.stdout + ended.stderr


def test_the_commands_on_nodes(job: Job) -> None:
    job.start("run.dir=a folder", GENEFORMER_CACHE_DIR="/scratch")
    check, copy, preflight, pretrain = job.commands()
    arguments = "--config configs/geneformer_106m.yaml data.cache_dir=/scratch run.dir=a folder"
    assert check.endswith(f"python launch/pretrain.py --dry-run {arguments}")
    assert "--nodes=1 --ntasks=1 " in check
    assert copy.endswith(f"slurm/on_node.sh python launch/cache_store.py {arguments}")
    torchrun = (
        "slurm/on_node.sh torchrun --nnodes=2 --nproc-per-node=2 --max-restarts=0 "
        "--shutdown-timeout=600 "
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "
        "--rdzv-backend=static --master-addr=10.0.0.1 --master-port=24711 "
    )
    assert preflight.endswith(f"{torchrun}launch/preflight.py {arguments}")
    assert pretrain.endswith(f"{torchrun}launch/pretrain.py {arguments}")
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --mem=0 --wait=660 " in pretrain
    assert "--wait=60 " in preflight
    # The cores of the smallest node.
    assert "--cpus-per-task=12 " in pretrain
    assert "--container" not in job.noted()


def test_in_a_container(job: Job) -> None:
    mounts = f"{ROOT}:{ROOT},/data:/data"
    job.start(GENEFORMER_IMAGE="/shared/g.sqsh", GENEFORMER_MOUNTS=mounts)
    options = f"--container-image=/shared/g.sqsh --container-workdir={ROOT} "
    options += f"--container-mounts={mounts} slurm/on_node.sh"
    assert [options in line for line in job.commands() if "on_node.sh" in line] == [True] * 3


@pytest.mark.parametrize(
    ("per_node", "on_node", "ranks"),
    [("4", "8", 4), ("a100:8", "8", 8), ("gpu:a100:8", "10", 8), ("8", "4", 4), ("", "3", 3),
     ("0", "", 1), ("", "", 1), (None, None, 1)],
)  # fmt: skip
def test_ranks_of_a_node_are_its_gpus(
    job: Job, per_node: str | None, on_node: str | None, ranks: int
) -> None:
    """And on one node nothing listens to others."""
    given = {"SLURM_GPUS_PER_NODE": per_node, "SLURM_GPUS_ON_NODE": on_node}
    environment = {**job.environment, **given}
    job.environment = {name: value for name, value in environment.items() if value is not None}
    assert job.start(SLURM_NNODES="1").stderr == ""
    assert f"--nnodes=1 --nproc-per-node={ranks} " in job.noted()
    assert "--rdzv-backend=loopback launch/pretrain.py" in job.noted()
    assert "master" not in job.noted()


@pytest.mark.parametrize(
    ("environment", "code", "error", "last"),
    [
        ({"SETTINGS_CODE": "2"}, 2, "a wrong setting", "--dry-run"),
        (ELSEWHERE, 2, "run.dir must have the same path in the container and here", "--dry-run"),
        ({"PREFLIGHT_CODE": "1"}, 2, "the nodes are not fit for this run", "launch/preflight.py"),
        ({"PREFLIGHT_CODE": "1", "GENEFORMER_PREFLIGHT": "no"}, 0, "", TRAINING),
        ({"OUTCOME": ""}, 1, "the run in {run} did not begin", TRAINING),
    ],
)
def test_a_start_that_fails_is_not_requeued(
    job: Job, environment: dict[str, str], code: int, error: str, last: str
) -> None:
    """The outcome of the start before is not taken for its own."""
    job.ends(75, restart=3, before=True)
    ended = job.start(**environment)
    assert ended.returncode == code
    assert error.format(run=job.run) in ended.stderr
    assert last in [line for line in job.commands() if not line.endswith(" true")][-1]
    assert "requeue" not in job.noted()


def test_a_restart_gives_its_reason(job: Job) -> None:
    job.ends(75, "signal SIGUSR1; saved at step 40 of 90", before=True)
    job.ends(0, restart=1)
    assert (
        "restart 1 of job 4711: the start before ended at step 40 as interrupted "
        "(signal SIGUSR1; saved at step 40 of 90)" in job.start(SLURM_RESTART_COUNT="1").stdout
    )


def test_restarts_are_bounded(job: Job) -> None:
    job.ends(75, restart=1)
    ended = job.start(SLURM_RESTART_COUNT="2", GENEFORMER_MAX_RESTARTS="2")
    assert ended.returncode == 75
    assert "not started again: GENEFORMER_MAX_RESTARTS is 2" in ended.stdout
    ended = job.start(SLURM_RESTART_COUNT="3", GENEFORMER_MAX_RESTARTS="2")
    assert ended.returncode == 1
    assert "GENEFORMER_MAX_RESTARTS allows 2" in ended.stderr
    assert "requeue" not in job.noted()


@pytest.mark.parametrize(
    ("number", "hold", "reason", "is_requeued", "is_handed_on"),
    [
        (signal.SIGUSR1, TRAINING, "None", True, True),
        (signal.SIGUSR1, "launch/preflight.py", "None", True, True),
        # In a command whose output is taken: the script hears of it when that has ended.
        (signal.SIGUSR1, "--dry-run", "None", True, False),
        # SLURM signals the ranks by itself, and torchrun would die of a second signal.
        (signal.SIGTERM, TRAINING, "TimeLimit", True, False),
        (signal.SIGTERM, TRAINING, "None", False, False),
        (signal.SIGTERM, "launch/preflight.py", "None", False, False),
        (signal.SIGTERM, "launch/preflight.py", "TimeLimit", True, False),
    ],
)
def test_signals(
    job: Job, number: signal.Signals, hold: str, reason: str, is_requeued: bool, is_handed_on: bool
) -> None:
    job.ends(75)
    with job.held(hold, REASON=reason) as started:
        started.send_signal(number)
        if not is_handed_on:
            time.sleep(0.3)
            (job.run / "released").touch()
        assert started.wait(30) == 75
    assert (REQUEUE in job.noted()) == is_requeued
    assert ("signalled" in job.noted()) == is_handed_on
    assert (TRAINING in job.noted()) == ("pretrain" in hold)


def test_a_second_signal_is_not_handed_on(job: Job) -> None:
    """And a start that makes no step before its signal is the last."""
    job.ends(75, restart=1, before=True)
    job.ends(75, restart=2)
    with job.held(TRAINING, SLURM_RESTART_COUNT="1") as started:
        for _ in range(3):
            started.send_signal(signal.SIGUSR1)
            time.sleep(0.02)
        assert started.wait(30) == 75
    assert job.noted().count("signalled") == 1
    assert "requeue" not in job.noted()


@pytest.mark.parametrize("name", ["evaluate", "embed"])
def test_commands_after_pretraining(job: Job, name: str) -> None:
    job.script = f"slurm/{name}.sh"
    assert job.start("--checkpoint", "a run").returncode == 0
    (started,) = job.commands()
    assert "slurm/on_node.sh torchrun --nnodes=2 --nproc-per-node=2 " in started
    assert started.endswith(f"launch/{name}.py --checkpoint a run")


def test_elsewhere_than_in_the_project(job: Job, tmp_path: Path) -> None:
    job.script = str(ROOT / "slurm" / "pretrain_10m.sh")
    ended = job.start(cwd=tmp_path)
    assert ended.returncode == 2
    assert "submit this script from the project's folder" in ended.stderr


# The tasks of an array that builds a store.
INPUTS = ("--out", "store", "--vocabulary", "v.json", "a.h5ad")


@pytest.fixture
def task(tmp_path: Path) -> Job:
    return Job(tmp_path, "slurm/build_store.sh", TASK_5_OF_5_TO_8)


@pytest.mark.parametrize(
    ("option", "environment", "part", "num_submitted"),
    [
        ((), {}, " --part 0/4", 1),
        ((), {"COMMENTS": "77"}, " --part 0/4", 0),
        ((), {"SLURM_ARRAY_TASK_ID": "7"}, " --part 2/4", 0),
        (("--put-together",), {}, "", 0),
    ],
    ids=["first", "first, requeued", "third", "last job"],
)
def test_a_task_does_its_part_and_the_first_submits_the_last_job_once(
    task: Job, option: tuple[str, ...], environment: dict[str, str], part: str, num_submitted: int
) -> None:
    ended = task.start(*option, *INPUTS, **environment)
    assert ended.returncode == 0, ended.stderr
    (line,) = task.commands()
    assert line.endswith(f"python data_prep/build_store.py {' '.join(INPUTS)}{part} --workers 3")
    submitted = task.commands("sbatch")
    assert len(submitted) == num_submitted
    for line in submitted:
        assert line.startswith("sbatch --dependency=afterany:77 --array=0 --job-name=build_store ")
        assert "--comment=77 --time=12:00:00 --cpus-per-task=3 " in line
        assert line.endswith(f"slurm/build_store.sh --put-together {' '.join(INPUTS)}")


@pytest.mark.parametrize(
    ("arguments", "tasks", "error"),
    [
        (("--out", "store", "a.h5ad"), "4", "parts of a store need --vocabulary"),
        (INPUTS, "3", "--array must be whole, such as 0-31: it has 3 tasks from 5 to 8"),
    ],
)
def test_an_impossible_array_is_refused(
    task: Job, arguments: tuple[str, ...], tasks: str, error: str
) -> None:
    refused = task.start(*arguments, SLURM_ARRAY_TASK_COUNT=tasks)
    assert (refused.returncode, task.commands(), task.commands("sbatch")) == (2, [], [])
    assert error in refused.stderr
