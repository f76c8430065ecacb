"""Benchmarks, and the scripts that they start, forked from a process that has imported torch: a
fresh interpreter takes seconds for that. From `main` on all is as in a command."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from geneformer_mcore.exit_codes import run
from tests.distributed.ranks import context

ROOT = Path(__file__).resolve().parents[3]


class Ended(NamedTuple):
    """Exit code, and what it printed, errors too."""

    code: int | None
    printed: str


def forked(name: str, *words: object, change: dict[str, Any], limit_s: float = 280) -> Ended:
    """benchmarks/NAME.py with `words`.

    change: {"package.module:NAME": value}; a dict there is updated. What it starts has it too.
    """
    with tempfile.NamedTemporaryFile() as out:
        script = [sys.executable, f"benchmarks/{name}.py", *map(str, words)]
        process = context.Process(target=_benchmark, args=(script, out.name, change))
        process.start()
        process.join(limit_s)
        process.kill()
        process.join()
        return Ended(process.exitcode, Path(out.name).read_text())


def _benchmark(script: list[str], printed: str, change: dict[str, Any]) -> None:
    for place, value in change.items():
        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        if isinstance(value, dict):
            getattr(owner, name).update(value)
        else:
            setattr(owner, name, value)
    subprocess.Popen = _Forking  # type: ignore[misc]
    with open(printed, "w") as out:
        _become(script, out.fileno(), out.fileno(), ROOT, None)


def _become(
    script: list[str], out: int, errors: int, cwd: Any, env: Mapping[str, str] | None
) -> NoReturn:
    """Run a script of this project as a fresh interpreter would."""
    code: Any = 1
    try:
        os.dup2(out, 1)
        os.dup2(errors, 2)
        os.chdir(cwd or ".")
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        sys.argv = [str(word) for word in script[1:]]
        module = Path(script[1]).resolve().relative_to(ROOT).with_suffix("")
        run(importlib.import_module(".".join(module.parts)).main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


class _Forking(subprocess.Popen):
    """Scripts of this project are forked, all else is started as ever."""

    def _execute_child(self, args: Any, *given: Any) -> None:
        if args[0] != sys.executable or not str(args[1]).endswith(".py"):
            super()._execute_child(args, *given)  # type: ignore[misc]
            return
        where, pipes = given[4:6], given[9:15]
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            streams = (1 if pipes[3] < 0 else pipes[3], 2 if pipes[5] < 0 else pipes[5])
            _become(args, *streams, *where)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
