"""What the tasks of slurm/build_store.sh do, with stand-ins for SLURM's commands; the real ones:
tests/soak/slurm/test_build_store.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = {
    "srun": 'echo "srun $*" >> "$NOTES"',
    "sbatch": 'echo "sbatch $*" >> "$NOTES"',
    # The comments of the user's jobs, or the time limit of this one.
    "squeue": 'case "$*" in *format=%k*) echo "$COMMENTS" ;; *) echo 12:00:00 ;; esac',
    "scontrol": "exit 0",
}
ASKED = ("--out", "store", "--vocabulary", "v.json", "a.h5ad")


class Task:
    """Task 5 of an array 5-8."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "notes"
        for name, text in STAND_INS.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "COMMENTS": "",
            "GENEFORMER_VENV": str(folder / "no_venv"),
            "SLURM_JOB_ID": "80",
            "SLURM_JOB_NAME": "build_store",
            "SLURM_JOB_PARTITION": "low",
            "SLURM_JOB_CPUS_PER_NODE": "16",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_NNODES": "1",
            "SLURM_ARRAY_JOB_ID": "77",
            "SLURM_ARRAY_TASK_ID": "5",
            "SLURM_ARRAY_TASK_MIN": "5",
            "SLURM_ARRAY_TASK_MAX": "8",
            "SLURM_ARRAY_TASK_COUNT": "4",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "slurm/build_store.sh", *arguments],
            env={**self.environment, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def submitted(self) -> list[str]:
        return [line for line in self.noted() if line.startswith("sbatch ")]

    def built(self) -> str:
        """The end of the only command on a node."""
        (line,) = (line for line in self.noted() if line.startswith("srun "))
        return line.partition("python data_prep/build_store.py ")[2]

    def noted(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)


def test_the_first_task_does_its_part_and_submits_the_last_job(task: Task) -> None:
    ended = task.start(*ASKED)
    assert ended.returncode == 0, ended.stderr
    assert task.built() == f"{' '.join(ASKED)} --part 0/4 --workers 3"
    (line,) = task.submitted()
    assert line.startswith("sbatch --dependency=afterany:77 --array=0 --job-name=build_store ")
    assert "--comment=77 --time=12:00:00 --cpus-per-task=3 " in line
    assert line.endswith(f"slurm/build_store.sh --put-together {' '.join(ASKED)}")


def test_it_is_submitted_once(task: Task) -> None:
    assert task.start(*ASKED, COMMENTS="77").returncode == 0
    assert task.start(*ASKED, SLURM_ARRAY_TASK_ID="7").returncode == 0
    assert task.submitted() == []
    assert "--part 2/4" in task.noted()[-1]


def test_the_last_job_does_all_that_is_left(task: Task) -> None:
    assert task.start("--put-together", *ASKED).returncode == 0
    assert task.built() == f"{' '.join(ASKED)} --workers 3"
    assert task.submitted() == []


def test_what_makes_no_sense_is_refused(task: Task) -> None:
    without = task.start("--out", "store", "a.h5ad")
    assert (without.returncode, task.noted()) == (2, [])
    assert "parts of a store need --vocabulary" in without.stderr
    torn = task.start(*ASKED, SLURM_ARRAY_TASK_COUNT="3")
    assert (torn.returncode, task.noted()) == (2, [])
    assert "--array must be whole, such as 0-31: it has 3 tasks from 5 to 8" in torn.stderr
