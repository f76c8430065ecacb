"""Which rank a job was lost by: every rank says what it does, and the silent ones are named.

    a rank that stands still, or failed  ->  calls the roll  ->  every rank answers (or does not)
                                                             ->  one verdict, the same everywhere

What ranks tell each other lies in the key-value store in which they met. It lives as long as the
first node's torchrun, whatever becomes of a rank.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from geneformer_mcore.commands import DEFECT

ANSWER_S = 4.0
"""Every rank looks for a call each second: one that has not answered by then is lost."""
_LOOK_S = 0.1
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


class RollCall:
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
        """Asks every rank to answer."""
        self._store.set("called", str(self._rank))

    def is_called(self) -> bool:
        """Whether any rank did."""
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
            time.sleep(_LOOK_S)
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
