"""What every process that is spawned to work shares: how it starts, how it ends, how that is told.

parent  ->  interrupts kept back while it is started  ->  the process
        ->  gone, however  ->  the process ends too   |  killed  ->  what the parent tells
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from multiprocessing.connection import wait


@contextmanager
def interrupts_kept_back() -> Iterator[None]:
    """Processes started in here never see an interrupt from the keyboard, not even in the second
    in which they import what they need: it reaches all processes, and the parent ends the others.
    """
    # Started here and now: it would let interrupts through again (Python 3.11).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """To be called in a spawned process: from now on it ends when its parent does, even if that is
    killed and the pipe between them stays open."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def describe_end(code: int | None) -> str:
    """How a process ended, by its exit code as multiprocessing gives it."""
    if code is None or code >= 0:
        return f"with exit code {code}"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"by signal {-code} ({signal.Signals(-code).name}){hint}"
