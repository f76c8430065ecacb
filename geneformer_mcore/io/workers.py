"""Worker processes that do one job at a time, and whose end is never a riddle.

    jobs, in order  ->  the next free process  ->  (job, outcome), as they are done
                                               ->  how far each is, meanwhile

Processes are spawned (a fork after TileDB was used would hang), live from job to job, and end with
the process that started them, however that ends. One that is killed is told of by its job.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from geneformer_mcore.errors import AGAIN, DataError, LostWorkerError

# What every process that is spawned to work shares: how it starts, how it ends, how that is told.
#
# parent  ->  interrupts kept back while it is started  ->  the process
#         ->  gone, however  ->  the process ends too   |  killed  ->  what the parent tells


@contextmanager
def interrupts_kept_back() -> Iterator[None]:
    """Processes started in here never see an interrupt from the keyboard, not even in the second
    in which they import what they need: it reaches all processes, and the parent ends the others.
    """
    # Started here and now: it would let interrupts through again (Python 3.11).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """To be called in a spawned process: from now on it ends when its parent does, even if that is
    killed and the pipe between them stays open."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def describe_end(code: int | None) -> str:
    """How a process ended, by its exit code as multiprocessing gives it."""
    if code is None or code >= 0:
        return f"with exit code {code}"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"by signal {-code} ({signal.Signals(-code).name}){hint}"


Job = TypeVar("Job")
Result = TypeVar("Result")
Tell = Callable[[int], None]
"""Called by a work with how many more cells are done."""

_STOP_S = 5.0


class Task(Protocol):
    """What is done with a job: anything picklable that can be called so."""

    def __call__(self, job: Any, tell: Tell) -> Any:
        """Does it. A DataError is an outcome of the job; anything else ends all work."""
        ...


class Workers:
    """Up to `number` processes; a context manager. With one, all is done in this very process."""

    def __init__(self, number: int) -> None:
        if number < 1:
            raise DataError(f"there must be at least 1 worker, not {number}.")
        self.number = number
        self._processes: list[_Worker] = []

    def run(
        self,
        work: Task,
        jobs: Sequence[Job],
        tell: Callable[[Job, int], None] = lambda job, cells: None,
        is_wanted: Callable[[Job], bool] = lambda job: True,
        most: int | None = None,
        chain: Callable[[Job], str | None] = lambda job: None,
    ) -> Iterator[tuple[Job, Any]]:
        """(job, what `work` returned, or its DataError), as they are done; begun in order.

        tell:       called with a job and how many more of its cells are done
        is_wanted:  asked before a job is begun; those that are not are left out
        most:       processes that are worth their start here
        chain:      jobs with a name in common are done by one process, in their order
        Raises LostWorkerError if a process is killed or memory runs out, and whatever else an
        error in a job was.
        """
        number = min(self.number, len(jobs), self.number if most is None else most)
        if number <= 1:
            for job in jobs:
                if is_wanted(job):
                    yield job, _outcome(work, job, partial(tell, job))
            return
        yield from self._run_apart(number, work, _Queue(jobs, is_wanted, chain), tell)

    def _run_apart(
        self,
        number: int,
        work: Task,
        queue: _Queue,
        tell: Callable[[Any, int], None],
    ) -> Iterator[tuple[Any, Any]]:
        while len(self._processes) < number:
            self._processes.append(_Worker())
        free = self._processes[:number]
        for process in free:
            process.send(work)
        busy: dict[Any, tuple[_Worker, Any]] = {}
        while True:
            for process in list(free):
                job = queue.next_for(process)
                if job is not None:
                    free.remove(process)
                    busy[process.connection] = process, job
                    process.begin(job)
            if not busy:
                return
            for connection in wait(list(busy)):
                process, job = busy[connection]
                kind, value = process.answer()
                if kind == "tell":
                    tell(job, value)
                    continue
                del busy[connection]
                free.append(process)
                yield job, _checked(kind, value)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(at_once=error is not None)

    def end(self, at_once: bool = False) -> None:
        """Ends all processes: when they are done, or `at_once`. The next run starts new ones."""
        for process in self._processes:
            process.stop(at_once)
        self._processes = []


class _Queue:
    """Jobs that wait for a process, in order."""

    def __init__(
        self,
        jobs: Sequence[Any],
        is_wanted: Callable[[Any], bool],
        chain: Callable[[Any], str | None],
    ) -> None:
        self._waiting = list(jobs)
        self._is_wanted, self._chain = is_wanted, chain
        self._owners: dict[str, _Worker] = {}

    def next_for(self, process: _Worker) -> Any:
        """The first job that this process may do, taken off the queue; None if there is none."""
        self._waiting = [job for job in self._waiting if self._is_wanted(job)]
        for place, job in enumerate(self._waiting):
            name = self._chain(job)
            if name is None or self._owners.setdefault(name, process) is process:
                return self._waiting.pop(place)
        return None


class _Worker:
    """One process, seen from its parent."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        with interrupts_kept_back():
            self._process.start()
        theirs.close()
        self._job: Any = None

    def send(self, work: Task) -> None:
        self._send(("work", work))

    def begin(self, job: Any) -> None:
        self._job = job
        self._send(("job", job))

    def _send(self, message: tuple[str, Any]) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._lost() from error

    def answer(self) -> tuple[str, Any]:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error

    def stop(self, at_once: bool) -> None:
        self.connection.close()
        if at_once:
            self._process.terminate()
        self._process.join(_STOP_S)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    def _lost(self) -> LostWorkerError:
        self._process.join(_STOP_S)
        code = self._process.exitcode
        what = "before its first job" if self._job is None else f"in the middle of {self._job}"
        return LostWorkerError(f"a worker process was ended {describe_end(code)}, {what}. {AGAIN}")


def _serve(connection: Connection) -> None:
    """A worker process: jobs come in until the connection is closed."""
    end_with_parent()
    pa.set_cpu_count(1)
    work: Any = None
    while True:
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            return
        if kind == "work":
            work = value
            continue
        try:
            connection.send(_answer(work, value, lambda cells: connection.send(("tell", cells))))
        except BrokenPipeError:
            return


def _answer(work: Task, job: Any, tell: Tell) -> tuple[str, Any]:
    try:
        return "outcome", _outcome(work, job, tell)
    except OSError as error:
        return "error", OSError(error.errno, error.strerror, error.filename)
    except LostWorkerError as error:
        return "error", error
    except BaseException:
        return "failed", traceback.format_exc()


def _outcome(work: Task, job: Any, tell: Tell) -> Any:
    try:
        return work(job, tell)
    except DataError as error:
        return error
    except MemoryError as error:
        why = f"there is not enough memory ({error or 'Python has none left'})"
        raise LostWorkerError(f"{why}, in the middle of {job}. {AGAIN}") from error


def _checked(kind: str, value: Any) -> Any:
    if kind == "error":
        raise value
    if kind == "failed":
        raise RuntimeError(f"a defect in a worker process:\n{value}")
    return value
