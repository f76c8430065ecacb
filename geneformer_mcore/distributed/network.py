"""How the ranks of one machine meet without opening a port to others.

    torchrun --rdzv-backend=loopback  ->  a store that listens on 127.0.0.1  ->  its ranks

torchrun's own backends let their store listen on every interface of the machine, and nothing that
connects to it has to say who it is. This one is found by torchrun as a plug-in of this package
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

# The network interface by which this rank reaches the others, where they are on several machines.
#
#     MASTER_ADDR -> address -> a UDP socket "connected" to it -> our address -> its interface
#
# Connecting a UDP socket sends nothing: the kernel only looks up the route. Left to themselves gloo
# takes the interface of whatever the host's own name resolves to, and NCCL the first one it finds:
# on a node with several that may be one that the other nodes cannot reach.

_ANY_PORT = 9
"""Nothing is sent there."""


@dataclass(frozen=True)
class Route:
    """How this rank reaches the master.

    master:     the address that the master's name has here
    address:    this machine's own address on the way there
    interface:  the one that holds `address`; "" if none is found
    """

    master: str
    address: str
    interface: str

    @property
    def is_loopback(self) -> bool:
        """Whether it does not leave this machine: of use only if all ranks are on it."""
        addresses = (self.master, self.address)
        return any(ipaddress.ip_address(each).is_loopback for each in addresses)


def route_to(host: str) -> Route | None:
    """The route to `host`, a name or an address; None if its name is unknown or no route leads
    there."""
    try:
        found = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                address = _plain(probe.getsockname()[0])
        except OSError:  # say, an IPv6 address on a machine without IPv6
            continue
        return Route(_plain(str(target[0])), address, interface_of(address))
    return None


def interface_of(address: str) -> str:
    """The interface that holds `address`; "" if none does. One that has another address of the
    loopback network (127.0.1.1) is the loopback interface."""
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
    """Lets gloo and NCCL talk over the interface that leads to MASTER_ADDR. What the environment
    says already stays.

    Nothing is chosen if that is the loopback interface: then either all "nodes" are on one machine,
    where any interface will do, or the master's name is 127.0.1.1 on the master (as Debian's
    installer writes it), where this rank cannot know which one the others see: preflight says so.
    """
    route = route_to(os.environ.get("MASTER_ADDR", ""))
    if route is None or route.is_loopback or not route.interface:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", route.interface)
    # NCCL takes a bare name as the beginning of names: eth1 would be eth10, too.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={route.interface}")


def _plain(address: str) -> str:
    """Without the zone of a link-local IPv6 address."""
    return address.partition("%")[0]


NAME = "loopback"
_HOST = "127.0.0.1"
_TIMEOUT = timedelta(minutes=10)


class LoopbackRendezvous(RendezvousHandler):
    """One torchrun on one machine, as torch's elastic agent asks for it."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return NAME

    @property
    def use_agent_store(self) -> bool:
        """Ranks use this very store, too, and start none."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """A store for this attempt; rank 0 of 1 agent. A restart gets a new one: in the old one lie
        addresses of ranks that are gone."""
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
        """Nothing to do: the store goes with the process."""
        return True


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torchrun calls to get at the maker of this backend."""
    return _make


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    if parameters.max_nodes != 1:
        raise ValueError(
            f"--rdzv-backend={NAME} is for one machine, and --nnodes says {parameters.max_nodes}: "
            "leave it out, and torchrun's own backend listens to the other machines."
        )
    return LoopbackRendezvous(parameters.run_id)
