"""On one machine, started as `make demo` starts it, nothing listens to other machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_only_the_loopback_interface_is_listened_on(repository: Path, tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(LOOK)
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    ended = subprocess.run(
        [*torchrun, "--rdzv-backend=loopback", "--nproc_per_node=2", str(script)],
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    listening = json.loads(ended.stdout)
    assert len(listening) > 2
    assert set(listening) == {"127.0.0.1"}


def test_several_machines_are_refused(repository: Path) -> None:
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    ended = subprocess.run(
        [*torchrun, "--rdzv-backend=loopback", "--nnodes=2", "nothing.py"],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode != 0
    assert "is for one machine, and --nnodes says 2" in ended.stderr
