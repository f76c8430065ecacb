"""The network interface between machines, and a rendezvous that stays within one machine.

    MASTER_ADDR -> address -> a UDP socket "connected" to it -> our address -> its interface
    torchrun --rdzv-backend=loopback  ->  a store that listens on 127.0.0.1  ->  its ranks

Connecting a UDP socket sends nothing: the kernel looks up the route. By default gloo takes the
interface of the host's own name, and NCCL the first one, which other nodes may not reach.
torchrun's own backends listen on every interface without authentication. This one is a plug-in
(entry point `torchrun.handlers`); `export PET_RDZV_BACKEND=loopback` makes it the default.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import psutil
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

_ANY_PORT = 9  # nothing is sent there


@dataclass(frozen=True)
class Route:
    """The master's address, this machine's own on the way there, and its interface or ""."""

    master: str
    address: str
    interface: str

    @property
    def is_loopback(self) -> bool:
        """Whether it stays on this machine."""
        addresses = (self.master, self.address)
        return any(ipaddress.ip_address(each).is_loopback for each in addresses)


def route_to(host: str) -> Route | None:
    """The route to `host`, a name or an address; None if there is none."""
    try:
        found = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                address = _plain(probe.getsockname()[0])
        except OSError:  # e.g. an IPv6 address on a machine without IPv6
            continue
        return Route(_plain(str(target[0])), address, interface_of(address))
    return None


def interface_of(address: str) -> str:
    """The interface that holds `address`, or ""; of any loopback address the loopback one."""
    is_loopback = ipaddress.ip_address(address).is_loopback
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            held = ipaddress.ip_address(_plain(entry.address))
            if str(held) == address or (is_loopback and held.is_loopback):
                return name
    return ""


def address_on(interface: str) -> str:
    """The first address of `interface`, IPv4 before IPv6; "" if there is none."""
    entries = psutil.net_if_addrs().get(interface, [])
    found = {entry.family: _plain(entry.address) for entry in reversed(entries)}
    return found.get(socket.AF_INET, found.get(socket.AF_INET6, ""))


def choose() -> None:
    """Set the interface of gloo and NCCL to the one that leads to MASTER_ADDR, unless set.

    Nothing is set for loopback: either all "nodes" are on one machine, or the master's name is
    127.0.1.1 on the master (as by Debian's installer), which preflight reports.
    """
    route = route_to(os.environ.get("MASTER_ADDR", ""))
    if route is None or route.is_loopback or not route.interface:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", route.interface)
    # NCCL takes a bare name as a prefix: eth1 would match eth10.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={route.interface}")


def _plain(address: str) -> str:
    """Without the zone of a link-local IPv6 address."""
    return address.partition("%")[0]


NAME = "loopback"
_HOST = "127.0.0.1"
_TIMEOUT = timedelta(minutes=10)


class LoopbackRendezvous(RendezvousHandler):
    """One torchrun on one machine, for torch's elastic agent."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return NAME

    @property
    def use_agent_store(self) -> bool:
        """Ranks use this store and start none."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """A new store per attempt (the old one has addresses of dead ranks); rank 0 of 1 agent."""
        listener = socket.create_server((_HOST, 0))
        port = listener.getsockname()[1]
        self._store = TCPStore(
            _HOST,
            port,
            is_master=True,
            timeout=_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        where = RendezvousStoreInfo(_HOST, port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, where)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """Entry point: the factory of this backend."""
    return _make


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    if parameters.max_nodes != 1:
        raise ValueError(
            f"--rdzv-backend={NAME} is for one machine, and --nnodes says {parameters.max_nodes}: "
            "leave it out, and torchrun's own backend listens to the other machines."
        )
    return LoopbackRendezvous(parameters.run_id)
