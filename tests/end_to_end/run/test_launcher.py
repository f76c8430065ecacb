"""torchrun or its ranks are killed, asked to stop or stopped, in every phase: no rank stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from geneformer_mcore.distributed import guard
from tests.end_to_end import forked
from tests.end_to_end.phases import PLACES
from tests.support.commands import ROOT
from tests.support.marks import soak

KILL, TERM, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
STEPS = 4
SETTINGS = (
    *forked.SETTINGS,
    f"train.steps={STEPS}",
    "train.validate_every_steps=2",
    "train.validate_batches=2",
    "checkpoint.save_every_steps=2",
)
SCRIPT = """
import os, sys
from tests.end_to_end.phases import held
held({phase!r}, {note!r}, int(os.environ["RANK"]))
import launch.pretrain
sys.exit(launch.pretrain.main())
"""


@contextmanager
def torchrun(
    phase: str, store: Path, tmp_path: Path, timeout_s: float = 300
) -> Iterator[psutil.Process]:
    """A torchrun of two ranks that have come to `phase`."""
    script, note, printed = tmp_path / "held.py", tmp_path / "note", tmp_path / "printed"
    script.write_text(SCRIPT.format(phase=phase, note=str(note)))
    words = ("--standalone", "--max-restarts=0", "--nproc_per_node=2", "--shutdown-timeout=300")
    settings = (*SETTINGS, f"data.store={store}", f"run.dir={tmp_path / 'run'}")
    limits = (f"parallel.timeout_s={timeout_s}", f"checkpoint.deadline_s={timeout_s}")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with printed.open("w") as file:
        started = subprocess.Popen(
            [*command, str(script), *settings, *limits], cwd=ROOT, env=environment,
            stdout=file, stderr=file,
        )  # fmt: skip
    ranks: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 300
        while not all(Path(f"{note}_{rank}").exists() for rank in range(2)):
            assert started.poll() is None, printed.read_text()
            assert time.monotonic() < deadline, printed.read_text()
            time.sleep(0.05)
        process = psutil.Process(started.pid)
        ranks = process.children(recursive=True)
        yield process
    finally:
        for each in ranks:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        started.kill()
        started.wait()


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """The ranks, rank 0 first."""
    ranks = [each for each in process.children() if "held.py" in " ".join(each.cmdline())]
    return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


def are_alive(processes: list[psutil.Process]) -> bool:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


WHOM = ("torchrun", "one rank", "all ranks")
IN_SHORT = {
    ("import", "torchrun", KILL),
    ("opening", "all ranks", STOP),
    ("rendezvous", "torchrun", KILL),
    ("first step", "torchrun", STOP),
    ("validation", "torchrun", KILL),
    ("saving", "one rank", KILL),
    ("ending", "torchrun", TERM),
    ("rendezvous", "one rank", TERM),
}
CASES = [
    (phase, whom, number) if (phase, whom, number) in IN_SHORT else soak(phase, whom, number)
    for phase in PLACES
    for whom in WHOM
    for number in (KILL, TERM, STOP)
]


@pytest.mark.parametrize(("phase", "whom", "number"), CASES)
def test_no_rank_stays_and_the_next_start_goes_on(
    phase: str, whom: str, number: signal.Signals, store: Path, tmp_path: Path, slack_s: float
) -> None:
    # Nothing is late by itself on a busy machine, as by slack_s.
    timeout_s = 300 if number != STOP else 10 if slack_s == 10 else 30
    with torchrun(phase, store, tmp_path, timeout_s) as launcher:
        ranks = ranks_of(launcher)
        everybody = launcher.children(recursive=True)
        for each in {"torchrun": [launcher], "one rank": ranks[1:], "all ranks": ranks}[whom]:
            each.send_signal(number)
        limit_s = slack_s + (timeout_s if number == STOP else 5)
        began = time.monotonic()
        while are_alive(everybody):
            assert time.monotonic() - began < limit_s, (tmp_path / "printed").read_text()
            time.sleep(0.05)
        print(f"{phase}, {whom}, {number.name}: {time.monotonic() - began:.1f} s")
    assert_outcome(tmp_path)
    run = tmp_path / "run"
    again = forked.Run(run, (*SETTINGS, f"data.store={store}"))
    saved = again.newest()
    again.check(ranks=2)
    assert again.newest() == STEPS >= saved


def assert_outcome(tmp_path: Path) -> None:
    """It is whole JSON, and nobody has seen a traceback but that of torchrun."""
    path = tmp_path / "run" / "outcome.json"
    if path.exists():
        assert json.loads(path.read_text())["exit_code"] in (0, 1, 75)


def test_a_refusal_of_one_rank_ends_the_other_at_once(
    store: Path, tmp_path: Path, slack_s: float
) -> None:
    """Rank 0 finds the folder locked, and rank 1 waits for it in the rendezvous."""
    with torchrun("first step", store, tmp_path) as first:
        (holder, _) = ranks_of(first)
        words = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone")
        began = time.monotonic()
        ended = subprocess.run(
            [*words, "--nproc_per_node=2", "--shutdown-timeout=300", "launch/pretrain.py",
             *SETTINGS, f"data.store={store}", f"run.dir={tmp_path / 'run'}"],
            cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert time.monotonic() - began < 60 + slack_s
    assert ended.returncode == 1  # torchrun's
    assert f"is still going: process {holder.pid} on {os.uname().nodename}, started" in ended.stderr
    assert "which is alive" in ended.stderr


FOLLOWED = """
import os, sys, time
from geneformer_mcore.distributed import launcher
launcher.follow(300.0)
print("followed", flush=True)
time.sleep(600)
"""


def test_other_commands_end_with_torchrun_too(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    with subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", FOLLOWED],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"},
    ) as started:  # fmt: skip
        assert started.stdout is not None
        assert started.stdout.readline() == "followed\n"
        started.kill()
        assert "has ended, and its ranks end with it" in started.communicate(timeout=120)[1]


def test_the_guard_leaves_alone_what_ctrl_z_has_stopped(tmp_path: Path) -> None:
    """Then rank and launcher are stopped; and it ends with the rank."""
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    rank_code = (
        "import os, subprocess, sys, time\n"
        "from geneformer_mcore.distributed.launcher import Launcher\n"
        "launcher = Launcher(); launcher.guard(2.0); print(launcher._guard.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", rank_code],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "x"},
    ) as started:  # fmt: skip
        assert started.stdout is not None
        guarding = psutil.Process(int(started.stdout.readline()))
        launcher = psutil.Process(started.pid)
        (rank,) = launcher.children()
        rank.suspend()
        launcher.suspend()
        with pytest.raises(psutil.TimeoutExpired):
            rank.wait(6)
        assert guard.is_stopped(rank.pid)
        launcher.resume()
        guarding.wait(120)
        launcher.wait(120)
