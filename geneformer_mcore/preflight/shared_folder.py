"""Whether the run folder is one folder, written and seen by every node.

    rank 0 writes a file  ->  every node reads it, and writes one  ->  rank 0 reads those
    all of it is removed again, and the folder if it was made for this

No file of a run is touched. Nobody looks at the folder before rank 0 has written: a network file
system remembers for up to a minute that something was not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from geneformer_mcore.io.files import free_bytes
from geneformer_mcore.preflight import in_use
from geneformer_mcore.preflight.exchange import Exchange

SEE_S = 10.0
"""How long another node's file may take to show: longer than the few seconds for which network
file systems trust what they knew of a folder."""
_LOOK_S = 0.2


@dataclass
class Traces:
    """What preflight has put on a disk; `clear` takes it away, at any time, from any thread."""

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    """Innermost first; one in which somebody else has put something stays."""

    def clear(self) -> None:
        """Never raises."""
        for path in self.files:
            with contextlib.suppress(OSError):
                path.unlink()
        for path in self.folders:
            with contextlib.suppress(OSError):
                path.rmdir()


@dataclass(frozen=True)
class Token:
    """A file with a content nobody else can have written. problem: why it could not be."""

    name: str = ""
    content: str = ""
    problem: str = ""


@dataclass(frozen=True)
class View:
    """What a node says of the folder: its own token, whether it saw rank 0's, the bytes that are
    free there (-1: unknown), and whether a process holds the run's lock."""

    token: Token
    sees: bool
    free: int
    locked: bool


@dataclass(frozen=True)
class Shared:
    """By rank of the nodes that looked, rank 0 included. unseen: ranks whose files rank 0 did not
    see."""

    views: dict[int, View]
    unseen: list[int]


def check(exchange: Exchange, folder: Path, looks: bool, traces: Traces) -> Shared | None:
    """What rank 0 knows in the end; None elsewhere. All ranks call it; those that `looks`, one of
    each node and rank 0, write and read."""
    try:
        return _check(exchange, folder, looks, traces)
    finally:
        traces.clear()


def _check(exchange: Exchange, folder: Path, looks: bool, traces: Traces) -> Shared | None:
    own = _make_and_write(folder, traces) if exchange.is_first else Token()
    first = Token(**exchange.from_first(asdict(own)))
    view = None
    if exchange.is_first:
        view = _view(folder, own, not own.problem)
    elif looks:
        sees = not first.problem and wait_for(lambda: _is_seen(folder, first))
        view = _view(folder, _write(folder, exchange.rank, traces), sees)
    answers = exchange.to_first(asdict(view) if view else None)
    views = {
        rank: View(**answer | {"token": Token(**answer["token"])})
        for rank, answer in enumerate(answers)
        if answer
    }
    waiting = {rank: each.token for rank, each in views.items() if rank and each.token.name}
    wait_for(lambda: _drop_seen(folder, waiting))
    # Files go before the folder does: rank 0 waits for the others.
    exchange.from_first()
    if not exchange.is_first:
        traces.clear()
    exchange.to_first(None)
    return Shared(views, sorted(waiting)) if exchange.is_first else None


def wait_for(seen: Callable[[], bool]) -> bool:
    """Whether `seen` comes true within SEE_S seconds."""
    deadline = time.monotonic() + SEE_S
    while not seen():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    return True


def _make_and_write(folder: Path, traces: Traces) -> Token:
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        # Noted first: it may be that only some of them can be made.
        traces.folders += missing
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return Token(problem=error.strerror or str(error))
    return _write(folder, 0, traces)


def _write(folder: Path, rank: int, traces: Traces) -> Token:
    content = secrets.token_hex(16)
    path = folder / f".preflight_{rank}_{secrets.token_hex(8)}"
    try:
        traces.files.append(path)
        with path.open("w") as file:
            file.write(content)
            # As a run does with its own: some network file systems are mounted without it.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return Token(problem=error.strerror or str(error))
    return Token(path.name, content)


def _view(folder: Path, token: Token, sees: bool) -> View:
    return View(token, sees, free_bytes(folder), in_use.is_locked(folder / ".lock"))


def _is_seen(folder: Path, token: Token) -> bool:
    """Whether the file is there with its content, by a look that is as fresh as can be had."""
    with contextlib.suppress(OSError):
        # To list a folder makes a network file system ask what is new in it.
        list(folder.iterdir())
        return (folder / token.name).read_text() == token.content
    return False


def _drop_seen(folder: Path, waiting: dict[int, Token]) -> bool:
    """Takes out of `waiting` what is seen; whether nothing is left."""
    for rank, token in list(waiting.items()):
        if _is_seen(folder, token):
            del waiting[rank]
    return not waiting
