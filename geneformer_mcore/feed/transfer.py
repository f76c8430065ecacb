"""Batches on their way to a GPU: copied beside the computation, one step ahead.

prefetch thread: batch -> pinned memory   |   side stream: copy of step n + 1 while step n computes

On a CPU there is nothing to copy, and batches pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import torch

from geneformer_mcore.contracts import Batch
from geneformer_mcore.feed.loader import Feed


def steps_on_device(
    feed: Feed, position: int, prefetch: int, device: torch.device
) -> Iterator[list[Batch]]:
    """Global batches from `position` on with their tensors on `device`, without end."""
    if device.type != "cuda":
        return feed.steps(position, prefetch)
    return _ahead(feed, position, prefetch, device)


def _ahead(feed: Feed, position: int, prefetch: int, device: torch.device) -> Iterator[list[Batch]]:
    side = torch.cuda.Stream(device)
    # Pinned by the prefetch thread: page-locking takes time, and copies from pageable memory wait.
    with closing(feed.steps(position, prefetch, pinned=True)) as steps:  # type: ignore[type-var]
        coming = _copied(next(steps), device, side)
        while True:
            batches, done = coming
            coming = _copied(next(steps), device, side)
            here = torch.cuda.current_stream(device)
            here.wait_event(done)
            for batch in batches:
                # The allocator must not give this memory away before `here` has used it.
                batch.record_stream(here)
            yield batches


def _copied(
    batches: list[Batch], device: torch.device, side: torch.cuda.Stream
) -> tuple[list[Batch], torch.cuda.Event]:
    with torch.cuda.stream(side):
        copies = [batch.to(device) for batch in batches]
        return copies, side.record_event()
