"""The guard of a rank, a process of its own (see launcher.py): python -I -S guard.py PID LAUNCHER S

Kills its parent, process PID, once that was stopped (SIGSTOP) for S seconds while process LAUNCHER
ran; ends when the parent ends. A stopped process answers to SIGKILL alone, holds the run's lock and
keeps torchrun waiting for half a minute. One per rank, so it imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

LOOK_S = 1.0


def main(pid: int, launcher: int, limit_s: float) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # of a whole job; it ends with its parent
    stopped_s = 0.0
    while os.getppid() == pid:
        # Both are stopped by Ctrl-Z, by somebody who will continue them.
        stopped = is_stopped(pid) and not is_stopped(launcher)
        stopped_s = stopped_s + LOOK_S if stopped else 0.0
        if stopped_s >= limit_s:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        time.sleep(LOOK_S)


def is_stopped(pid: int) -> bool:
    """Whether all of a process is stopped by a signal (a debugger's stop is another state)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
