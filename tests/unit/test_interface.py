"""By which interface a rank reaches the master."""

from __future__ import annotations

import os
import socket
from collections import namedtuple

import pytest

from geneformer_mcore.distributed import groups, network
from geneformer_mcore.distributed.network import Route

Entry = namedtuple("Entry", "family address")
NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
INTERFACES = {
    "lo": [Entry(socket.AF_INET, "127.0.0.1")],
    "eth0": [Entry(socket.AF_PACKET, "02:00:00:00:00:01"), Entry(socket.AF_INET, "192.0.2.5")],
    "ib0": [Entry(socket.AF_INET6, "fe80::1%ib0"), Entry(socket.AF_INET, "198.51.100.7")],
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "MASTER_ADDR", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.psutil, "net_if_addrs", lambda: INTERFACES)


@pytest.mark.usefixtures("interfaces")
@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.5", "eth0"),
        ("198.51.100.7", "ib0"),
        ("fe80::1", "ib0"),
        ("127.0.0.1", "lo"),
        ("127.0.1.1", "lo"),
        ("203.0.113.1", ""),
    ],
)
def test_the_interface_that_holds_an_address(address: str, name: str) -> None:
    assert network.interface_of(address) == name


@pytest.mark.usefixtures("interfaces")
def test_the_address_of_an_interface() -> None:
    assert network.address_on("ib0") == "198.51.100.7"
    assert network.address_on("none") == ""


def test_loopback_for_real() -> None:
    route = network.route_to("127.0.0.1")
    assert route is not None
    assert (route.address, route.is_loopback) == ("127.0.0.1", True)
    assert network.address_on(route.interface) == "127.0.0.1"


def test_a_name_that_nobody_knows() -> None:
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


def test_several_machines_take_the_one_that_leads_to_the_master(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    route = Route("192.0.2.1", "192.0.2.5", "eth0")
    monkeypatch.setattr(network, "route_to", lambda host: route if host == "head" else None)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    groups._choose_interface(4)
    assert [os.environ[name] for name in NAMES] == ["eth0", "=eth0"]


def test_what_the_environment_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "route_to", lambda _: Route("192.0.2.1", "192.0.2.5", "eth0"))
    for name in NAMES:
        monkeypatch.setenv(name, "ib0")
    network.choose()
    assert [os.environ[name] for name in NAMES] == ["ib0", "ib0"]


@pytest.mark.parametrize(
    "route",
    [
        None,
        Route("127.0.1.1", "127.0.0.1", "lo"),
        Route("192.0.2.1", "192.0.2.5", ""),
    ],
)
def test_nothing_is_chosen_by_a_route_that_says_nothing(
    route: Route | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "route_to", lambda _: route)
    network.choose()
    assert not [name for name in NAMES if name in os.environ]


def test_one_machine_stays_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    groups._choose_interface(2)
    assert [os.environ.get(name) for name in NAMES] == ["lo", "lo"]
