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

from tests.end_to_end.forked import Run, before
from tests.end_to_end.run.test_pretrain import MORE as MORE
from tests.support.commands import ROOT
from tests.support.final_state import FinalState
from tests.support.two_hosts import ADDRESSES, LINK, PORT, Command, TwoHosts, two_hosts, wait_for

TIMEOUT_S = 8
TROUBLE_AT = 5
MEETING = f"{ADDRESSES[0]}, {PORT}"

SCRIPT = """
import os, sys
from pathlib import Path
from launch import pretrain
from tests.end_to_end.run.test_network import paused

if __name__ == "__main__":
    paused(int(os.environ["RANK"]), Path.cwd())
    sys.exit(pretrain.main())
"""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> FinalState:
    """The final state of two ranks of one host."""
    run = Run(tmp_path_factory.mktemp("runs") / "one_host", settings)
    run.check(ranks=2)
    return run.state()


def paused(rank: int, folder: Path) -> None:
    """Trouble: the rank waits before step TROUBLE_AT until there is a file `go`: the network is
    cut there. Its parallel.timeout_s holds from there on: on a busy machine two ranks may start
    further apart."""
    from launch import pretrain

    whole = pretrain._train

    def train(*arguments: Any) -> tuple[int, str]:
        def pause() -> None:
            arguments[-1]._limit_s = TIMEOUT_S
            (folder / f"reached_{rank}").touch()
            while not (folder / "go").exists():
                time.sleep(0.01)

        before("geneformer_mcore.training.trainer:_step", TROUBLE_AT, pause)
        return whole(*arguments)

    pretrain._train = train


class Job:
    """A torchrun on each of two hosts, which share the folder of the test."""

    def __init__(self, hosts: TwoHosts, run: Run) -> None:
        self.run, self._hosts, self._folder = run, hosts, run.folder.parent
        (self._folder / "paused.py").write_text(SCRIPT)

    def start(self, host: int, script: str = "paused.py", *more: str) -> Command:
        """One host's part; both wait before step TROUBLE_AT unless another script is named."""
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=2"]
        command += [f"--node-rank={host}", "--nproc-per-node=1", "--max-restarts=0"]
        command += [f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"]
        command += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        command += ["--shutdown-timeout=120", *more, script, *self.run.words()]
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}
        return self._hosts.run(host, ["env", "-C", str(self._folder), *command], os.environ | own)

    def wait_until_paused(self, *both: Command) -> None:
        """Until both are at the step before which they wait."""
        for rank in range(2):
            wait_for(self._folder / f"reached_{rank}", 100, *both)

    def go(self) -> None:
        """Lets them make that step."""
        (self._folder / "go").touch()


@pytest.fixture
def job(hosts: TwoHosts, run: Run) -> Job:
    return Job(hosts, run)


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


def assert_lost(run: Run, *printed: str) -> None:
    """Each side names whom it lost, rank 0 in the outcome too."""
    found = run.outcome()
    assert (found["outcome"], found["exit_code"]) == ("failed", 1)
    assert found["step"] == TROUBLE_AT - 1
    assert "rank 1 of 2 is lost" in found["reason"]
    assert "error: rank 1 of 2 is lost" in printed[0]
    assert "error: rank 1 of 2 is cut off from rank 0" in printed[1]


@pytest.mark.parametrize("failure", ["unplug", "silence"])
def test_a_network_that_fails_ends_both_sides_and_the_run_goes_on_later(
    failure: str, hosts: TwoHosts, run: Run, tmp_path: Path, undisturbed: FinalState
) -> None:
    """A cable taken out is seen by the kernel; a silent network by nothing but time."""
    both = run.start(ranks=2, trouble=(paused, tmp_path), hosts=hosts)
    for rank in range(2):
        both.wait_for(tmp_path / f"reached_{rank}")
    getattr(hosts, failure)()
    (tmp_path / "go").touch()
    assert both.wait(TIMEOUT_S + 60) == [1, 1]
    assert_lost(run, both.printed, both.printed)
    hosts.restore()
    assert "(step 3, " in run.check(ranks=2, hosts=hosts)
    assert run.state() == undisturbed


@pytest.mark.soak
def test_two_hosts_train_as_two_ranks_of_one_do(
    hosts: TwoHosts, job: Job, undisturbed: FinalState
) -> None:
    """Though one comes late, and the network is silent for two seconds."""
    first = job.start(0)
    time.sleep(4)
    assert not first.ended()
    both = [first, job.start(1)]
    job.wait_until_paused(*both)
    hosts.silence()
    job.go()
    time.sleep(2)
    hosts.restore()
    assert_finished(both)
    assert job.run.outcome()["outcome"] == "finished"
    assert job.run.state() == undisturbed


@pytest.mark.soak
@pytest.mark.parametrize("failure", ["unplug", "silence"])
def test_under_torchrun_too(
    failure: str, hosts: TwoHosts, job: Job, undisturbed: FinalState, repository: Path
) -> None:
    both = [job.start(host) for host in range(2)]
    job.wait_until_paused(*both)
    getattr(hosts, failure)()
    job.go()
    seconds = seconds_until_ended(both, TIMEOUT_S + 60)
    print(f"ended {seconds[0]:.1f} s and {seconds[1]:.1f} s after it")
    assert max(seconds) < TIMEOUT_S + 10
    assert [each.wait(0) for each in both] == [1, 1]
    assert_lost(job.run, *(each.printed for each in both))
    hosts.restore()
    again = [job.start(host, str(repository / "launch" / "pretrain.py")) for host in range(2)]
    assert_finished(again)
    assert "(step 3, " in again[0].printed
    assert job.run.state() == undisturbed


@pytest.mark.soak
def test_hosts_that_never_meet_do_not_wait_forever(hosts: TwoHosts, job: Job) -> None:
    """torchrun's own wait and words; its limit is ten minutes unless --rdzv-conf says otherwise."""
    hosts.silence()
    both = [job.start(host, "paused.py", "--rdzv-conf=timeout=4") for host in range(2)]
    assert max(seconds_until_ended(both, 60)) < 40
    assert [each.wait(0) for each in both] == [1, 1]
    first, second = (each.printed.strip().splitlines()[-1] for each in both)
    assert first.endswith("waiting for clients. 1/2 clients joined.")
    assert second.endswith(f"timed out after 4000ms while trying to connect to ({MEETING}).")
