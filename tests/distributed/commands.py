"""Commands of launch/ on forked ranks: started in a second, and not in ten."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from geneformer_mcore.exit_codes import run
from tests.distributed.ranks import run_ranks

LIMIT_S = 280
"""umap compiles itself, once per process: ten seconds, and minutes on a busy machine."""


@dataclass
class Ended:
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
                run(command.main, **getattr(command, "OPTIONS", {}))
            except SystemExit as error:
                code = int(error.code or 0)
        ended.append(Ended(code, out.getvalue(), err.getvalue()))
    return ended


def succeed(lines: list[list[str]], ranks: int = 1, work: Callable = calls) -> list[Ended]:
    """Runs them all on the same ranks; how they ended on the first, which alone prints."""
    first, *others = run_ranks(work, ranks, lines, timeout_s=LIMIT_S)
    for of_rank in (first, *others):
        for words, ended in zip(lines, of_rank, strict=True):
            assert ended.code == 0, (words, ended.err)
            assert of_rank is first or not ended.out
    return first


def assert_refused(name: str, cases: Mapping[str, list[str]]) -> None:
    """Each line is answered by the code 2 and one message, in which its key stands."""
    (found,) = run_ranks(commands, 1, name, list(cases.values()), timeout_s=LIMIT_S)
    for (text, words), ended in zip(cases.items(), found, strict=True):
        assert ended.code == 2, (words, ended)
        assert text in ended.err, (text, ended.err)
        assert ended.err.count("error: ") == 1, ended.err
        assert "Traceback" not in ended.err
        assert not ended.out
