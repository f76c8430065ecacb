"""What started this rank: a rank ends within seconds when its launcher (torchrun) is gone.

    torchrun  ->  rank (Launcher: looks at its parent)  ->  guard.py (looks at the rank)

Without this the ranks of a killed torchrun keep the run's lock until a time limit ends them. A
stopped process (SIGSTOP) cannot end itself, so that every rank has a guard, a small process.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from geneformer_mcore.distributed.guard import is_stopped
from geneformer_mcore.errors import NetworkError
from geneformer_mcore.exit_codes import DEFECT, print_stderr

GUARD = Path(__file__).with_name("guard.py")
LOOK_S = 0.5
"""Seconds between two looks at the launcher."""
_REACH_S = 8.0
_ATTEMPT_S = 2.0


class Launcher:
    """torchrun, or nothing: a process started without it may outlive its parent (nohup)."""

    is_watched = False
    """Whether there is one in this process."""

    def __init__(self) -> None:
        Launcher.is_watched = True
        self._pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._stopped_s = 0.0
        self._guard: subprocess.Popen[bytes] | None = None

    def lost(self, limit_s: float) -> str | None:
        """Why this rank cannot go on; None as long as it can. To be called every LOOK_S seconds.

        limit_s: seconds for which the launcher may be stopped while this rank runs
        """
        if self._pid is None:
            return None
        if os.getppid() != self._pid:
            return f"torchrun (process {self._pid}) has ended, and its ranks end with it"
        # Looks are counted, not time: Ctrl-Z stops this rank, too, and that is no fault.
        self._stopped_s = self._stopped_s + LOOK_S if is_stopped(self._pid) else 0.0
        if self._stopped_s < limit_s:
            return None
        return (
            f"torchrun (process {self._pid}) has been stopped for {limit_s:g} s "
            "(parallel.timeout_s), and ranks meet in its store"
        )

    def guard(self, limit_s: float) -> None:
        """Start the guard of this rank, which kills it once it was stopped for `limit_s`."""
        if self._pid is None or sys.platform != "linux":
            return
        arguments = [str(os.getpid()), str(self._pid), str(limit_s)]
        # A session of its own: Ctrl-C and Ctrl-Z are not for it.
        with suppress(OSError):  # no process more: without a guard
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def release(self) -> None:
        """End the guard."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            self._guard = None


def follow(limit_s: float) -> None:
    """End this process when its launcher is lost, unless a training looks after that by itself."""
    if Launcher.is_watched or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = Launcher()
    launcher.guard(limit_s)
    atexit.register(launcher.release)
    threading.Thread(target=_follow, args=(launcher, limit_s), daemon=True).start()


def _follow(launcher: Launcher, limit_s: float) -> None:
    while not (reason := launcher.lost(limit_s)):
        time.sleep(LOOK_S)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_stderr(f"error: {reason}")
    os._exit(DEFECT)


def reach_store() -> None:
    """Raises NetworkError if torchrun's store does not answer within seconds. It is there before
    any rank; without this check ranks that come late wait for it until their time limit."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + _REACH_S
    while True:
        try:
            socket.create_connection((host, port), timeout=_ATTEMPT_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise NetworkError(
                    f"torchrun's store at {host}:{port}, where ranks meet, gives no answer within "
                    f"{_REACH_S:g} s ({error}): that torchrun has ended, or the network between "
                    "failed. Remedy: start the same command again."
                ) from None
            time.sleep(LOOK_S)
