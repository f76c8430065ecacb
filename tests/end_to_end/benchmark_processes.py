"""Benchmarks, and the processes that they start, forked from one that has imported torch.

    forked("loader", "--work", folder, change={"benchmarks.side_by_side.turn:MIN_S": 0})  ->  Ended

A fresh interpreter takes seconds for its imports; a forked one does from `main` on what it would.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.distributed.ranks import context

ROOT = Path(__file__).resolve().parents[2]
_popen, _run = subprocess.Popen, subprocess.run


class Ended(NamedTuple):
    """Exit code, and what it printed, errors too."""

    code: int | None
    printed: str


def forked(name: str, *words: object, change: dict[str, Any] | None = None) -> Ended:
    """benchmarks/NAME.py with `words`.

    change: {"package.module:NAME": value}; a dict there is updated. What it starts has it too.
    """
    with tempfile.NamedTemporaryFile() as out:
        command = [sys.executable, f"benchmarks/{name}.py", *map(str, words)]
        process = context.Process(target=_benchmark, args=(command, out.name, change or {}))
        process.start()
        process.join(240)
        process.kill()
        process.join()
        return Ended(process.exitcode, Path(out.name).read_text())


def _benchmark(command: list[str], printed: str, change: dict[str, Any]) -> None:
    for place, value in change.items():
        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        if isinstance(value, dict):
            getattr(owner, name).update(value)
        else:
            setattr(owner, name, value)
    subprocess.Popen, subprocess.run = _started, _ran  # type: ignore[misc, assignment]
    with open(printed, "w") as out:
        _become(command, out.fileno())


def _become(command: Sequence[str], out: int) -> NoReturn:
    """What a fresh interpreter would do with a script of this project."""
    code: Any = 1
    try:
        os.dup2(out, 1)
        os.dup2(out, 2)
        script = (ROOT / command[1]).relative_to(ROOT).with_suffix("")
        sys.argv = [str(word) for word in command[1:]]
        main: Callable[[], Any] = importlib.import_module(".".join(script.parts)).main
        importlib.import_module("geneformer_mcore.commands").run(main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


class _Forked:
    """As much of a subprocess.Popen as the benchmarks ask for."""

    def __init__(self, command: Sequence[str], out: int) -> None:
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            _become(command, out)

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([os.pidfd_open(self.pid)], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired([], timeout or 0)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _script(command: Any) -> list[str] | None:
    """The same, if it is one of the project's scripts in a process of its own."""
    words = [str(word) for word in command] if isinstance(command, (list, tuple)) else []
    is_script = words[:1] == [sys.executable] and words[1].endswith(".py")
    return words if is_script else None


def _started(command: Any, *given: Any, **known: Any) -> Any:
    script = _script(command)
    out = known["stdout"].fileno() if script else 0
    return _Forked(script, out) if script else _popen(command, *given, **known)


def _ran(command: Any, **known: Any) -> Any:
    script = _script(command)
    if not script:
        return _run(command, **known)
    with tempfile.NamedTemporaryFile() as out:
        process = _Forked(script, out.fileno())
        try:
            code = process.wait(known.get("timeout"))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            raise
        printed = Path(out.name).read_text()
    if code and known.get("check"):
        raise subprocess.CalledProcessError(code, script, printed)
    return subprocess.CompletedProcess(script, code, printed, printed)
