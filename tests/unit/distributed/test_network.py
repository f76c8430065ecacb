"""A rank's own place: the interface to the master, its threads, and the seed of its dropout."""

from __future__ import annotations

import itertools
import os
import socket
from collections import namedtuple

import pytest

from geneformer_mcore.distributed import device, groups, network
from geneformer_mcore.distributed.groups import Topology
from geneformer_mcore.distributed.network import Route

Entry = namedtuple("Entry", "family address")
NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
INTERFACES = {
    "lo": [Entry(socket.AF_INET, "127.0.0.1")],
    "eth0": [Entry(socket.AF_PACKET, "02:00:00:00:00:01"), Entry(socket.AF_INET, "192.0.2.5")],
    "ib0": [Entry(socket.AF_INET6, "fe80::1%ib0"), Entry(socket.AF_INET, "198.51.100.7")],
}
TO_ETH0 = Route("192.0.2.1", "192.0.2.5", "eth0")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "MASTER_ADDR", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def chosen() -> list[str | None]:
    return [os.environ.get(name) for name in NAMES]


def test_interfaces_and_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: INTERFACES)
    of_address = {
        "192.0.2.5": "eth0",
        "198.51.100.7": "ib0",
        "fe80::1": "ib0",
        "127.0.0.1": "lo",
        "127.0.1.1": "lo",
        "203.0.113.1": "",
    }
    assert {address: network.interface_of(address) for address in of_address} == of_address
    assert network.address_on("ib0") == "198.51.100.7"
    assert network.address_on("none") == ""


def test_loopback_for_real() -> None:
    route = network.route_to("127.0.0.1")
    assert route is not None
    assert (route.address, route.is_loopback) == ("127.0.0.1", True)
    assert network.address_on(route.interface) == "127.0.0.1"


def test_an_unknown_host_has_no_route() -> None:
    assert network.route_to("no-such-host.invalid") is None


def test_own_address_in_the_network_for_real() -> None:
    """As on the master itself, whose own address the kernel reaches by the loopback device."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        own = probe.getsockname()[0]
    route = network.route_to(own)
    assert route is not None
    assert (route.address, route.is_loopback) == (own, False)
    assert route.interface == network.interface_of(own) != ""


@pytest.mark.parametrize(("ranks", "names"), [(4, ["eth0", "=eth0"]), (2, ["lo", "lo"])])
def test_several_machines_take_the_way_to_the_master_and_one_stays_at_home(
    monkeypatch: pytest.MonkeyPatch, ranks: int, names: list[str]
) -> None:
    monkeypatch.setattr(network, "route_to", {"head": TO_ETH0}.get)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    groups._choose_interface(ranks)
    assert chosen() == names


def test_the_environment_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "route_to", lambda _: TO_ETH0)
    for name in NAMES:
        monkeypatch.setenv(name, "ib0")
    network.choose()
    assert chosen() == ["ib0", "ib0"]


@pytest.mark.parametrize(
    "route", [None, Route("127.0.1.1", "127.0.0.1", "lo"), Route("192.0.2.1", "192.0.2.5", "")]
)
def test_nothing_is_chosen_without_a_useful_route(
    monkeypatch: pytest.MonkeyPatch, route: Route | None
) -> None:
    monkeypatch.setattr(network, "route_to", lambda _: route)
    network.choose()
    assert chosen() == [None, None]


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(8, None, 8), (8, "2", 4), (8, "3", 2), (2, "99", 1)]
)
def test_ranks_of_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: str | None, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert device._fair_threads() == threads


def test_no_two_ranks_and_seeds_drop_the_same_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds lie further apart than Megatron adds for tensor ranks, which get the same one."""
    tensor_size, pipeline_size, data_size = 2, 3, 4
    given: list[int] = []
    name = "model_parallel_cuda_manual_seed"
    monkeypatch.setattr(groups.tensor_parallel, name, lambda found, **_: given.append(found))
    ranks = list(itertools.product(range(tensor_size), range(pipeline_size), range(data_size)))
    seeds = []
    for seed in (5, 6):
        for rank, (tensor, pipeline, data) in enumerate(ranks):
            place = Topology(rank, len(ranks), tensor, pipeline, pipeline_size, data, data_size)
            groups.seed_dropout(seed, place)
        first, second = given[: len(ranks) // 2], given[len(ranks) // 2 :]
        assert first == second, "tensor ranks"
        found = sorted(first)
        assert min(b - a for a, b in itertools.pairwise(found)) > 2718 + tensor_size
        seeds.append(set(found))
        given.clear()
    assert not seeds[0] & seeds[1]
