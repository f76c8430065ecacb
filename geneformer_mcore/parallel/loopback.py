"""How the ranks of one machine meet without opening a port to others.

    torchrun --rdzv-backend=loopback  ->  a store that listens on 127.0.0.1  ->  its ranks

torchrun's own backends let their store listen on every interface of the machine, and nothing that
connects to it has to say who it is. This one is found by torchrun as a plug-in of this package
(entry point `torchrun.handlers`); `export PET_RDZV_BACKEND=loopback` makes it the default.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

NAME = "loopback"
_HOST = "127.0.0.1"
_TIMEOUT = timedelta(minutes=10)


class LoopbackRendezvous(RendezvousHandler):
    """One torchrun on one machine, as torch's elastic agent asks for it."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        """The name of this backend."""
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
        """Never: there is nobody to join later."""
        return False

    def set_closed(self) -> None:
        """Nothing to do."""

    def num_nodes_waiting(self) -> int:
        """None ever."""
        return 0

    def get_run_id(self) -> str:
        """torchrun's --rdzv-id."""
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
