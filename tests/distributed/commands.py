"""Commands of launch/ on forked ranks: started in a second, and not in ten."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from dataclasses import dataclass


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def commands(name: str, lines: list[list[str]]) -> list[Ended]:
    """launch/NAME.py with each of `lines`, one after the other, on the ranks that are here."""
    command = importlib.import_module(f"launch.{name}")
    ended = []
    for line in lines:
        sys.argv = [f"{name}.py", *line]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command.main()
            except SystemExit as error:  # of argparse
                code = int(error.code or 0)
        ended.append(Ended(code, out.getvalue(), err.getvalue()))
    return ended
