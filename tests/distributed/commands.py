"""Commands of launch/ on forked ranks: started in a second, and not in ten."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from dataclasses import dataclass

from geneformer_mcore.exit_codes import run


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def commands(name: str, lines: list[list[str]]) -> list[Ended]:
    """launch/NAME.py with each of `lines`, one after the other, on the ranks that are here."""
    return calls([[name, *line] for line in lines])


def calls(lines: list[list[str]]) -> list[Ended]:
    """The same for lines of different commands, each with its name in front."""
    ended = []
    for name, *arguments in lines:
        command = importlib.import_module(f"launch.{name}")
        sys.argv = [f"{name}.py", *arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run(command.main)
            except SystemExit as error:
                code = int(error.code or 0)
        ended.append(Ended(code, out.getvalue(), err.getvalue()))
    return ended
