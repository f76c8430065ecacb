"""What a job's script decides, with stand-ins for SLURM's commands; the real: test_slurm.py."""

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

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/bin/bash
# Of every command that is to run on nodes: noted, and answered as the test has it.
echo "srun $*" >> "$NOTES"
if [[ -n $HOLD && "$*" == *"$HOLD"* ]]; then
    told=
    trap 'told=yes; echo told >> "$NOTES"' USR1
    touch "$RUN/held"
    until [[ -n $told || -f $RUN/released ]]; do /bin/sleep 0.05; done
    [[ -z $told || "$*" == *pretrain.py* ]] || exit 1
fi
case "$*" in
    *--dry-run*)
        ((SETTINGS_CODE == 0)) || echo 'error: a wrong setting' >&2
        echo "# run folder: $RUN"
        exit "$SETTINGS_CODE" ;;
    *launch/preflight.py*) exit "$PREFLIGHT_CODE" ;;
    *launch/pretrain.py*)
        [[ -z $OUTCOME ]] || cp "$OUTCOME" "$RUN/outcome.json"
        exit 1 ;;
    *' true') exit "$NODES_CODE" ;;
esac
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$NOTES"
case "$1 $2" in
    'show hostnames') printf 'n1\\nn2\\n' ;;
    'show job') echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=$PREEMPTED" ;;
    'requeue 4711') exit "${REQUEUE_CODE:-0}" ;;
    'show node') echo "   NodeAddr=10.0.0.1 NodeHostName=$3 Version=22.05" ;;
    'show config') echo 'SlurmdTimeout           = 0 sec' ;;
esac
"""
SQUEUE = '#!/bin/bash\necho "$REASON"\n'
SLEEP = "#!/bin/bash\n"


class Script:
    """slurm/pretrain_106m.sh on two nodes of two GPUs that are not there."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.run.mkdir()
        self.notes = folder / "notes"
        programs = folder / "bin"
        programs.mkdir()
        stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE, "sleep": SLEEP}
        for name, text in stand_ins.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "RUN": str(self.run),
            "GENEFORMER_VENV": str(folder / "no_venv"),
            "OUTCOME": "",
            "HOLD": "",
            "SETTINGS_CODE": "0",
            "PREFLIGHT_CODE": "0",
            "NODES_CODE": "0",
            "REASON": "None",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_PER_NODE": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_CPUS_PER_NODE": "16(x3),12,16",
            "PREEMPTED": "None",
        }

    def ends(self, code: int, reason: str, restart: int = 0) -> None:
        """The run will write this outcome."""
        path = self.run.with_name("outcome")
        names = {0: "finished", 1: "failed", 2: "refused", 75: "interrupted"}
        found = {"outcome": names[code], "exit_code": code, "step": 40, "reason": reason}
        path.write_text(json.dumps({**found, "restart": restart}, indent=1) + "\n")
        self.environment["OUTCOME"] = str(path)

    def start(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Its exit code, and what it printed."""
        return subprocess.run(
            ["bash", "slurm/pretrain_106m.sh", *arguments],
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @contextmanager
    def held(self, stage: str, **environment: str) -> Iterator[subprocess.Popen]:
        """The script, in the midst of the command on nodes that has `stage` in it."""
        started = subprocess.Popen(
            ["bash", "slurm/pretrain_106m.sh"],
            env={**self.environment, "HOLD": stage, **environment},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
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

    @property
    def noted(self) -> str:
        """The commands that were given to SLURM."""
        return self.notes.read_text()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_its_code_is_that_of_the_run(script: Script, code: int, is_requeued: bool) -> None:
    script.ends(code, "some reason, with a comma")
    ended = script.start("train.steps=5", "run.dir=a folder")
    assert ended.returncode == code, ended.stderr
    assert ("scontrol requeue 4711" in script.noted) == is_requeued
    names = {0: "finished", 1: "failed", 2: "refused", 75: "interrupted"}
    assert f"ended at step 40 as {names[code]} (some reason, with a comma)" in ended.stdout


def test_what_it_starts(script: Script) -> None:
    script.ends(0, "done")
    script.start("run.dir=a folder", GENEFORMER_CACHE_DIR="/scratch")
    check, copy, preflight, pretrain = (
        line for line in script.noted.splitlines() if line.startswith("srun")
    )
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
    assert "--container" not in script.noted


def test_in_a_container(script: Script) -> None:
    script.ends(0, "done")
    mounts = f"{ROOT}:{ROOT},/data:/data"
    script.start(GENEFORMER_IMAGE="/shared/g.sqsh", GENEFORMER_MOUNTS=mounts)
    on_nodes = [line for line in script.noted.splitlines() if "on_node.sh" in line]
    assert len(on_nodes) == 3
    options = f"--container-image=/shared/g.sqsh --container-workdir={ROOT} "
    assert all(f"{options}--container-mounts={mounts} slurm/on_node.sh" in s for s in on_nodes)


def test_on_one_node_nothing_listens_to_others(script: Script) -> None:
    script.ends(0, "done")
    script.start(SLURM_NNODES="1")
    assert "--nnodes=1 --nproc-per-node=2 " in script.noted
    assert "--rdzv-backend=loopback launch/pretrain.py" in script.noted
    assert "master" not in script.noted


@pytest.mark.parametrize(
    ("asked", "there", "ranks"),
    [
        ("4", "8", 4),
        ("a100:8", "8", 8),
        ("gpu:a100:8", "10", 8),
        ("8", "4", 4),
        ("", "3", 3),
        ("0", "", 1),
        ("", "", 1),
    ],
)
def test_ranks_of_a_node_are_its_gpus(script: Script, asked: str, there: str, ranks: int) -> None:
    script.ends(0, "done")
    script.start(SLURM_GPUS_PER_NODE=asked, SLURM_GPUS_ON_NODE=there)
    assert f"--nproc-per-node={ranks} " in script.noted


def test_without_gpus_there_is_one_rank_and_no_complaint(script: Script) -> None:
    for name in ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        del script.environment[name]
    script.ends(0, "done")
    ended = script.start()
    assert "--nproc-per-node=1 " in script.noted
    assert ended.stderr == ""


def test_a_wrong_setting_is_told_before_anything_runs(script: Script) -> None:
    ended = script.start(SETTINGS_CODE="2")
    assert ended.returncode == 2
    assert "a wrong setting" in ended.stderr
    assert "torchrun" not in script.noted


def test_nodes_that_are_not_fit(script: Script) -> None:
    ended = script.start(PREFLIGHT_CODE="1")
    assert ended.returncode == 2
    assert "the nodes are not fit for this run" in ended.stderr
    assert "--master-port=24711 launch/pretrain.py" not in script.noted
    assert "requeue" not in script.noted
    assert script.start(PREFLIGHT_CODE="1", GENEFORMER_PREFLIGHT="no").returncode == 1


def test_an_outcome_of_the_start_before_is_not_taken_for_this_one(script: Script) -> None:
    script.ends(75, "stopped", restart=3)
    (script.run / "outcome.json").write_text(Path(script.environment["OUTCOME"]).read_text())
    ended = script.start(OUTCOME="")
    assert ended.returncode == 1
    assert f"the run in {script.run} did not begin" in ended.stderr
    assert "requeue" not in script.noted


def test_a_restart_says_why(script: Script) -> None:
    script.ends(75, "signal SIGUSR1; saved at step 40 of 90", restart=0)
    (script.run / "outcome.json").write_text(Path(script.environment["OUTCOME"]).read_text())
    script.ends(0, "done", restart=1)
    ended = script.start(SLURM_RESTART_COUNT="1")
    assert (
        "restart 1 of job 4711: the start before ended at step 40 as interrupted "
        "(signal SIGUSR1; saved at step 40 of 90)" in ended.stdout
    )


def test_restarts_are_bounded(script: Script) -> None:
    script.ends(75, "stopped", restart=1)
    ended = script.start(SLURM_RESTART_COUNT="2", GENEFORMER_MAX_RESTARTS="2")
    assert ended.returncode == 75
    assert "not started again: GENEFORMER_MAX_RESTARTS is 2" in ended.stdout
    ended = script.start(SLURM_RESTART_COUNT="3", GENEFORMER_MAX_RESTARTS="2")
    assert ended.returncode == 1
    assert "GENEFORMER_MAX_RESTARTS allows 2" in ended.stderr
    assert "requeue" not in script.noted


def test_a_lost_node_is_waited_for_and_the_job_requeued(script: Script) -> None:
    script.ends(1, "rank 1 of 2 is lost")
    ended = script.start(NODES_CODE="1")
    assert ended.returncode == 75
    assert "a node does not answer: waiting for SLURM" in ended.stdout
    assert "scontrol requeue 4711" in script.noted


@pytest.mark.parametrize("stage", ["SETTINGS_CODE", "PREFLIGHT_CODE", "", "lost"])
def test_preempted_before_it_trains(script: Script, stage: str) -> None:
    """Of which SLURM tells its steps alone."""
    now = {"PREEMPTED": "2026-01-01T00:00:00"}
    if stage == "lost":
        script.ends(1, "rank 0 is lost")
        ended = script.start(**now)
    else:
        ended = script.start(**now, **({stage: "143"} if stage else {}))
    assert ended.returncode == 75
    assert "scontrol requeue 4711" in script.noted


def test_a_second_signal_is_not_handed_on(script: Script) -> None:
    script.ends(75, "signal")
    with script.held("launch/pretrain.py --config") as started:
        for _ in range(3):
            started.send_signal(signal.SIGUSR1)
            time.sleep(0.02)
        assert started.wait(30) == 75
    assert script.noted.count("told") == 1


def test_a_start_that_makes_no_step_before_its_signal_is_the_last(script: Script) -> None:
    script.ends(75, "signal", restart=1)
    (script.run / "outcome.json").write_text(Path(script.environment["OUTCOME"]).read_text())
    script.ends(75, "signal", restart=2)
    held = {"SLURM_RESTART_COUNT": "1"}
    with script.held("launch/pretrain.py --config", **held) as started:
        started.send_signal(signal.SIGUSR1)
        assert started.wait(30) == 75
    assert "requeue" not in script.noted


def test_slurm_is_asked_again_when_it_does_not_answer(script: Script) -> None:
    script.ends(75, "stopped")
    ended = script.start(REQUEUE_CODE="1")
    assert ended.returncode == 75
    assert script.noted.count("scontrol requeue 4711") == 7
    assert "SLURM does not take the requeue" in ended.stderr


def test_a_run_folder_that_is_elsewhere_in_the_container(script: Script) -> None:
    ended = script.start(GENEFORMER_IMAGE="/shared/g.sqsh", RUN="/not/here/run")
    assert ended.returncode == 2
    assert "run.dir must have the same path in the container and here" in ended.stderr


@pytest.mark.parametrize(
    ("number", "hold", "reason", "is_requeued", "is_handed_on"),
    [
        (signal.SIGUSR1, "launch/pretrain.py --config", "None", True, True),
        (signal.SIGUSR1, "launch/preflight.py", "None", True, True),
        # In a command whose output is taken: the script hears of it when that has ended.
        (signal.SIGUSR1, "--dry-run", "None", True, False),
        # SLURM tells the ranks by itself, and torchrun would die of a second signal.
        (signal.SIGTERM, "launch/pretrain.py --config", "TimeLimit", True, False),
        (signal.SIGTERM, "launch/pretrain.py --config", "None", False, False),
        (signal.SIGTERM, "launch/preflight.py", "None", False, False),
        (signal.SIGTERM, "launch/preflight.py", "TimeLimit", True, False),
    ],
)
def test_signals(
    number: signal.Signals,
    hold: str,
    reason: str,
    is_requeued: bool,
    is_handed_on: bool,
    script: Script,
) -> None:
    script.ends(75, "signal; saved at step 40 of 90")
    with script.held(hold, REASON=reason) as started:
        started.send_signal(number)
        if not is_handed_on:
            time.sleep(0.3)
            (script.run / "released").touch()
        assert started.wait(30) == 75
    assert ("scontrol requeue 4711" in script.noted) == is_requeued
    assert ("told" in script.noted) == is_handed_on
    assert ("launch/pretrain.py --config" in script.noted) == ("pretrain" in hold)


@pytest.mark.parametrize("name", ["evaluate", "embed"])
def test_what_comes_after_pretraining(script: Script, name: str) -> None:
    ended = subprocess.run(
        ["bash", f"slurm/{name}.sh", "--checkpoint", "a run"],
        env=script.environment,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0
    (started,) = (line for line in script.noted.splitlines() if line.startswith("srun"))
    assert "slurm/on_node.sh torchrun --nnodes=2 --nproc-per-node=2 " in started
    assert started.endswith(f"launch/{name}.py --checkpoint a run")


def test_elsewhere_than_in_the_project(tmp_path: Path) -> None:
    ended = subprocess.run(
        ["bash", str(ROOT / "slurm" / "pretrain_10m.sh")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "submit this script from the project's folder" in ended.stderr
