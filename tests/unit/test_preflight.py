"""The arithmetic and the judgements of preflight, on made-up nodes."""

from __future__ import annotations

import dataclasses
import fcntl
import threading
from pathlib import Path

import pytest
from torch.distributed import HashStore

from geneformer_mcore import config as settings
from geneformer_mcore.checkpoint import manager
from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Source
from geneformer_mcore.distributed.groups import Rendezvous
from geneformer_mcore.preflight import cells, clocks, flight, in_use, reduce, table, verdicts
from geneformer_mcore.preflight.cells import Seen
from geneformer_mcore.preflight.clocks import Offset, offset_of
from geneformer_mcore.preflight.exchange import Exchange
from geneformer_mcore.preflight.finding import State
from geneformer_mcore.preflight.node import Node
from geneformer_mcore.preflight.reduce import Reduced, bus_bandwidth
from geneformer_mcore.preflight.shared_folder import Shared, Token, Traces, View
from geneformer_mcore.preflight.verdicts import Member

GB = 10**9


def node(number: int = 0, **more: object) -> Node:
    plain = Node(
        rank=2 * number,
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
        versions={"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4"},
    )
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


def member(number: int = 0, **more: object) -> Member:
    ranks = [2 * number, 2 * number + 1]
    return Member(node(number, **more), ranks, Seen(hash="ab" * 32, vocabulary_size=1000))


def view(free: int = 100 * GB, sees: bool = True, problem: str = "", locked: bool = False) -> View:
    return View(Token("name", "content", problem), sees, free, locked)


def test_of_several_round_trips_the_shortest_counts() -> None:
    trips = [(100.0, 50.0, 140.0), (200.0, 190.1, 200.4), (300.0, 290.0, 300.9)]
    assert offset_of(trips) == Offset(pytest.approx(10.1), pytest.approx(0.2))


def test_a_clock_behind_is_negative() -> None:
    assert offset_of([(10.0, 15.0, 10.0)]).seconds == -5


@pytest.mark.parametrize(("offset", "state"), [(0.99, State.ok), (1.01, State.fails)])
@pytest.mark.parametrize("sign", [1, -1])
def test_clocks_may_be_a_second_apart(offset: float, state: State, sign: int) -> None:
    off = dataclasses.replace(member(1), offset=Offset(sign * offset, 0.001))
    found = verdicts.judge_clocks([member(0), off])
    assert found.state is state
    assert f"{sign * offset:+.3f} s +- 0.001 s" in found.text


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    # doc/PERFORMANCE.md of nccl-tests: busbw = S / t * (2 * (n - 1) / n)
    assert bus_bandwidth(2, 1000, 0.5) == 2000
    assert bus_bandwidth(8, 64 * 2**20, 0.001) == pytest.approx(1.75 * 64 * 2**20 / 0.001)
    assert bus_bandwidth(1, 1000, 0.0) == 0


def test_the_slowest_group_is_told() -> None:
    fast = Reduced("world", [0, 1], True, 0.001, 10**6)
    slow = Reduced("world", [2, 3], True, 0.002, 10**6)
    (found,) = verdicts.judge_sums([[fast], [slow], [fast]])
    assert found.state is State.ok
    assert "2 group(s) of 2 ranks, slowest ranks 2, 3: 0.50 GB/s" in found.text
    wrong = dataclasses.replace(slow, is_right=False)
    (found,) = verdicts.judge_sums([[fast], [wrong]])
    assert found.state is State.fails
    assert "not in 1 group(s): ranks 2, 3." in found.text


def test_many_ranks_are_not_all_listed() -> None:
    assert reduce.named(list(range(128))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 ... 127"


def test_columns_are_aligned() -> None:
    assert table.aligned([("a", "bb", "c"), ("aaa", "b", "cc")]) == "a    bb  c\naaa  b   cc"
    assert table.span([0, 1, 2, 3]) == "0-3"
    assert table.span([5]) == "5"
    assert table.span([0, 2]) == "0,2"


def test_a_row_says_what_a_node_is() -> None:
    head, row = table.text([member(1)], Shared({2: view(3 * GB)}, [])).splitlines()
    assert head.split()[:3] == ["node", "host", "ranks"]
    for part in ("host1", "2-3", "2 x H100", "550.54 / 12.8", "128 GB", "3 GB", "+0.000 s"):
        assert part in row
    for part in ("abababababab", "eth0 10.0.0.2", "torch 2.13.0"):
        assert part in row


def test_ranks_are_dealt_to_nodes() -> None:
    nodes = [node(0), node(0), node(1), node(1)]
    seen = [{"hash": "a"}, None, {"hash": "b"}, None]
    offsets = [{"seconds": float(rank), "uncertainty_s": 0.0} for rank in range(4)]
    found = flight.members_of(nodes, seen, offsets)
    assert [each.ranks for each in found] == [[0, 1], [2, 3]]
    assert [each.seen.hash for each in found] == ["a", "b"]
    assert found[1].offset.seconds == 2


def test_versions_that_differ_name_both_sides() -> None:
    other = {"python": "3.11.7", "torch": "2.12.0", "numpy": "2.4"}
    found = verdicts.judge_versions([member(0), member(1, versions=other), member(2)])
    assert found.state is State.fails
    assert "1 of 3 differ: torch 2.13.0 on node 0 (host0), node 2 (host2); 2.12.0 on node 1" in (
        found.text
    )
    assert verdicts.judge_versions([member(0), member(1)]).state is State.ok


def test_gpus_must_be_equal_and_enough() -> None:
    assert verdicts.judge_gpus([member(0), member(1)]).state is State.ok
    found = verdicts.judge_gpus([member(0), member(1, gpus=[])])
    assert found.state is State.fails
    assert "no GPU on node 1 (host1)" in found.text
    found = verdicts.judge_gpus([member(0, gpus=["H100"])])
    assert "node 0 (host0) has 2 ranks, 1 GPUs" in found.text


LOOPBACK = {"master_address": "127.0.1.1", "own_address": "127.0.0.1", "interface": "lo"}


def test_a_master_at_loopback_is_a_trap_on_several_machines() -> None:
    trapped = member(0, chosen="", **LOOPBACK)
    found = verdicts.judge_network([trapped, member(1)])
    assert found.state is State.fails
    assert "node 0 (host0): host0 is 127.0.1.1, interface lo" in found.text


def test_it_is_none_on_one_machine_or_where_the_interface_is_given() -> None:
    alike = [member(number, boot_id="one", chosen="", **LOOPBACK) for number in (0, 1)]
    assert verdicts.judge_network(alike).state is State.ok
    given = member(0, chosen="ib0", **{**LOOPBACK, "interface": "ib0"})
    assert verdicts.judge_network([given, member(1)]).state is State.ok


def test_two_network_namespaces_of_one_kernel_are_two_machines() -> None:
    apart = [member(n, boot_id="one", namespace=f"{n}", chosen="", **LOOPBACK) for n in (0, 1)]
    assert verdicts.judge_network(apart).state is State.fails


def test_room_counts_what_is_there_already() -> None:
    config = Config()
    config.checkpoint.keep_last, config.checkpoint.keep_best = 2, False
    needed = 3 * manager.bytes_of_one(config, 1000, 2)
    enough = Shared({0: view(needed)}, [])
    assert verdicts.judge_room(config, [member(0)], enough, 0).state is State.ok
    short = Shared({0: view(needed - 1)}, [])
    found = verdicts.judge_room(config, [member(0)], short, 0)
    assert found.state is State.fails
    assert "1 missing" in found.text
    assert verdicts.judge_room(config, [member(0)], short, 1).state is State.ok
    nowhere = Shared({0: view(problem="read-only")}, [])
    assert verdicts.judge_room(config, [member(0)], nowhere, 0).state is State.skipped


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


def test_a_file_rank_0_does_not_see_is_told() -> None:
    members = [member(0), member(1)]
    views = {0: view(), 2: view()}
    found, lock = verdicts.judge_folder(members, Shared(views, []), Path("run"))
    assert (found.state, lock.state) == (State.ok, State.ok)
    found, _ = verdicts.judge_folder(members, Shared(views, [2]), Path("run"))
    assert "rank 0 did not see the file of node 1" in found.text
    assert found.state is State.fails


def test_traces_leave_what_is_anothers(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "ours").touch()
    (tmp_path / "runs" / "another's").touch()
    Traces([folder / "ours", folder / "never"], [folder, folder.parent]).clear()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["another's"]


def test_a_lock_is_seen_and_not_taken(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not in_use.is_locked(path)
    with path.open("a") as file:
        assert not in_use.is_locked(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert in_use.is_locked(path)
        fcntl.flock(file, fcntl.LOCK_UN)
        assert not in_use.is_locked(path)


def test_clocks_by_a_store() -> None:
    """Two threads for two nodes."""
    store, found = HashStore(), {}

    def measure(rank: int) -> None:
        exchange = Exchange(Rendezvous(store, rank, 2))
        found[rank] = clocks.measure(exchange, [0, 1])

    threads = [threading.Thread(target=measure, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found[0] == clocks.FIRST
    assert abs(found[1].seconds) <= found[1].uncertainty_s < 1
    assert found[1] != clocks.FIRST


def test_counts_must_be_there(tmp_path: Path) -> None:
    config = Config()
    config.data.source = Source.counts
    config.data.vocabulary = str(tmp_path / "none.json")
    assert "none.json" in cells.look(config).problem


def test_the_cache_must_have_room(tmp_path: Path) -> None:
    assert cells._cache(tmp_path / "new" / "cache", "f" * 64, 10) == ("", "room")
    assert list(tmp_path.iterdir()) == []
    problem, _ = cells._cache(tmp_path, "f" * 64, 10**18)
    assert "the copy takes 1,000,000,000,000,000,000 bytes" in problem
    (tmp_path / "file").touch()
    problem, _ = cells._cache(tmp_path / "file" / "cache", "f" * 64, 10)
    assert "cannot be written" in problem
    bad = dataclasses.replace(member(1), seen=Seen(hash="a", cache_problem="full"))
    found = verdicts.judge_cache([member(0), bad], "cache")
    assert found.state is State.fails
    assert "node 1 (host1): full" in found.text
