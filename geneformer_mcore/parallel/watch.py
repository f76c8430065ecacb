"""A lookout on every rank: a job that cannot get on ends in time, and says by which rank.

    main thread: doing("reading cells") -> doing("the update of a step") -> ...
    lookout:     too long at one thing? another rank calls? -> roll call -> verdict -> the end

Collectives wait for a lost rank without a word, each for as long as its process group allows. The
lookout is a thread beside them; the limits of the process groups are but a backstop behind it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch.distributed as dist

from geneformer_mcore.parallel.roll_call import Answer, RollCall, Verdict, judge

_LOOK_S = 0.5
_SHOW_S = 2.0
"""How long a rank whose neighbours are to speak waits before it ends itself."""


class Watch:
    """What this rank is doing, and since when; a context manager, within which the lookout runs.

    Used without a store (one rank, tests) it only keeps to the limit.
    """

    def __init__(self, limit_s: float, on_loss: Callable[[Verdict, bool], None]) -> None:
        """limit_s: seconds that one thing may take.

        on_loss: called by the lookout when the job is lost while the main thread is stuck, with the
        verdict and whether this rank is the one to tell it; must end the process.
        """
        self._limit_s = limit_s
        self._on_loss = on_loss
        self._doing, self._since, self._allowed_s = "starting", time.monotonic(), limit_s
        self._step = 0
        self._roll: RollCall | None = None
        self._world_size = 1
        self._failure: Answer | None = None
        self._verdict: Verdict | None = None
        self._wake, self._ended, self._judged = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._look_out, name="lookout", daemon=True)

    def join(self, store: dist.Store, rank: int, world_size: int) -> None:
        """From now on ranks look out for each other, by a store in which they all meet."""
        self._world_size = world_size
        self._roll = RollCall(store, rank, world_size)

    def doing(self, what: str, step: int | None = None, limit_s: float | None = None) -> None:
        """Said by the main thread when it begins something; `limit_s` if it may take other than
        the usual."""
        if step is not None:
            self._step = step
        self._allowed_s = limit_s or self._limit_s
        self._doing, self._since = what, time.monotonic()

    def explain(self, error: BaseException, code: int, at_fault: bool) -> Verdict | None:
        """For a main thread that is about to end by `error`: what the ranks found out together.

        at_fault: whether the error arose here, and is not that another rank is gone. None if there
        is no other rank, or nothing could be found out.
        """
        if self._roll is None:
            return None
        text = f"{type(error).__name__}: {error}" if code == 1 else str(error)
        self._failure = self._answer(text, code, at_fault)
        self._wake.set()
        self._judged.wait(15)
        return self._verdict

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(_SHOW_S)

    def _answer(self, failed: str = "", code: int = 1, at_fault: bool = False) -> Answer:
        for_s = time.monotonic() - self._since
        return Answer(self._doing, round(for_s, 1), self._step, failed, code, at_fault)

    def _look_out(self) -> None:
        while not self._ended.is_set():
            self._wake.wait(_LOOK_S)
            if self._ended.is_set():
                return
            overdue = time.monotonic() - self._since > self._allowed_s
            try:
                if self._failure or overdue or (self._roll and self._roll.is_called()):
                    self._settle()
                    return
            except (dist.DistError, RuntimeError):
                # The store is gone, and with it the first node's torchrun.
                self._roll = None

    def _settle(self) -> None:
        roll = self._roll
        if roll is None:
            verdict = judge({0: self._answer()}, 1, self._allowed_s)
            self._finish(verdict, speaks=True)
            return
        roll.answer(self._failure or self._answer())
        roll.call()
        answers = roll.collect()
        roll.kill_lost_neighbours(answers)
        self._finish(judge(answers, self._world_size, self._allowed_s), roll.speaks(answers))

    def _finish(self, verdict: Verdict, speaks: bool) -> None:
        self._verdict = verdict
        self._judged.set()
        if self._failure:
            return  # the main thread ends by itself, and tells
        # It may be about to: when a rank dies, the others' collectives fail at about that time.
        if not speaks:
            time.sleep(_SHOW_S)
        if not self._failure and not self._ended.is_set():
            self._on_loss(verdict, speaks)
