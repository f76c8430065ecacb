"""An exact instant of a command: right before a certain call of a certain function."""

from __future__ import annotations

import importlib
import signal
import time
from collections.abc import Callable
from typing import Any


def before(place: str, call: int, do: Callable[[], object]) -> None:
    """From now on `do` is called before the `call`-th call of `place`, counted from 1.

    place: package.module:name, or package.module:Class.name; as the caller looks it up
    """
    module, _, names = place.partition(":")
    *path, name = names.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    whole, calls = getattr(owner, name), 0

    def disturbed(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            do()
        return whole(*args, **more)

    setattr(owner, name, disturbed)


def wait_for_a_signal(place: str, call: int) -> None:
    """From now on the `call`-th call of `place` in a training waits until its process was asked to
    stop, however long that takes to come."""

    def wait() -> None:
        interruption = signal.getsignal(signal.SIGUSR1).__self__  # type: ignore[union-attr]
        while interruption.reason is None:
            time.sleep(0.01)

    before(place, call, wait)
