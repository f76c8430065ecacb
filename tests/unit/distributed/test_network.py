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
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.training import job

Entry = namedtuple("Entry", "family address")
NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
INTERFACES = {
    "lo": [Entry(socket.AF_INET, "127.0.0.1")],
    "eth0": [Entry(socket.AF_PACKET, "02:00:00:00:00:01"), Entry(socket.AF_INET, "192.0.2.5")],
    "ib0": [Entry(socket.AF_INET6, "fe80::1%ib0"), Entry(socket.AF_INET, "198.51.100.7")],
}
RANK = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
TO_ETH0 = Route("192.0.2.1", "192.0.2.5", "eth0")


@pytest.fixture(autouse=True)
def _clean(monkeypatch) -> None:
    for name in (*NAMES, *RANK, "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def chosen() -> list[str | None]:
    return [os.environ.get(name) for name in NAMES]


def test_interfaces_and_addresses(monkeypatch) -> None:
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: INTERFACES)
    addresses = ("192.0.2.5", "198.51.100.7", "fe80::1", "127.0.0.1", "127.0.1.1", "203.0.113.1")
    found = [network.interface_of(address) for address in addresses]
    assert found == ["eth0", "ib0", "ib0", "lo", "lo", ""]
    assert network.address_on("ib0") == "198.51.100.7"
    assert network.address_on("none") == ""


def test_loopback_for_real_and_an_unknown_host() -> None:
    route = network.route_to("127.0.0.1")
    assert (route.address, route.is_loopback) == ("127.0.0.1", True)
    assert network.address_on(route.interface) == "127.0.0.1"
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
    assert (route.address, route.is_loopback) == (own, False)
    assert route.interface == network.interface_of(own) != ""


@pytest.mark.parametrize(("ranks", "names"), [(4, ["eth0", "=eth0"]), (2, ["lo", "lo"])])
def test_several_machines_take_the_way_to_the_master(monkeypatch, ranks: int, names: list) -> None:
    """One stays on its loopback."""
    monkeypatch.setattr(network, "route_to", {"head": TO_ETH0}.get)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    groups._choose_interface(ranks)
    assert chosen() == names


USELESS = (None, Route("127.0.1.1", "127.0.0.1", "lo"), Route("192.0.2.1", "192.0.2.5", ""))


@pytest.mark.parametrize(
    ("route", "name"), [(TO_ETH0, "ib0"), *((route, None) for route in USELESS)]
)
def test_the_environment_is_obeyed_and_no_useless_route(monkeypatch, route, name) -> None:
    monkeypatch.setattr(network, "route_to", lambda _: route)
    for variable in NAMES if name else ():
        monkeypatch.setenv(variable, name)
    network.choose()
    assert chosen() == [name, name]


def test_ranks_of_a_machine_share_its_cores(monkeypatch) -> None:
    for cores, ranks, threads in ((8, None, 8), (8, "2", 4), (8, "3", 2), (2, "99", 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _process, n=cores: set(range(n)))
        if ranks is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert device._fair_threads() == threads


def test_no_two_ranks_and_seeds_drop_the_same_units(monkeypatch) -> None:
    """Seeds lie further apart than Megatron adds for tensor ranks, which get the same one."""
    tensor_size, pipeline_size, data_size = 2, 3, 4
    given: list[int] = []
    name = "model_parallel_cuda_manual_seed"
    monkeypatch.setattr(groups.tensor_parallel, name, lambda found, **_: given.append(found))
    sizes = (tensor_size, pipeline_size, data_size)
    for seed in (5, 6):
        for rank, (tensor, pipeline, data) in enumerate(itertools.product(*map(range, sizes))):
            place = Topology(rank, 24, tensor, pipeline, pipeline_size, data, data_size)
            groups.seed_dropout(seed, place)
    first, second, third, fourth = (given[start : start + 12] for start in range(0, 48, 12))
    assert (first, third) == (second, fourth), "tensor ranks"
    for found in (first, third):
        assert min(b - a for a, b in itertools.pairwise(sorted(found))) > 2718 + tensor_size
    assert not set(first) & set(third)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "rank 1 waits at node7:29500 for all 2 ranks, as RANK and WORLD_SIZE ask for"),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ""),
    ],
)
def test_who_waits_for_other_ranks_says_so(monkeypatch, capsys, change: dict, message: str) -> None:
    for name, value in (RANK | change).items():
        monkeypatch.setenv(name, value)
    groups._check_environment()
    found = capsys.readouterr().err
    assert message in found
    assert bool(message) == ("unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT" in found)


@pytest.mark.parametrize(
    "change", [{"WORLD_SIZE": ""}, {"RANK": "2"}, {"MASTER_PORT": "x"}, {"MASTER_ADDR": ""}]
)
def test_a_rank_without_a_place_to_meet_is_refused(monkeypatch, change: dict) -> None:
    for name, value in (RANK | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"RANK is set.*Remedy: start with torchrun"):
        groups._check_environment()


@pytest.mark.parametrize(
    ("environment", "dry_run", "number"),
    [
        ({}, False, 1),
        ({"WORLD_SIZE": "4"}, False, 1),
        ({"WORLD_SIZE": "4"}, True, 4),
        (RANK, False, 2),
    ],
)
def test_a_size_without_a_rank_is_left_over(monkeypatch, environment, dry_run, number) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert job.num_ranks(dry_run) == number
