"""How every command ends: the exit code, and a user's error as one message (floor 1)."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from geneformer_mcore.errors import (
    DivergedError,
    GeneformerError,
    LostWorkerError,
    NetworkError,
    naming_options,
)

FINISHED, DEFECT, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 75
"""Exit codes: finished; a defect, hang or lost rank; the user's to mend; saved, start me again."""
EXIT_INTERRUPTED_BY_KEY = 130
_LAST_WORDS_S = 4.0
_HOME = re.compile(r"^((?:[\w.-]+=)?)~(?=/)")


class _Console(io.FileIO):
    """stdout or stderr. Once it cannot be written (`| head`, a full disk) the rest is dropped, and
    that must neither stop the work nor change how the command ends."""

    def write(self, text: Any) -> int:
        try:
            return super().write(text)
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                print_stderr(f"warning: stdout cannot be written ({error.strerror}); it is skipped")
            return len(text)


class Interrupted(Exception):  # noqa: N818  it is no error
    """Raised where a signal comes, or the time is up, while there is nothing to finish first. Its
    message is the reason and what was left undone; the exit code is INTERRUPTED."""


def run(main: Callable[[], int | None], **options: str) -> NoReturn:
    """Runs `main` and ends the process with its exit code (None counts as 0).

    Errors name their parameters as options: --a-name for `a_name`, or as `options` has it.

    A GeneformerError becomes its message on stderr and exit code 2 (a NetworkError: 75), without a
    traceback; so does a LostWorkerError, with exit code 1. Anything else is a defect of ours and
    keeps its traceback (exit code 1).
    """
    _steady_console()
    # A shell does so where a word begins with it, and not behind a `=`.
    sys.argv[1:] = [_HOME.sub(_home, word) for word in sys.argv[1:]]
    with naming_options(**options):
        try:
            code = main() or 0
        except (GeneformerError, LostWorkerError) as error:
            print(end="", flush=True)
            print_stderr(f"error: {error}")
            code = exit_code_of(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED_BY_KEY
    raise SystemExit(code)


def _home(found: re.Match[str]) -> str:
    return found[1] + os.path.expanduser("~")


def _steady_console() -> None:
    """What the locale has no sign for is shown as in Python's texts, and see _Console."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue  # closed, or replaced by who calls `run`
        stream.flush()
        console = io.BufferedWriter(_Console(stream.fileno(), "w", closefd=False))
        at_once = stream.line_buffering or stream.write_through
        steady = io.TextIOWrapper(
            console, stream.encoding, "backslashreplace", line_buffering=at_once
        )
        setattr(sys, name, steady)


def print_stderr(line: str) -> None:
    """Prints to stderr, if that can be written: a full disk must not change how a command ends."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def report_error(error: GeneformerError) -> int:
    """Tells a user's error, and gives the exit code for it. Of ranks, one per machine tells: what
    all of them meet is told once, and what only one machine meets is seen, too."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print_stderr(f"error: {error}")
    return exit_code_of(error)


def report_on_first_rank(work: Callable[[bool], Sequence[str]]) -> int:
    """Does `work` on every rank, and gives its exit code. It is called with whether this is the
    first rank, where the lines that come back are printed."""
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        lines = work(is_first)
    except GeneformerError as error:
        return report_error(error)
    if is_first:
        print("\n".join(lines))
    return FINISHED


def end_after_last_words(code: int, last_words: Callable[[], None]) -> NoReturn:
    """Ends this process, whose main thread waits for a rank that will not come, or for a disk: that
    may keep `last_words` waiting in this thread, too, and then it ends without."""
    at_last = threading.Timer(_LAST_WORDS_S, os._exit, [code])
    at_last.daemon = True
    at_last.start()
    try:
        last_words()
    finally:
        os._exit(code)


def exit_code_of(error: GeneformerError | LostWorkerError) -> int:
    """The code that a command ends with by `error`."""
    if isinstance(error, NetworkError):
        return INTERRUPTED
    is_failure = isinstance(error, LostWorkerError | DivergedError)
    return DEFECT if is_failure else WRONG_INPUT
