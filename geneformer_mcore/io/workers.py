"""Worker processes that do one job at a time; a lost one is reported with its job and reason.

    jobs, in order  ->  the next free process  ->  (job, outcome), as they are done
                                               ->  progress of each, meanwhile

Processes are spawned (a fork after TileDB was used would hang), live from job to job, and end with
the process that started them, however that ends.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from geneformer_mcore.errors import AGAIN, DataError, LostWorkerError

Job = TypeVar("Job")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Called by a work with the number of cells just done."""

_STOP_S = 5.0
_BYTES_OF_ONE = 100 * 10**6
"""Memory of a process before it has read anything, at least."""


class Work(Protocol):
    """The function of a job: any picklable callable."""

    def __call__(self, job: Any, advance: Advance) -> Any:
        """Does the job. A DataError is its outcome; any other error ends all work."""
        ...


class Workers:
    """Up to `number` processes; a context manager. With one, all is done in this process."""

    def __init__(self, number: int, shared: Any = None, again: str = AGAIN) -> None:
        """shared:  a synchronised value of multiprocessing, which becomes the attribute `shared` of
                 every work in every process but this one
        again:   the remedy of a LostWorkerError
        """
        if number < 1:
            raise DataError(f"`workers=` must be 1 or more, not {number}.")
        self.number = number
        self._shared, self._again = shared, again
        self._processes: list[_Worker] = []

    def run(
        self,
        work: Work,
        jobs: Sequence[Job],
        advance: Callable[[Job, int], None] = lambda job, cells: None,
        is_wanted: Callable[[Job], bool] = lambda job: True,
        most: int | None = None,
        chain: Callable[[Job], str | None] = lambda job: None,
        last: Any = None,
    ) -> Iterator[tuple[Job, Any]]:
        """(job, what `work` returned, or its DataError), as they are done; begun in order.

        advance:       called with a job and the number of its cells just done
        is_wanted:  called before a job is begun; False: it is skipped
        most:       processes that are worth their start here
        chain:      jobs of one name are done by one process, in their order
        last:       a further job, which every process does after all others
        Raises LostWorkerError if a process is killed or memory runs out, and the errors of jobs.
        """
        number = max(1, min(self.number, len(jobs), self.number if most is None else most))
        _check_number(number)
        queues = [_Queue(jobs, is_wanted, chain)]
        if last is not None:
            queues.append(_Queue([last] * number))
        if number == 1:
            for job in (job for queue in queues for job in queue):
                yield job, _outcome(work, job, partial(advance, job), self._again)
            return
        while len(self._processes) < number:
            self._processes.append(_Worker(self._shared, self._again))
        processes = self._processes[:number]
        for process in processes:
            process.send(work)
        for queue in queues:
            yield from _run_apart(processes, queue, advance)

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


def memory_bytes() -> int:
    """Memory of this machine, or what this process may take of it: a container or a job may have
    less (control groups, ulimit)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits += [soft] if soft != resource.RLIM_INFINITY else []
    with suppress(OSError, IndexError):
        group = (
            Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1].split(":", 2)[2]
        )
        here = Path("/sys/fs/cgroup") / group.lstrip("/")
        for folder in (here, *here.parents):
            with suppress(OSError, ValueError):  # "max", or no file: no limit
                limits.append(int((folder / "memory.max").read_text(encoding="utf-8")))
    return min(limits)


def _check_number(number: int) -> None:
    most = max(1, memory_bytes() // _BYTES_OF_ONE)
    if number > most:
        raise DataError(
            f"`workers={number}` would be {number:,} processes of {_BYTES_OF_ONE / 1e6:.0f} MB and "
            f"more each, and this machine has {memory_bytes() / 1e9:.0f} GB. Remedy: at most "
            f"{most:,}; more than one per core gains nothing."
        )


class _Queue:
    """Jobs that wait for a process, in order."""

    def __init__(
        self,
        jobs: Sequence[Any],
        is_wanted: Callable[[Any], bool] = lambda job: True,
        chain: Callable[[Any], str | None] = lambda job: None,
    ) -> None:
        self._waiting = list(jobs)
        self._is_wanted, self._chain = is_wanted, chain
        self._owners: dict[str, _Worker] = {}

    def __iter__(self) -> Iterator[Any]:
        """The jobs for this process alone."""
        return filter(self._is_wanted, self._waiting)

    def next_for(self, process: _Worker) -> Any:
        """Pops the first job that this process may do; None if there is none."""
        self._waiting = [job for job in self._waiting if self._is_wanted(job)]
        for place, job in enumerate(self._waiting):
            name = self._chain(job)
            if name is None or self._owners.setdefault(name, process) is process:
                return self._waiting.pop(place)
        return None


def _run_apart(
    processes: Sequence[_Worker], queue: _Queue, advance: Callable[[Any, int], None]
) -> Iterator[tuple[Any, Any]]:
    free = list(processes)
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
            if kind == "advance":
                advance(job, value)
                continue
            del busy[connection]
            free.append(process)
            if kind == "error":
                raise value
            if kind == "failed":
                raise RuntimeError(f"internal error in a worker process:\n{value}")
            yield job, value


class _Worker:
    """One process, seen from its parent."""

    def __init__(self, shared: Any, again: str) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, shared, again)
        self._process: SpawnProcess = context.Process(target=_serve, args=arguments, daemon=True)
        self._again = again
        with _interrupts_kept_back():
            self._process.start()
        theirs.close()
        self._job: Any = None

    def send(self, work: Work) -> None:
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
        except MemoryError as error:  # of this process, which takes what a job gives
            raise _short_of_memory(error, self._job, self._again) from error

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
        how = _describe_end(self._process.exitcode)
        what = "before its first job" if self._job is None else f"in the middle of {self._job}"
        return LostWorkerError(f"a worker process was ended {how}, {what}. {self._again}")


@contextmanager
def _interrupts_kept_back() -> Iterator[None]:
    """Blocks SIGINT in processes started in here, also while they import: a keyboard interrupt
    reaches all processes, and the parent ends the others."""
    # Started first: it would unblock the signal (Python 3.11).
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe_end(code: int | None) -> str:
    if code is None or code >= 0:
        return f"with exit code {code}"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"by signal {-code} ({signal.Signals(-code).name}){hint}"


def _serve(connection: Connection, shared: Any, again: str) -> None:
    """Main function of a worker process: jobs come in until the connection is closed."""
    # The pipe may stay open where the parent is killed: other workers may have its other end.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import pyarrow

    pyarrow.set_cpu_count(1)
    work: Any = None
    while True:
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            return
        if kind == "work":
            work = value
            if shared is not None:
                work.shared = shared
            continue
        try:
            _answer(connection, work, value, again)
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _answer(connection: Connection, work: Work, job: Any, again: str) -> None:
    try:
        outcome = _outcome(work, job, lambda cells: connection.send(("advance", cells)), again)
        answer: tuple[str, Any] = "outcome", outcome
    except OSError as error:
        answer = "error", OSError(error.errno, error.strerror, error.filename)
    except LostWorkerError as error:
        answer = "error", error
    except BaseException:
        answer = "failed", traceback.format_exc()
    try:
        connection.send(answer)
    except MemoryError as error:  # before a byte was sent
        connection.send(("error", _short_of_memory(error, job, again)))


def _outcome(work: Work, job: Any, advance: Advance, again: str) -> Any:
    try:
        return work(job, advance)
    except DataError as error:
        return error
    except MemoryError as error:
        raise _short_of_memory(error, job, again) from error


def _short_of_memory(error: MemoryError, job: Any, again: str) -> LostWorkerError:
    why = f"there is not enough memory ({str(error) or 'Python has none left'})"
    return LostWorkerError(f"{why}, in the middle of {job}. {again}")
