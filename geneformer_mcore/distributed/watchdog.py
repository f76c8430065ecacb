"""A lookout on every rank: a job that cannot get on ends in time, and says by which rank.

    main thread: doing("reading cells") -> doing("the update of a step") -> ...
    lookout:     too long at one thing? another rank calls? -> roll call -> verdict -> the end

Collectives wait for a lost rank without a word, each for as long as its process group allows. The
lookout is a thread beside them; the limits of the process groups are but a backstop behind it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.exit_codes import DEFECT, exit_code_of

# Which rank a job was lost by: every rank says what it does, and the silent ones are named.
#
#     a rank that stands still, or failed  ->  calls the roll  ->  every rank answers (or does not)
#                                                              ->  one verdict, the same everywhere
#
# What ranks tell each other lies in the key-value store in which they met. It lives as long as the
# first node's torchrun, whatever becomes of a rank.

ANSWER_S = 4.0
"""Every rank looks for a call each second: one that has not answered by then is lost."""
_POLL_ANSWERS_S = 0.1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Tells machines of one name apart."""
_MOST_TOLD = 8


@dataclass(frozen=True)
class Answer:
    """What a rank says of itself.

    doing:    what its main thread is at
    for_s:    seconds since it began that
    step:     updates made
    failed:   the error that ended its main thread; "" if it still runs
    code:     the exit code of that error
    at_fault: whether the error is its own, not one of losing touch with others
    """

    doing: str
    for_s: float
    step: int
    failed: str = ""
    code: int = DEFECT
    at_fault: bool = False

    def __str__(self) -> str:
        if self.failed:
            return f"failed at step {self.step} while {self.doing}: {self.failed}"
        return f"at step {self.step}, {self.doing} for {self.for_s:.0f} s"


@dataclass(frozen=True)
class Verdict:
    """Why a job ends: an exit code of commands.py, and a message."""

    code: int
    message: str


class HealthCheck:
    """The store's part that ranks use to find out whom they lost."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """store: a connection of its own, as another thread uses it."""
        self._store = PrefixStore("roll_call", store)
        self._rank, self._world_size = rank, world_size
        self._machine = (
            f"{socket.gethostname()} {_BOOT_ID.read_text() if _BOOT_ID.exists() else ''}"
        )
        process = psutil.Process()
        where = [self._machine, process.pid, process.create_time()]
        self._store.set(f"where/{rank}", json.dumps(where))

    def call(self) -> None:
        self._store.set("called", str(self._rank))

    def is_called(self) -> bool:
        return self._store.check(["called"])

    def answer(self, answer: Answer) -> None:
        """Tells the others; the last answer counts."""
        self._store.set(f"answer/{self._rank}", json.dumps(asdict(answer)))

    def collect(self) -> dict[int, Answer]:
        """The answers of all ranks that give one within ANSWER_S seconds."""
        deadline = time.monotonic() + ANSWER_S
        keys = {rank: f"answer/{rank}" for rank in range(self._world_size)}
        answers: dict[int, Answer] = {}
        while len(answers) < self._world_size and time.monotonic() < deadline:
            for rank in keys.keys() - answers.keys():
                if self._store.check([keys[rank]]):
                    answers[rank] = Answer(**json.loads(self._store.get(keys[rank])))
            time.sleep(_POLL_ANSWERS_S)
        return answers

    def speaks(self, answers: Mapping[int, Answer]) -> bool:
        """Whether this rank tells the verdict: the first of those that are left."""
        return self._rank == min(answers, default=self._rank)

    def kill_lost_neighbours(self, answers: Mapping[int, Answer]) -> None:
        """Ends the ranks of this machine that gave no answer: one that is stopped, or stuck in the
        kernel, would not heed torchrun's TERM, and keep the job from ending."""
        for rank in set(range(self._world_size)) - answers.keys():
            with contextlib.suppress(ValueError, psutil.Error, dist.DistError):
                if not self._store.check([f"where/{rank}"]):
                    continue
                machine, number, began = json.loads(self._store.get(f"where/{rank}"))
                process = psutil.Process(number) if machine == self._machine else None
                # Its number may be another process' by now.
                if process is not None and process.create_time() == began:
                    process.kill()


def judge(answers: Mapping[int, Answer], world_size: int, limit_s: float) -> Verdict:
    """Who is to blame, by the answers of a roll call.

    A rank whose own error it was comes first; then those that are silent; then those that stand
    still while the others wait for them.
    """
    at_fault = {rank: each for rank, each in answers.items() if each.at_fault}
    if at_fault:
        # A mistake of the user's is told as one, also by the ranks that did not meet it.
        first = min(at_fault.items())[1]
        if {each.code for each in at_fault.values()} == {first.code} != {DEFECT}:
            return Verdict(first.code, first.failed)
        return Verdict(DEFECT, _listed("the job failed", at_fault))
    lost = sorted(set(range(world_size)) - answers.keys())
    if lost:
        names = ", ".join(map(str, lost[:_MOST_TOLD])) + (" ..." if len(lost) > _MOST_TOLD else "")
        others = _listed("the others", answers)
        return Verdict(
            DEFECT,
            f"rank {names} of {world_size} is lost: it gives no answer, so it was killed, stopped "
            f"or cut off, or hangs in the kernel; {others}",
        )
    return Verdict(
        DEFECT,
        _listed(f"no rank got on for {limit_s:g} s (parallel.timeout_s), all still run", answers),
    )


def judge_alone(rank: int, answer: Answer, world_size: int) -> Verdict:
    """What a rank can say to which the store itself gives no answer.

    It lies on the node of rank 0: whoever is lost there, this rank hears of none.
    """
    return Verdict(
        DEFECT,
        f"rank {rank} of {world_size} is cut off from rank 0: the store on that node, where ranks "
        "meet, gives no answer, so the node or its torchrun ended, or the network between failed; "
        f"rank {rank} {answer}",
    )


def _listed(head: str, answers: Mapping[int, Answer]) -> str:
    told: dict[str, list[int]] = {}
    for rank, answer in sorted(answers.items()):
        told.setdefault(str(answer), []).append(rank)
    lines = [f"rank {', '.join(map(str, ranks))} {what}" for what, ranks in told.items()]
    more = f"; and {len(lines) - _MOST_TOLD} more" if len(lines) > _MOST_TOLD else ""
    return f"{head}: {'; '.join(lines[:_MOST_TOLD])}{more}"


_LOOK_S = 0.5
_SHOW_S = 2.0
"""How long a rank whose neighbours are to speak waits before it ends itself."""
_JUDGED_S = ANSWER_S + 5.0
_STORE_S = ANSWER_S + 2.0
"""After which a roll call is known to have got no answer from the store itself."""


class LostRankError(RuntimeError):
    """The job lost a rank; the message says which, at which step, and what it was doing.

    code:  the exit code that the job ends with
    tell:  whether this rank is the one to tell of it: the first that is left
    step:  updates made here
    """

    def __init__(self, verdict: Verdict, tell: bool, step: int) -> None:
        super().__init__(verdict.message)
        self.code, self.tell, self.step = verdict.code, tell, step


class Watchdog:
    """What this rank is doing, and since when; a context manager, within which the lookout runs.

    An error that leaves the context is told to the other ranks. If it only says that contact with
    them was lost, it leaves as a LostRankError that says to whom, and why.
    """

    def __init__(self, limit_s: float, on_loss: Callable[[LostRankError], None]) -> None:
        """limit_s: seconds that one thing may take.

        on_loss: called by the lookout when the job is lost while the main thread is stuck; must end
        the process.
        """
        self._limit_s = limit_s
        self._on_loss = on_loss
        self._now = ("starting", time.monotonic(), limit_s)
        self._step = 0
        self._roll: HealthCheck | None = None
        self._rank, self._world_size = 0, 1
        self._cut_off = False
        self._failure: Answer | None = None
        self._loss: LostRankError | None = None
        self._wake, self._ended, self._judged = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._look_out, name="lookout", daemon=True)
        self._clock = threading.Thread(target=self._keep_time, name="clock", daemon=True)

    def join(self, store: Store, rank: int, world_size: int) -> None:
        """From now on ranks look out for each other, by a store in which they all meet."""
        self._rank, self._world_size = rank, world_size
        self._roll = HealthCheck(store, rank, world_size)

    def doing(self, what: str, step: int | None = None, limit_s: float | None = None) -> None:
        """Said by the main thread when it begins something; `limit_s` if it may take other than
        the usual."""
        if step is not None:
            self._step = step
        # One assignment, as the lookout may read at any instant.
        self._now = (what, time.monotonic(), limit_s or self._limit_s)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        self._clock.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        loss = None
        if error is not None and self._roll is not None:
            loss = self._explain(error)
        self._ended.set()
        self._wake.set()
        self._thread.join(_SHOW_S)
        if loss is not None:
            raise loss from error

    def _explain(self, error: BaseException) -> LostRankError | None:
        """Tells the others of `error`; what it comes of, if not of this rank."""
        at_fault = not _is_loss_of_contact(error)
        text, code = f"{type(error).__name__}: {error}", DEFECT
        if isinstance(error, GeneformerError):
            text, code = str(error), exit_code_of(error)
        self._failure = self._answer(text, code, at_fault)
        self._wake.set()
        self._judged.wait(_JUDGED_S)
        if at_fault:
            return None
        # The lookout may hang, too: in a question to a store that answers no more.
        return self._loss or LostRankError(self._judge_alone(), True, self._step)

    def _answer(self, failed: str = "", code: int = DEFECT, at_fault: bool = False) -> Answer:
        what, since, _ = self._now
        for_s = round(time.monotonic() - since, 1)
        return Answer(what, for_s, self._step, failed, code, at_fault)

    def _overdue_s(self) -> float:
        """By how many seconds the main thread is late; negative if it is not."""
        _, since, allowed_s = self._now
        return time.monotonic() - since - allowed_s

    def _look_out(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(_LOOK_S)
            if self._ended.is_set():
                return
            try:
                if self._failure or self._overdue_s() > 0 or self._is_called():
                    self._settle()
                    return
            except (dist.DistError, RuntimeError):
                # The store is gone, and with it the first node's torchrun.
                self._cut_off = True

    def _is_called(self) -> bool:
        return self._roll is not None and not self._cut_off and self._roll.is_called()

    def _settle(self) -> None:
        roll = self._roll
        if roll is None or self._cut_off:
            self._finish(self._judge_alone(), tell=True)
            return
        roll.answer(self._failure or self._answer())
        roll.call()
        answers = roll.collect()
        roll.kill_lost_neighbours(answers)
        self._finish(judge(answers, self._world_size, self._now[2]), roll.speaks(answers))

    def _keep_time(self) -> None:
        """Beside the lookout, which may wait for a store that answers no more: the first node is
        gone or out of reach, or its torchrun stopped. Where packets are lost without a word, a
        connection is not known to be broken for a quarter of an hour."""
        while not self._ended.wait(_LOOK_S):
            if self._overdue_s() > _STORE_S and not self._judged.is_set():
                self._finish(self._judge_alone(), tell=True)
                return

    def _judge_alone(self) -> Verdict:
        answer = self._failure or self._answer()
        if self._roll is None:  # alone from the beginning, or not with the others yet
            return judge({self._rank: answer}, self._world_size, self._now[2])
        return judge_alone(self._rank, answer, self._world_size)

    def _finish(self, verdict: Verdict, tell: bool) -> None:
        self._loss = LostRankError(verdict, tell, self._step)
        self._judged.set()
        if self._failure:
            return  # the main thread ends by itself, and tells
        if not tell:
            # Its error may be about to come: when a rank dies, collectives fail at about that time.
            time.sleep(_SHOW_S)
        if not self._failure and not self._ended.is_set():
            self._on_loss(self._loss)


def _is_loss_of_contact(error: BaseException) -> bool:
    """Whether an error says no more than that another rank cannot be reached, as gloo and NCCL put
    it: their errors have no type of their own."""
    marks = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    )
