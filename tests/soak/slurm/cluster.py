"""A real SLURM of a few made-up nodes on this machine, for tests: nothing of it outlives them.

    munged  +  slurmctld  +  slurmd n1, n2, ...   all on 127.0.0.1, files in one folder
    sbatch, scontrol, squeue, ... with SLURM_CONF of that folder

Needs Debian's slurm-wlm and munge, and root. The nodes' GPUs are plain files, so jobs can ask for
them; their cores are more than the machine has, so that jobs fit.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
KILL_WAIT_S = 30
"""From SLURM's TERM to its KILL."""
SLURMD_TIMEOUT_S = 20
"""After which a node that does not answer is down."""
_GPUS = 8
# Debian's daemons lie where a user's PATH does not lead.
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SrunPortRange={srun_ports}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is requeued starts again only after its credential has expired.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait={kill_wait}
ReturnToService=2
SlurmdTimeout={slurmd_timeout}
InactiveLimit=0
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-{nodes}] Gres=gpu:{gpus} NodeHostname={host} NodeAddr=127.0.0.1 \
Port=[{first_port}-{last_port}] CPUs=64 RealMemory={memory_mb} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    if os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    absent = [name for name in NEEDED if _program(name) is None]
    return f"not installed: {', '.join(absent)} (slurm-wlm, munge)" if absent else ""


class Cluster:
    """The cluster in `folder` (short: it holds a socket), with `nodes` nodes; a context manager."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._file = str(folder / "slurm.conf")
        self._pid_files = [folder / f"{name}.pid" for name in ("munged", "slurmctld")]
        self._pid_files += [folder / f"slurmd_{node}.pid" for node in self.nodes]

    def __enter__(self) -> Cluster:
        self._write_configuration()
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """What a client command prints, with the environment that a user has."""
        ended = subprocess.run(
            command,
            env=self.environment(),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if check and ended.returncode != 0:
            raise AssertionError(f"{command} ended with {ended.returncode}: {ended.stderr}")
        return ended.stdout

    def environment(self) -> dict[str, str]:
        """This process' own, less what tests set, and where the cluster is."""
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        return {**own, "SLURM_CONF": self._file}

    def start_node(self, node: str) -> None:
        """Its slurmd, on its share of the cores: nodes do not slow each other down."""
        (self.folder / f"spool_{node}").mkdir(exist_ok=True)
        cores = sorted(os.sched_getaffinity(0))
        share = cores[self.nodes.index(node) :: len(self.nodes)] or cores
        bound = ("taskset", "--cpu-list", ",".join(map(str, share)))
        _start(self._file, *bound, "slurmd", "-N", node, "-f", self._file)

    def kill_node(self, node: str) -> None:
        """As if its power was cut: slurmd and all that runs under it, without a last word."""
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def kill_daemon(self, node: str) -> None:
        """Its slurmd alone: its children continue."""
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "slurmd":
                    process.kill()

    def processes(self, node: str) -> list[psutil.Process]:
        """slurmd of `node`, the slurmstepd that it started, and what these started."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter(["name", "cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            is_daemon = process.info["name"] == "slurmd" and f"-N {node} -f {self._file}" in line
            if is_daemon or self._is_step_of(process, node):
                found += [process, *_descendants(process)]
        return list({process.pid: process for process in found}.values())

    def tasks(self, node: str) -> list[list[str]]:
        """The command lines of what srun has started on `node`, the tasks of its steps."""
        found = []
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "slurmstepd" and ".batch" not in "".join(process.cmdline()):
                    found += [child.cmdline() for child in process.children()]
        return found

    def _is_step_of(self, process: psutil.Process, node: str) -> bool:
        """What the daemon of a step has started knows its cluster and its node."""
        if process.info["name"] != "slurmstepd":
            return False
        here = {"SLURM_CONF": self._file, "SLURMD_NODENAME": node}
        with contextlib.suppress(psutil.Error):
            return any(here.items() <= child.environ().items() for child in process.children())
        return False

    def stop(self) -> None:
        """Ends all jobs and all daemons."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                ["scancel", "--user=root", "--signal=KILL"],
                env=self.environment(),
                capture_output=True,
                timeout=30,
                check=False,
            )
        for node in self.nodes:
            self.kill_node(node)
        for file in self._pid_files:
            _end(file)

    def _write_configuration(self) -> None:
        port = _free_ports(1 + len(self.nodes))
        memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        self.folder.mkdir(parents=True, exist_ok=True)
        Path(self._file).write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                folder=self.folder,
                port=port,
                srun_ports=f"{port + 100}-{port + 400}",
                first_port=port + 1,
                last_port=port + len(self.nodes),
                nodes=len(self.nodes),
                gpus=_GPUS,
                memory_mb=memory_mb - 512,
                kill_wait=KILL_WAIT_S,
                slurmd_timeout=SLURMD_TIMEOUT_S,
            )
        )
        (self.folder / "state").mkdir(exist_ok=True)
        # A GPU without a file is refused.
        for number in range(_GPUS):
            (self.folder / f"gpu{number}").touch()
        names = f"n[1-{len(self.nodes)}]"
        line = f"NodeName={names} Name=gpu File={self.folder}/gpu[0-{_GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(line)

    def _start_daemons(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        files = {
            "key-file": "munge.key",
            "socket": "munge.sock",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        _start(self._file, "munged", *options, "--force")
        _start(self._file, "slurmctld", "-c", "-f", self._file)
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes()

    def wait_for_nodes(self, timeout_s: float = 60) -> None:
        """Until all nodes are idle."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            states = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()
            if states == ["idle"] * len(self.nodes):
                return
            time.sleep(0.3)
        raise AssertionError(f"nodes are {states} after {timeout_s} s: {self.folder}")


def _descendants(process: psutil.Process) -> Sequence[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _program(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


def _start(configuration: str, *command: str) -> None:
    """A daemon, which goes into the background by itself; its log has the errors."""
    subprocess.run(
        command,
        env={**os.environ, "PATH": _PATH, "SLURM_CONF": configuration},
        check=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _end(pid_file: Path) -> None:
    try:
        process = psutil.Process(int(pid_file.read_text()))
    except (OSError, ValueError, psutil.NoSuchProcess):
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except psutil.TimeoutExpired:
        process.kill()
    pid_file.unlink(missing_ok=True)


def _free_ports(number: int) -> int:
    """The first of `number` ports in a row that are free; those of srun follow."""
    for first in range(16_800, 30_000, 500):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + number):
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


def main() -> None:
    """A cluster to try things on, until Ctrl-C: python -m tests.soak.slurm.cluster [FOLDER]."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="slurm_"))
    with Cluster(folder) as cluster:
        print(f"export SLURM_CONF={cluster.environment()['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
