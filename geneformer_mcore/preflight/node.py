"""Reports of one rank: its machine and software (Node), and the cells it sees (Seen); and the
nodes of a job (Member) as a table."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import geneformer_mcore
from geneformer_mcore import backends
from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Source
from geneformer_mcore.distributed import network
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.io.files import free_bytes
from geneformer_mcore.metrics.provenance import commit
from geneformer_mcore.report.results import aligned
from geneformer_mcore.store import local_cache
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/net")
_DRIVER = Path("/proc/driver/nvidia/version")
_GB = 1e9
_HEADS = (
    *("node", "host", "ranks", "GPUs", "driver / CUDA", "cores", "memory", "run folder free"),
    *("clock", "cells", "interface", "versions"),
)
_SHOWN = {"python": "python", "torch": "torch", "megatron-core": "mcore", "commit": "commit"}


@dataclass(frozen=True)
class Node:
    """A rank's machine; of several ranks of one node the first one's is shown.

    number:      of the node in the job, by torchrun or Slurm
    boot_id, namespace:  of kernel and network: equal on one machine
    gpus:        names of those that this rank sees; driver, cuda: "" without one
    master:      MASTER_ADDR;  master_address: its address here, "" if unknown
    own_address: this machine's, on the route to the master
    chosen:      GLOO_SOCKET_IFNAME
    interface:   gloo's as far as known, and interface_address its address
    versions:    of everything that must be the same on all nodes
    """

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
        return self.boot_id, self.namespace

    @property
    def models(self) -> str:
        """ "8 x H100", or "no GPU"."""
        models = sorted(set(self.gpus))
        return " + ".join(f"{self.gpus.count(each)} x {each}" for each in models) or "no GPU"


@dataclass(frozen=True)
class Seen:
    """The cells of a run as a node sees them, without reading any.

    problem:       why the cells cannot be used here, or ""
    hash:          the store's content hash, or one of vocabulary and of counts files' names, sizes
    cells, tokens: 0 where only training counts them
    cache_problem: why the flat copy cannot be made here;  cache: "", "there", or "room" for one
    """

    problem: str = ""
    hash: str = ""
    cells: int = 0
    tokens: int = 0
    vocabulary_size: int = 0
    cache_problem: str = ""
    cache: str = ""


@dataclass(frozen=True)
class Offset:
    """Seconds that a node's clock is ahead of rank 0's."""

    seconds: float = 0.0
    uncertainty_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.seconds:+.3f} s +- {self.uncertainty_s:.3f} s"


@dataclass(frozen=True)
class View:
    """The run directory as a node sees it.

    problem: why the node cannot write;  sees: rank 0's file;  seen: its file, by rank 0;
    free: bytes, -1 if unknown;  locked: by another start of the run"""

    problem: str
    sees: bool
    seen: bool
    free: int
    locked: bool


@dataclass(frozen=True)
class Member:
    """A node of the job. ranks: the one that reports for it first."""

    node: Node
    ranks: list[int]
    seen: Seen
    offset: Offset = Offset()
    run_folder: View | None = None

    def __str__(self) -> str:
        return f"node {self.node.number} ({self.node.host})"


def look(settings_text: str) -> Node:
    """This rank's node. settings_text: the settings as written."""
    master = os.environ.get("MASTER_ADDR", "")
    route = network.route_to(master) if master else None
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    used = chosen or (route.interface if route else "")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Node(
        local_rank=_environment("LOCAL_RANK", 0),
        number=_environment("GROUP_RANK", _environment("SLURM_NODEID", 0)),
        host=socket.gethostname(),
        boot_id=_BOOT_ID.read_text(encoding="utf-8").strip() if _BOOT_ID.exists() else "",
        namespace=os.readlink(_NAMESPACE) if _NAMESPACE.exists() else "",
        gpus=[torch.cuda.get_device_name(number) for number in range(count)],
        driver=_driver() if count else "",
        cuda=(torch.version.cuda or "") if count else "",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        master=master,
        master_address=route.master if route else "",
        own_address=route.address if route else "",
        chosen=chosen,
        interface=used,
        interface_address=network.address_on(used) if used else "",
        versions=_versions(settings_text),
    )


def _versions(settings_text: str) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        **backends.describe(),
        "project": geneformer_mcore.__version__,
        "settings": hashlib.sha256(settings_text.encode()).hexdigest()[:12],
    }
    # On one rank per node, as git reads the whole work tree. No commit is no difference.
    known = commit() if _environment("LOCAL_RANK", 0) == 0 else "unknown"
    return found if known == "unknown" else found | {"commit": known}


def _driver() -> str:
    """Of the kernel's module; "?" where a container does not show it."""
    text = _DRIVER.read_text(encoding="utf-8") if _DRIVER.exists() else ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text.partition("Module")[2])
    return found[0] if found else "?"


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def look_at_cells(config: Config) -> Seen:
    """This node's view of `data.store`, and whether `data.cache_dir` can be used."""
    try:
        return _counts(config) if config.data.source is Source.counts else _store(config)
    except (GeneformerError, OSError) as error:
        return Seen(problem=str(error))


def _store(config: Config) -> Seen:
    data = config.data
    with TokenStore.open(data.store) as store:
        manifest, size = store.manifest, store.vocabulary.size
    problem, cache, content = "", ("", ""), manifest.content_hash
    if data.seq_length > manifest.seq_length:
        problem = (
            f"data.seq_length ({data.seq_length}) exceeds the {manifest.seq_length} tokens to "
            "which the store cut its cells: lower it, or build the store again."
        )
    if data.cache_dir:
        needed = local_cache.num_bytes(manifest.tokens, manifest.cells)
        cache = look_at_cache(Path(data.cache_dir), content, needed)
    return Seen(problem, content, manifest.cells, manifest.tokens, size, *cache)


def look_at_cache(cache: Path, content_hash: str, needed: int) -> tuple[str, str]:
    """(problem, state) of the folder for the flat copy."""
    if local_cache.is_there(cache, content_hash):
        return "", "there"
    place = next(each for each in [cache.absolute(), *cache.absolute().parents] if each.exists())
    try:
        # Not by permissions: root has them all, on a read-only disk too.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return f"{place} cannot be written: {error.strerror}", ""
    free = free_bytes(place)
    if free < needed:
        return f"the copy takes {needed:,} bytes and {free:,} are free on the disk of {place}", ""
    return "", "room"


def _counts(config: Config) -> Seen:
    """By files and sizes: counting the cells may take minutes."""
    from geneformer_mcore.data.counts_source import find_inputs

    vocabulary = Vocabulary.load(config.data.vocabulary)
    digest = hashlib.sha256(vocabulary.checksum.encode())
    if config.data.split:
        digest.update(Path(config.data.split).read_bytes())
    for name in find_inputs(config.data.store):
        # The size of a folder (a SOMA Experiment) means nothing; a URI is checked when opened.
        size = 0 if "://" in name or Path(name).is_dir() else os.stat(name).st_size
        digest.update(f"{name} {size}\n".encode())
    return Seen(hash=digest.hexdigest(), vocabulary_size=vocabulary.size)


def table(members: Sequence[Member]) -> str:
    return "\n".join(aligned([_HEADS, *map(_row, members)]))


def _row(member: Member) -> tuple[str, ...]:
    node, view = member.node, member.run_folder
    return (
        str(node.number),
        node.host,
        span(member.ranks),
        node.models,
        f"{node.driver} / {node.cuda}" if node.gpus else "-",
        str(node.cores),
        f"{node.memory_bytes / _GB:.0f} GB",
        f"{view.free / _GB:.0f} GB" if view is not None and view.free >= 0 else "?",
        f"{member.offset.seconds:+.3f} s",
        _cells(member.seen),
        f"{node.interface} {node.interface_address}".strip() or "-",
        " ".join(f"{short} {node.versions.get(name, '?')}" for name, short in _SHOWN.items()),
    )


def span(ranks: Sequence[int]) -> str:
    """ "0-7", "0" or "0,2"."""
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    return ",".join(map(str, ranks))


def _cells(seen: Seen) -> str:
    if not seen.hash:
        return "not seen"
    return f"{seen.cells:,} {seen.hash[:12]}" if seen.cells else seen.hash[:12]
