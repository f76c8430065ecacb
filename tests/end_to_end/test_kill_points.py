"""SIGKILL at a few system calls of a save; at every one of them: tests/soak/kill_points.py."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import context
from tests.soak import kill_points

BEFORE, AFTER = "step 1 is the newest", "step 2 is the newest"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_save_killed_at_a_call_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own, forked from one that has no threads: it forks every save."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_them, args=(tmp_path, sender), daemon=True)
    process.start()
    sender.close()
    failure, left = receiver.recv()
    process.join()
    assert failure == ""
    assert left == {
        "the first": BEFORE,
        "of the manifest": BEFORE,
        "of its name": BEFORE,
        "after its name": AFTER,
        "of the pointer": AFTER,
        "the last": AFTER,
    }


def _try_them(folder: Path, sender: Any) -> None:
    left: dict[str, str] = {}
    try:
        good = kill_points.saved_once(folder)
        calls = kill_points.calls_of_a_save(good)
        for name, number in _chosen(calls).items():
            left[name] = kill_points.killed_at(good, calls, number)
        sender.send(("", left))
    except BaseException:
        sender.send((f"{traceback.format_exc()}\nafter {left}", left))


def _chosen(calls: list[str]) -> dict[str, int]:
    """{what it is: number of the call}: those at which a checkpoint comes to be."""

    def first(*words: str) -> int:
        return next(i for i, call in enumerate(calls, 1) if all(word in call for word in words))

    named = first("rename", '/.staging_step_0000000002", ')
    return {
        "the first": 1,
        "of the manifest": first("rename", "manifest.json"),
        "of its name": named,
        "after its name": named + 1,
        "of the pointer": first("rename", "latest"),
        "the last": len(calls),
    }
