"""Training on two hosts, and how it ends when the network between them fails.

The hosts are network namespaces (tests/support/two_hosts.py). Ranks are forked onto them; in the
soak each host runs torchrun, as a user starts it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import forked
from tests.end_to_end.forked import outcome
from tests.end_to_end.run.test_pretrain import settings as settings_of
from tests.support.final_state import FinalState, final_state
from tests.support.two_hosts import ADDRESSES, LINK, PORT, Command, TwoHosts, two_hosts, wait_for

TIMEOUT_S = 8
TROUBLE_AT = 5
MEETING = f"{ADDRESSES[0]}, {PORT}"

SCRIPT = """
import sys, time
from pathlib import Path

import launch.pretrain as pretrain
from tests.end_to_end import forked

whole, watches = pretrain._train, []

def train(*arguments):
    watches.append(arguments[-1])
    return whole(*arguments)

def pause():
    watches[0]._limit_s = {limit_s}
    Path("reached").touch()
    while not Path("go").exists():
        time.sleep(0.01)

if __name__ == "__main__":
    pretrain._train = train
    forked.before("geneformer_mcore.training.trainer:_step", {step}, pause)
    sys.exit(pretrain.main())
"""
"""A run that waits before a step until it is told to go on: the network is cut there. Its
parallel.timeout_s holds from there on: on a busy machine two hosts may start further apart."""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> FinalState:
    """The final state of two ranks of one host."""
    run = tmp_path_factory.mktemp("runs") / "one_host"
    forked.check(run, settings_of(store), 2)
    return final_state(run)


class Job:
    """A run on two hosts that share the folder `folder`."""

    def __init__(self, hosts: TwoHosts, repository: Path, store: Path, folder: Path) -> None:
        self.run = folder / "run"
        self._hosts, self._repository, self._folder = hosts, repository, folder
        self._plain = repository / "launch" / "pretrain.py"
        self._settings = [f"run.dir={self.run}", *forked.SETTINGS, *settings_of(store)]
        self._paused = folder / "paused.py"
        self._paused.write_text(SCRIPT.format(step=TROUBLE_AT, limit_s=TIMEOUT_S))

    def start(self, host: int, paused: bool = False) -> Command:
        """One host's part; `paused`: both wait before step TROUBLE_AT."""
        script = self._paused if paused else self._plain
        return self.torchrun(host, [str(script), *self._settings])

    def torchrun(self, host: int, script: Sequence[str], *more: str) -> Command:
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=2"]
        command += [f"--node-rank={host}", "--nproc-per-node=1", "--max-restarts=0"]
        command += [f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"]
        command += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        command += ["--shutdown-timeout=120", *more, *script]
        environment = os.environ | {
            "PYTHONPATH": str(self._repository),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": LINK,
        }
        return self._hosts.run(host, ["env", "-C", str(self._folder), *command], environment)

    def start_and_pause(self) -> list[Command]:
        """Both hosts, when they have come to the step before which they wait."""
        both = [self.start(host, paused=True) for host in range(2)]
        wait_for(self._folder / "reached", 100, *both)
        return both

    def go(self) -> None:
        """Lets them make that step."""
        (self._folder / "go").touch()


@pytest.fixture
def job(hosts: TwoHosts, repository: Path, store: Path, tmp_path: Path) -> Job:
    return Job(hosts, repository, store, tmp_path)


def seconds_until_ended(both: Sequence[Command], limit_s: float) -> list[float]:
    """How long each takes from now on; fails with what was printed if that is too long."""
    began = time.monotonic()
    ended: dict[int, float] = {}
    while len(ended) < len(both):
        waited = time.monotonic() - began
        ended |= {n: waited for n, each in enumerate(both) if n not in ended and each.ended()}
        assert waited < limit_s, "\n".join([f"{ended}", *(each.printed for each in both)])
        time.sleep(0.05)
    return [ended[host] for host in range(len(both))]


def assert_finished(both: Sequence[Command]) -> None:
    codes = [each.wait(100) for each in both]
    assert codes == [0, 0], "\n".join(each.printed for each in both)


def assert_lost(run: Path, *printed: str) -> None:
    """Each side names whom it lost, rank 0 in the outcome too."""
    found = outcome(run)
    assert (found["outcome"], found["exit_code"]) == ("failed", 1)
    assert found["step"] == TROUBLE_AT - 1
    assert "rank 1 of 2 is lost" in found["reason"]
    assert "error: rank 1 of 2 is lost" in printed[0]
    assert "error: rank 1 of 2 is cut off from rank 0" in printed[1]


def paused(rank: int, folder: Path) -> None:
    """Trouble: the rank waits before step TROUBLE_AT until there is a file `go`. Its
    parallel.timeout_s holds from there on: on a busy machine two ranks may start further apart."""
    from launch import pretrain

    whole = pretrain._train

    def train(*arguments: Any) -> tuple[int, str]:
        def pause() -> None:
            arguments[-1]._limit_s = TIMEOUT_S
            (folder / f"reached_{rank}").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)

        forked.before("geneformer_mcore.training.trainer:_step", TROUBLE_AT, pause)
        return whole(*arguments)

    pretrain._train = train


@pytest.mark.parametrize("failure", ["unplug", "silence"])
def test_a_network_that_fails_ends_both_sides_and_the_run_goes_on_later(
    failure: str, hosts: TwoHosts, store: Path, tmp_path: Path, undisturbed: FinalState
) -> None:
    """A cable taken out is seen by the kernel; a silent network by nothing but time."""
    run, settings = tmp_path / "run", settings_of(store)
    both = forked.start(run, settings, 2, paused, (tmp_path,), hosts=hosts)
    for rank in range(2):
        both.wait_for(tmp_path / f"reached_{rank}")
    getattr(hosts, failure)()
    (tmp_path / "go").touch()
    assert both.wait(TIMEOUT_S + 60) == [1, 1]
    assert_lost(run, both.printed, both.printed)
    hosts.mend()
    assert "(step 3, " in forked.check(run, settings, 2, hosts=hosts)
    assert final_state(run) == undisturbed


@pytest.mark.soak
def test_two_hosts_train_as_two_ranks_of_one_do(
    hosts: TwoHosts, job: Job, undisturbed: FinalState
) -> None:
    """Though one comes late, and the network is silent for two seconds."""
    first = job.start(0, paused=True)
    time.sleep(4)
    assert not first.ended()
    both = [first, job.start(1, paused=True)]
    wait_for(job.run.parent / "reached", 100, *both)
    hosts.silence()
    job.go()
    time.sleep(2)
    hosts.mend()
    assert_finished(both)
    assert outcome(job.run)["outcome"] == "finished"
    assert final_state(job.run) == undisturbed


def assert_both_end_in_time(job: Job, both: Sequence[Command]) -> None:
    """The network has failed: both sides end in time."""
    seconds = seconds_until_ended(both, TIMEOUT_S + 60)
    print(f"ended {seconds[0]:.1f} s and {seconds[1]:.1f} s after it")
    assert max(seconds) < TIMEOUT_S + 10
    assert [each.wait(0) for each in both] == [1, 1]
    assert_lost(job.run, *(each.printed for each in both))


@pytest.mark.soak
def test_a_cable_taken_out_ends_both_sides_and_the_run_goes_on_later(
    hosts: TwoHosts, job: Job, undisturbed: FinalState
) -> None:
    both = job.start_and_pause()
    hosts.unplug()
    job.go()
    assert_both_end_in_time(job, both)
    hosts.mend()
    again = [job.start(host) for host in range(2)]
    assert_finished(again)
    assert "(step 3, " in again[0].printed
    assert final_state(job.run) == undisturbed


@pytest.mark.soak
def test_a_network_that_loses_all_without_a_word_ends_both_sides(hosts: TwoHosts, job: Job) -> None:
    """No connection is ever reset or closed: nothing but time tells of it."""
    both = job.start_and_pause()
    hosts.silence()
    job.go()
    assert_both_end_in_time(job, both)


@pytest.mark.soak
def test_hosts_that_never_meet_do_not_wait_forever(hosts: TwoHosts, job: Job) -> None:
    """torchrun's own wait and words; its limit is ten minutes unless --rdzv-conf says otherwise."""
    hosts.silence()
    both = [job.torchrun(host, ["nothing.py"], "--rdzv-conf=timeout=4") for host in range(2)]
    assert max(seconds_until_ended(both, 60)) < 40
    assert [each.wait(0) for each in both] == [1, 1]
    first, second = (each.printed.strip().splitlines()[-1] for each in both)
    assert first.endswith("waiting for clients. 1/2 clients joined.")
    assert second.endswith(f"timed out after 4000ms while trying to connect to ({MEETING}).")
