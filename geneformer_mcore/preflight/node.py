"""What a rank says of the machine it is on."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

import geneformer_mcore
from geneformer_mcore import backends
from geneformer_mcore.distributed import network
from geneformer_mcore.metrics.provenance import commit

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/net")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Node:
    """A rank's machine; of several ranks of one node the first one's is shown.

    number:      of the node in the job, as torchrun or Slurm counts
    boot_id, namespace:  of the kernel, and of the network this process sees: two nodes in which
                 both are equal are one machine
    gpus:        names of those that this rank sees; driver, cuda: "" without one
    master:      what MASTER_ADDR says, master_address: the address of that here, "" if none
    own_address: this machine's, on the way to the master
    chosen:      GLOO_SOCKET_IFNAME
    interface:   the one that gloo uses as far as it is known, and interface_address its address
    versions:    of everything that must be the same on all nodes
    """

    rank: int
    local_rank: int
    number: int
    host: str
    boot_id: str
    namespace: str
    gpus: list[str]
    driver: str
    cuda: str
    cores: int
    memory_bytes: int
    master: str
    master_address: str
    own_address: str
    chosen: str
    interface: str
    interface_address: str
    versions: dict[str, str]

    @property
    def machine(self) -> tuple[str, str]:
        """Equal on one machine."""
        return self.boot_id, self.namespace


def look(settings_text: str) -> Node:
    """This rank's node. settings_text: the settings as written, to be the same everywhere."""
    rank = _environment("RANK", 0)
    master = os.environ.get("MASTER_ADDR", "")
    route = network.route_to(master) if master else None
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    used = chosen or (route.interface if route else "")
    gpus = _gpus()
    return Node(
        rank=rank,
        local_rank=_environment("LOCAL_RANK", 0),
        number=_environment("GROUP_RANK", _environment("SLURM_NODEID", 0)),
        host=socket.gethostname(),
        boot_id=_BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "",
        namespace=os.readlink(_NAMESPACE) if _NAMESPACE.exists() else "",
        gpus=gpus,
        driver=_driver() if gpus else "",
        cuda=(torch.version.cuda or "") if gpus else "",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        master=master,
        master_address=route.master if route else "",
        own_address=route.address if route else "",
        chosen=chosen,
        interface=used,
        interface_address=network.address_on(used) if used else "",
        versions=versions(settings_text) | _commit(),
    )


def versions(settings_text: str) -> dict[str, str]:
    """{package, "python", "project", "settings": version, or hash of the settings}."""
    return {
        "python": platform.python_version(),
        **backends.describe(),
        "project": geneformer_mcore.__version__,
        "settings": hashlib.sha256(settings_text.encode()).hexdigest()[:12],
    }


def _commit() -> dict[str, str]:
    """{"commit": hash}, from one rank per node: git reads the whole work tree. Empty where there is
    none, or a disk is too slow to tell: that is no difference."""
    known = commit() if _environment("LOCAL_RANK", 0) == 0 else "unknown"
    return {} if known == "unknown" else {"commit": known}


def _gpus() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(number) for number in range(count)]


def _driver() -> str:
    """Of the kernel's module; "?" where a container does not show it."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text().partition("Module")[2])
    except OSError:
        found = None
    return found[0] if found else "?"


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))
