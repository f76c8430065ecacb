"""On one machine, started as `make demo` starts it, nothing listens to other machines."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support import commands

LOOK = """
import json, os, psutil, sys
from geneformer_mcore.config.sections import ParallelConfig
from geneformer_mcore.distributed import collectives, device, groups

topology = groups.start(device.start(), ParallelConfig(timeout_s=60))
collectives.barrier()
if topology.rank == 0:
    launcher = psutil.Process(os.getppid())
    family = [launcher, *launcher.children(recursive=True)]
    found = [c.laddr.ip for p in family for c in p.net_connections() if c.status == "LISTEN"]
    print(json.dumps(found))
collectives.barrier()
groups.stop()
"""


def test_only_the_loopback_interface_is_listened_on(tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(LOOK)
    ended = commands.torchrun("--rdzv-backend=loopback", "--nproc_per_node=2", script)
    assert ended.returncode == 0, ended.stderr
    listening = json.loads(ended.stdout)
    assert len(listening) > 2
    assert set(listening) == {"127.0.0.1"}


def test_several_machines_are_refused() -> None:
    ended = commands.torchrun("--rdzv-backend=loopback", "--nnodes=2", "nothing.py")
    assert ended.returncode != 0
    assert "is for one machine, and --nnodes says 2" in ended.stderr
