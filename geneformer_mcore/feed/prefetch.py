"""Steps prepared ahead by one thread.

    steps in line  ->  thread: next(steps) into a queue of a few  ->  the training loop takes them

One thread is enough, and better than processes: what takes time releases the interpreter's lock,
and nothing is copied between processes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from geneformer_mcore.contracts import Batch


def prefetched(steps: Iterator[list[Batch]], depth: int) -> Iterator[list[Batch]]:
    """The same steps, up to `depth` of them ready. The thread ends when the iterator is closed;
    an error in it is raised here."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: object) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for step in steps:
                put(step)
                if closed.is_set():
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
