"""The arithmetic and the judgements of preflight, on made-up nodes."""

from __future__ import annotations

import dataclasses
import fcntl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from geneformer_mcore import config as settings
from geneformer_mcore.checkpoint import manager
from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Source
from geneformer_mcore.distributed.groups import Rendezvous
from geneformer_mcore.preflight import checks, cluster
from geneformer_mcore.preflight import node as nodes
from geneformer_mcore.preflight.checks import Finding, Reduced, State
from geneformer_mcore.preflight.cluster import Exchange, Traces
from geneformer_mcore.preflight.node import (
    Member,
    Node,
    Offset,
    Seen,
    View,
    look_at_cache,
    look_at_cells,
)

GB = 10**9
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4"}
LOOPBACK = {"master_address": "127.0.1.1", "own_address": "127.0.0.1", "interface": "lo"}


def node(number: int = 0, **more: object) -> Node:
    plain = Node(
        local_rank=0,
        number=number,
        host=f"host{number}",
        boot_id=f"boot{number}",
        namespace="net:[1]",
        gpus=["H100"] * 2,
        driver="550.54",
        cuda="12.8",
        cores=16,
        memory_bytes=128 * GB,
        master="host0",
        master_address="10.0.0.1",
        own_address=f"10.0.0.{number + 1}",
        chosen="eth0",
        interface="eth0",
        interface_address=f"10.0.0.{number + 1}",
        versions=VERSIONS,
    )
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


def member(number: int = 0, view: View | None = None, **more: object) -> Member:
    ranks = [2 * number, 2 * number + 1]
    seen = Seen(hash="ab" * 32, vocabulary_size=1000)
    return Member(node(number, **more), ranks, seen, run_folder=view)


def view(free: int = 100 * GB, seen: bool = True, problem: str = "") -> View:
    return View(problem, sees=True, seen=seen, free=free, locked=False)


def test_clocks_by_a_store() -> None:
    """Two threads for two nodes."""
    store, found = HashStore(), {}

    def measure(rank: int) -> None:
        found[rank] = cluster.compare_clocks(Exchange(Rendezvous(store, rank, 2)))

    threads = [threading.Thread(target=measure, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (found[0][0], found[1]) == (Offset(), [])
    assert abs(found[0][1].seconds) <= found[0][1].uncertainty_s < 1
    assert found[0][1] != Offset()


def test_a_busy_node_is_not_one_whose_clock_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the round trips takes three seconds; a clock that is behind is negative."""
    times = iter([0.0, 0.0, 3.0, *(10.0 + n / 1000 for n in range(3 * cluster._TRIPS))])
    monkeypatch.setattr(cluster, "now", lambda: next(times))
    theirs = iter([0.0, *[4.0] * cluster._TRIPS])
    exchange = SimpleNamespace(
        is_first=True, broadcast=lambda: None, gather=lambda now: [now, next(theirs)]
    )
    assert cluster.compare_clocks(exchange)[1].seconds == pytest.approx(-6, abs=0.1)


def test_all_reduces() -> None:
    fast = Reduced("world", [0, 1], True, 0.001, 10**6)
    slow = Reduced("world", [2, 3], True, 0.002, 10**6)
    (found,) = checks.judge_sums([[fast], [slow], [fast]])
    assert found.state is State.ok
    assert "2 group(s) of 2 ranks, slowest ranks 2, 3: 0.50 GB/s" in found.text
    (found,) = checks.judge_sums([[fast], [dataclasses.replace(slow, is_right=False)]])
    assert found.state is State.fails
    assert "not in 1 group(s): ranks 2, 3." in found.text
    assert checks.named(range(128)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 ... 127"
    # doc/PERFORMANCE.md of nccl-tests: busbw = S / t * (2 * (n - 1) / n)
    large = Reduced("world", list(range(8)), True, 0.001, 64 * 2**20)
    assert large.bus_bytes_per_s == pytest.approx(1750 * 64 * 2**20)
    assert Reduced("world", [0], True, 0.0, 1000).bus_bytes_per_s == 0


def test_the_table() -> None:
    assert nodes.aligned([("a", "bb", "c"), ("aaa", "b", "cc")]) == ["a    bb  c", "aaa  b   cc"]
    assert [nodes.span(ranks) for ranks in ([0, 1, 2], [5], [0, 2])] == ["0-2", "5", "0,2"]
    head, row = nodes.table([member(1, view(3 * GB))]).splitlines()
    assert head.split()[:3] == ["node", "host", "ranks"]
    for part in ("host1", "2-3", "2 x H100", "550.54 / 12.8", "128 GB", "3 GB", "+0.000 s"):
        assert part in row
    for part in ("abababababab", "eth0 10.0.0.2", "torch 2.13.0"):
        assert part in row


def test_ranks_are_grouped_by_node() -> None:
    seen = [{"hash": "a"}, None, {"hash": "b"}, None]
    offsets, views = [Offset(), Offset(), Offset(2.0), Offset()], {0: view(1), 2: view(2)}
    found = cluster.members_of([node(0), node(0), node(1), node(1)], seen, offsets, views)
    assert [each.ranks for each in found] == [[0, 1], [2, 3]]
    assert [each.seen.hash for each in found] == ["a", "b"]
    assert [each.offset.seconds for each in found] == [0, 2]
    assert [each.run_folder for each in found] == [view(1), view(2)]


SAME = [member(0), member(1)]
OTHER_TORCH = member(1, versions=VERSIONS | {"torch": "2.12.0"})
SIDES = "1 of 3 differ: torch 2.13.0 on node 0 (host0), node 2 (host2); 2.12.0 on node 1"
FULL = dataclasses.replace(member(1), seen=Seen(hash="a", cache_problem="full"))
APART = [member(n, boot_id="one", namespace=f"{n}", chosen="", **LOOPBACK) for n in (0, 1)]
UNSEEN = member(1, view(seen=False))
ALIKE = [member(n, boot_id="one", chosen="", **LOOPBACK) for n in (0, 1)]
TRAPPED, GIVEN = member(0, chosen="", **LOOPBACK), member(0, interface="lo", chosen="ib0")


def clock(seconds: float) -> list[Member]:
    return [member(0), dataclasses.replace(member(1), offset=Offset(seconds, 0.001))]


CASES = [
    ("clocks", clock(0.99), "ok", "+0.990 s +- 0.001 s"),
    ("clocks", clock(-0.99), "ok", "-0.990 s +- 0.001 s"),
    ("clocks", clock(1.01), "FAILS", "node 1 (host1) +1.010 s +- 0.001 s"),
    ("clocks", clock(-1.01), "FAILS", "node 1 (host1) -1.010 s +- 0.001 s"),
    ("versions", SAME, "ok", "3 are the same"),
    ("versions", [member(0), OTHER_TORCH, member(2)], "FAILS", SIDES),
    ("gpus", SAME, "ok", "2 x H100"),
    ("gpus", [member(0), member(1, gpus=[])], "FAILS", "no GPU on node 1 (host1)"),
    ("gpus", [member(0, gpus=["H100"])], "FAILS", "node 0 (host0) has 2 ranks, 1 GPUs"),
    ("network", [TRAPPED, member(1)], "FAILS", "(host0): host0 is 127.0.1.1, interface lo"),
    ("network", APART, "FAILS", "the 2 machines must reach each other"),
    ("network", ALIKE, "ok", "2 node(s) on one machine, over lo"),
    ("network", [GIVEN, member(1)], "ok", "2 machines, over eth0, lo"),
    ("folder", [member(0, view()), member(1, view())], "ok", "2 node(s) write it"),
    ("folder", [member(0, view()), UNSEEN], "FAILS", "did not see the file of node 1 (host1)"),
    ("cache", [member(0), FULL], "FAILS", "node 1 (host1): full"),
]
JUDGES: dict[str, Callable[[Sequence[Member]], Finding]] = {
    "clocks": checks.judge_clocks,
    "versions": checks.judge_versions,
    "gpus": checks.judge_gpus,
    "network": checks.judge_network,
    "folder": lambda members: checks.judge_folder(members, Path("run"))[0],
    "cache": lambda members: checks.judge_cache(members, "cache"),
}


@pytest.mark.parametrize(("check", "members", "state", "text"), CASES)
def test_judgements(check: str, members: list[Member], state: str, text: str) -> None:
    found = JUDGES[check](members)
    assert found.state == state
    assert text in found.text


def test_room_counts_what_is_there_already() -> None:
    config = Config()
    config.checkpoint.keep_last, config.checkpoint.keep_best = 2, False
    needed = 3 * manager.bytes_of_one(config, 1000, 2)
    nowhere = view(problem="read-only")
    for seen, there, state in (
        (view(needed), 0, State.ok),
        (view(needed - 1), 0, State.fails),
        (view(needed - 1), 1, State.ok),
        (nowhere, 0, State.skipped),
    ):
        found = checks.judge_room(config, [member(0, seen)], there)
        assert found.state is state
        assert ("1 missing" in found.text) == (state is State.fails)


@pytest.mark.parametrize(
    ("given", "number"),
    [
        (["checkpoint.keep_last=2"], 4),
        (["checkpoint.keep_last=2", "checkpoint.keep_best=false"], 3),
        (["checkpoint.keep_last=2", "train.validate_every_steps=0"], 3),
        (["checkpoint.keep_last=1", "checkpoint.keep_every=300", "train.steps=1000"], 3 + 1),
        (["checkpoint.keep_last=1", "checkpoint.keep_every=100", "train.steps=1000"], 3 + 5),
    ],
)
def test_checkpoints_that_are_kept(given: list[str], number: int) -> None:
    config, _ = settings.load(None, ["checkpoint.save_every_steps=200", *given])
    assert manager.most_at_once(config) == number


def test_checkpoints_that_are_there_are_measured(tmp_path: Path) -> None:
    assert manager.bytes_there(tmp_path / "none") == 0
    (tmp_path / "step_0000000010" / "random").mkdir(parents=True)
    (tmp_path / "step_0000000010" / "a").write_bytes(b"12345")
    (tmp_path / "step_0000000010" / "random" / "b").write_bytes(b"123")
    (tmp_path / "other").write_bytes(b"1")
    assert manager.bytes_there(tmp_path) == 8


def test_traces_leave_what_is_anothers(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "ours").touch()
    (tmp_path / "runs" / "another's").touch()
    Traces([folder / "ours", folder / "never"], [folder, folder.parent]).clear()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["another's"]


def test_a_lock_is_seen_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not cluster.is_locked(path)
    with path.open("a") as file:
        assert not cluster.is_locked(path)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert cluster.is_locked(path)
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not cluster.is_locked(path), "another node that looks"
    assert list(tmp_path.iterdir()) == [path]


def test_counts_must_be_there(tmp_path: Path) -> None:
    config = Config()
    config.data.source = Source.counts
    config.data.vocabulary = str(tmp_path / "none.json")
    assert "none.json" in look_at_cells(config).problem


def test_the_cache_must_have_room(tmp_path: Path) -> None:
    assert look_at_cache(tmp_path / "new" / "cache", "f" * 64, 10) == ("", "room")
    assert list(tmp_path.iterdir()) == []
    problem, _ = look_at_cache(tmp_path, "f" * 64, 10**18)
    assert "the copy takes 1,000,000,000,000,000,000 bytes" in problem
    (tmp_path / "file").touch()
    assert "cannot be written" in look_at_cache(tmp_path / "file" / "cache", "f" * 64, 10)[0]
