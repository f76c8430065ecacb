"""Loss on held-out cells: the same cells and masks each time, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

from geneformer_mcore.feed.loader import Feed
from geneformer_mcore.optim.optimizer import Trainable
from geneformer_mcore.parallel.groups import Topology
from geneformer_mcore.train.step import Totals, run_schedule


def validation_steps(feed: Feed, limit: int) -> int:
    """Global batches that cover the cells of `feed`, at most `limit`."""
    return min(limit, -(-feed.order.num_cells // feed.share.global_batch_size))


def evaluate(
    trainable: Trainable,
    feed: Feed,
    limit: int,
    topology: Topology,
    device: torch.device,
    begun: Callable[[], None] = lambda: None,
) -> Totals:
    """Sums of losses over the first `limit` global batches of `feed`, each cell once. Leaves
    weights, random states and the position in the training data alone.

    begun: called before every batch
    """
    totals = Totals()
    for chunk in trainable.chunks:
        chunk.train(mode=False)
    with torch.no_grad():
        for number in range(validation_steps(feed, limit)):
            begun()
            batches = feed.validation_step(number * feed.share.global_batch_size)
            on_device = [batch.to(device) for batch in batches]
            totals += run_schedule(trainable.chunks, on_device, topology, forward_only=True)
    return totals
