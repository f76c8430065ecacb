"""The watchdog of every rank: a job that hangs or lost a rank ends in time and names it.

    main thread: doing("reading cells") -> doing("the update of a step") -> ...
    watchdog:    overdue, failed, or another rank calls? -> health check -> verdict -> the end

In a health check every rank answers what it is doing, by the rendezvous store, which lives as long
as the first node's torchrun; the verdict is the same on every rank. Collectives wait silently for a
lost rank: the limits of their process groups are a backstop behind this.
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
from geneformer_mcore.exit_codes import DEFECT, INTERRUPTED, Interrupted, exit_code_of

ANSWER_S = 4.0
"""A rank that has not answered by then is lost; every rank polls twice a second."""
_POLL_ANSWERS_S = 0.1
_LOOK_S = 0.5
_SHOW_S = 2.0
"""Seconds that a rank waits for the one that reports before it ends itself."""
_JUDGED_S = ANSWER_S + 5.0
_STORE_S = ANSWER_S + 2.0
"""After which the store is known not to answer."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Distinguishes machines of one name."""
_MOST_LISTED = 8


@dataclass(frozen=True)
class Answer:
    """A rank's state.

    doing, for_s: what its main thread does, and for how many seconds
    step:     updates made
    failed:   the error that ended its main thread, or "";  code: its exit code
    at_fault: whether the error is its own, not a loss of contact
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
    """Why a job ends."""

    code: int
    message: str


class HealthCheck:
    """The exchange of answers by the store."""

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        """store: a connection of its own, for use in another thread."""
        self._store = PrefixStore("roll_call", store)
        self._rank, self._world_size = rank, world_size
        boot_id = _BOOT_ID.read_text(encoding="utf-8") if _BOOT_ID.exists() else ""
        self._machine = f"{socket.gethostname()} {boot_id}"
        process = psutil.Process()
        where = [self._machine, process.pid, process.create_time()]
        self._store.set(f"where/{rank}", json.dumps(where))

    def call(self) -> None:
        self._store.set("called", str(self._rank))

    def is_called(self) -> bool:
        return self._store.check(["called"])

    def answer(self, answer: Answer) -> None:
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
        """Whether this rank, the first that is left, reports the verdict."""
        return self._rank == min(answers, default=self._rank)

    def kill_lost_neighbours(self, answers: Mapping[int, Answer]) -> None:
        """Kill this machine's ranks without an answer, which would ignore torchrun's TERM."""
        for rank in set(range(self._world_size)) - answers.keys():
            with contextlib.suppress(ValueError, psutil.Error, dist.DistError):
                if not self._store.check([f"where/{rank}"]):
                    continue
                machine, number, began = json.loads(self._store.get(f"where/{rank}"))
                process = psutil.Process(number) if machine == self._machine else None
                # The process id may have been reused.
                if process is not None and process.create_time() == began:
                    process.kill()


def judge(answers: Mapping[int, Answer], world_size: int, limit_s: float) -> Verdict:
    """The verdict: ranks that failed by their own error, else silent ones, else a hang."""
    at_fault = {rank: each for rank, each in answers.items() if each.at_fault}
    if at_fault:
        # A user's error is reported as one.
        first = min(at_fault.items())[1]
        if {each.code for each in at_fault.values()} == {first.code} != {DEFECT}:
            return Verdict(first.code, first.failed)
        return Verdict(DEFECT, _listed("the job failed", at_fault))
    lost = sorted(set(range(world_size)) - answers.keys())
    if lost:
        more = " ..." if len(lost) > _MOST_LISTED else ""
        names = ", ".join(map(str, lost[:_MOST_LISTED])) + more
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
    """The verdict of a rank to which the store, on the node of rank 0, gives no answer."""
    return Verdict(
        DEFECT,
        f"rank {rank} of {world_size} is cut off from rank 0: the store on that node, where ranks "
        "meet, gives no answer, so the node or its torchrun ended, or the network between failed; "
        f"rank {rank} {answer}",
    )


def _listed(head: str, answers: Mapping[int, Answer]) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, answer in sorted(answers.items()):
        ranks_of.setdefault(str(answer), []).append(rank)
    lines = [f"rank {', '.join(map(str, ranks))} {what}" for what, ranks in ranks_of.items()]
    more = f"; and {len(lines) - _MOST_LISTED} more" if len(lines) > _MOST_LISTED else ""
    return f"{head}: {'; '.join(lines[:_MOST_LISTED])}{more}"


class LostRankError(RuntimeError):
    """The job lost a rank; the message names it, its step, and what it was doing.

    code:  the exit code of the job;  tell: whether this rank reports it;  step: updates made here
    """

    def __init__(self, verdict: Verdict, tell: bool, step: int) -> None:
        super().__init__(verdict.message)
        self.code, self.tell, self.step = verdict.code, tell, step


class Watchdog:
    """What this rank is doing, and since when; a context manager, within which its threads run.

    An error that leaves the context is reported to the other ranks; a loss of contact leaves as a
    LostRankError that names the lost rank.
    """

    def __init__(self, limit_s: float, on_loss: Callable[[LostRankError], None]) -> None:
        """limit_s: seconds that one thing may take.  on_loss: called from a thread when the job is
        lost while the main thread is stuck; must end the process."""
        self._limit_s = limit_s
        self._on_loss = on_loss
        self._now = ("starting", time.monotonic(), limit_s)
        self._step = 0
        self._health: HealthCheck | None = None
        self._rank, self._world_size = 0, 1
        self._cut_off = False
        self._failure: Answer | None = None
        self._loss: LostRankError | None = None
        self._wake, self._ended, self._judged = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._clock = threading.Thread(target=self._keep_time, name="clock", daemon=True)

    def join(self, store: Store, rank: int, world_size: int) -> None:
        """From now on ranks watch each other, by their rendezvous store."""
        self._rank, self._world_size = rank, world_size
        self._health = HealthCheck(store, rank, world_size)

    def doing(self, what: str, step: int | None = None, limit_s: float | None = None) -> None:
        """Called by the main thread when it begins something; limit_s: another than the usual."""
        if step is not None:
            self._step = step
        # One assignment, as the threads may read at any instant.
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
        if error is not None and self._health is not None:
            loss = self._explain(error)
        self._ended.set()
        self._wake.set()
        self._thread.join(_SHOW_S)
        if loss is not None:
            raise loss from error

    def _explain(self, error: BaseException) -> LostRankError | None:
        """Report `error` to the others; the LostRankError behind a loss of contact."""
        at_fault = not _is_loss_of_contact(error)
        text, code = f"{type(error).__name__}: {error}", DEFECT
        if isinstance(error, GeneformerError):
            text, code = str(error), exit_code_of(error)
        elif isinstance(error, Interrupted):
            text, code = str(error), INTERRUPTED
        self._failure = self._answer(text, code, at_fault)
        self._wake.set()
        self._judged.wait(_JUDGED_S)
        if at_fault:
            return None
        # The thread may hang, too, in a request to the store.
        return self._loss or LostRankError(self._judge_alone(), True, self._step)

    def _answer(self, failed: str = "", code: int = DEFECT, at_fault: bool = False) -> Answer:
        what, since, _ = self._now
        for_s = round(time.monotonic() - since, 1)
        return Answer(what, for_s, self._step, failed, code, at_fault)

    def _overdue_s(self) -> float:
        _, since, allowed_s = self._now
        return time.monotonic() - since - allowed_s

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(_LOOK_S)
            if self._ended.is_set():
                return
            try:
                if self._failure or self._overdue_s() > 0 or self._is_called():
                    self._settle()
                    return
            except (dist.DistError, RuntimeError):
                # The store is gone, with the first node's torchrun.
                self._cut_off = True

    def _is_called(self) -> bool:
        return self._health is not None and not self._cut_off and self._health.is_called()

    def _settle(self) -> None:
        health = self._health
        if health is None or self._cut_off:
            self._finish(self._judge_alone(), tell=True)
            return
        health.answer(self._failure or self._answer())
        health.call()
        answers = health.collect()
        health.kill_lost_neighbours(answers)
        self._finish(judge(answers, self._world_size, self._now[2]), health.speaks(answers))

    def _keep_time(self) -> None:
        """The second thread, for when the first waits for a store that does not answer. If packets
        are lost, a connection breaks only after a quarter of an hour."""
        while not self._ended.wait(_LOOK_S):
            if self._overdue_s() > _STORE_S and not self._judged.is_set():
                self._finish(self._judge_alone(), tell=True)
                return

    def _judge_alone(self) -> Verdict:
        answer = self._failure or self._answer()
        if self._health is None:  # one rank, or before the rendezvous
            return judge({self._rank: answer}, self._world_size, self._now[2])
        return judge_alone(self._rank, answer, self._world_size)

    def _finish(self, verdict: Verdict, tell: bool) -> None:
        self._loss = LostRankError(verdict, tell, self._step)
        self._judged.set()
        if self._failure:
            return  # the main thread ends by itself, and reports
        if not tell:
            # Its own error may be about to come, as collectives fail when a rank dies.
            time.sleep(_SHOW_S)
        if not self._failure and not self._ended.is_set():
            self._on_loss(self._loss)


def _is_loss_of_contact(error: BaseException) -> bool:
    """Whether an error only means a loss of contact; those of gloo and NCCL have no own type."""
    marks = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)
    )
