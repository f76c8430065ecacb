"""Two hosts on one machine: network namespaces, joined by a cable that can be cut.

    host 0, 10.213.77.1  --cable-------cable--  10.213.77.2, host 1

Each has a network, a name, process numbers and a core of its own, and no way out; files are shared.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

LINK = "cable"
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29417
"""Of the store in which ranks of both hosts meet, on host 0."""
_NOBODY = "02:00:00:00:00:99"
_NEW_NETWORK, _NEW_HOST_NAME = 0x4000_0000, 0x0400_0000
"""CLONE_NEWNET and CLONE_NEWUTS of linux/sched.h."""


class Command:
    """What runs on a host."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self._file = Path(file.name)
            self._process = subprocess.Popen(
                arguments, env=dict(environment), stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def printed(self) -> str:
        """What it has printed so far, errors too."""
        return self._file.read_text()

    def ended(self) -> bool:
        """Whether it has."""
        return self._process.poll() is not None

    def wait(self, timeout_s: float) -> int:
        """Its exit code; fails with what it printed if it has not ended in time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {timeout_s:g} s:\n{self.printed}") from None

    def close(self) -> None:
        """Ends it and all that it started."""
        self._process.kill()
        self._process.wait()
        self._file.unlink()


class TwoHosts:
    """Made by `two_hosts`."""

    def __init__(self) -> None:
        self._names = tuple(f"hosts{os.getpid()}n{number}" for number in range(2))
        self._commands: list[Command] = []

    def run(
        self, host: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> Command:
        """Starts a command on a host. With it ends all that it started, as with a job step."""
        there = ["taskset", "--cpu-list", str(_core_of(host))]
        # A process namespace: a host sees no process of the other, and can end none.
        there += ["ip", "netns", "exec", self._names[host]]
        there += ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        there += ["sh", "-c", f'echo host{host} >/proc/sys/kernel/hostname; exec "$@"', "sh"]
        command = Command([*there, *arguments], os.environ if environment is None else environment)
        self._commands.append(command)
        return command

    @property
    def names(self) -> tuple[str, ...]:
        """The network namespaces, by host."""
        return self._names

    def unplug(self) -> None:
        """Takes the cable out at host 1: its kernel knows that it has no link."""
        self._ip(1, "link", "set", LINK, "down")

    def silence(self) -> None:
        """From now on what either host sends is lost without a word: it goes to nobody's card."""
        for host in range(2):
            peer = ADDRESSES[1 - host]
            where = ("lladdr", _NOBODY, "nud", "permanent", "dev", LINK)
            self._ip(host, "neighbour", "replace", peer, *where)

    def restore(self) -> None:
        """The cable is as it was."""
        for host in range(2):
            self._ip(host, "link", "set", LINK, "up")
            with contextlib.suppress(OSError):  # there is none
                self._ip(host, "neighbour", "delete", ADDRESSES[1 - host], "dev", LINK)

    def _open(self) -> None:
        """Raises PermissionError where there may be no namespaces."""
        try:
            for name in self._names:
                _run("ip", "netns", "add", name)
        except OSError as error:
            raise PermissionError(*error.args) from None
        trial = self.run(0, ["true"])
        if trial.wait(10) != 0:
            raise PermissionError(trial.printed.strip())
        one, other = self._names
        ends = ("netns", one, "type", "veth", "peer", "name", LINK, "netns", other)
        _run("ip", "link", "add", LINK, *ends)
        for host, address in enumerate(ADDRESSES):
            self._ip(host, "link", "set", "lo", "up")
            self._ip(host, "address", "add", f"{address}/24", "dev", LINK)
            self._ip(host, "link", "set", LINK, "up")

    def _close(self) -> None:
        for command in self._commands:
            command.close()
        for name in self._names:  # the cable goes with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def _ip(self, host: int, *arguments: str) -> None:
        _run("ip", "-netns", self._names[host], *arguments)


def enter(namespace: str, host: int) -> None:
    """Puts this process, which must have one thread, on a host: its network, name and core."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(descriptor, _NEW_NETWORK) or libc.unshare(_NEW_HOST_NAME):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname(f"host{host}")
    os.sched_setaffinity(0, {_core_of(host)})


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Skips the test where there may be no namespaces."""
    missing = [tool for tool in ("ip", "unshare", "taskset") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here to make two hosts with")
    hosts = TwoHosts()
    try:
        try:
            hosts._open()
        except PermissionError as error:
            pytest.skip(f"no permission to make two hosts: {error}")
        yield hosts
    finally:
        hosts._close()


def wait_for(path: Path, timeout_s: float, *commands: Command) -> None:
    """Until the file is there; fails if a command ends before."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        early = [command.printed for command in commands if command.ended()]
        assert not early, f"ended before there was {path.name}:\n{early[0]}"
        assert time.monotonic() < deadline, "\n".join(each.printed for each in commands)
        time.sleep(0.05)


def _core_of(host: int) -> int:
    cores = sorted(os.sched_getaffinity(0))
    return cores[host % len(cores)]


def _run(*arguments: str) -> None:
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise OSError(f"{' '.join(arguments)}: {ended.stderr.strip()}")
