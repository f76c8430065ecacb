"""What ranks tell each other before there is a process group: by the store in which they met.

    every rank  --to_first-->  rank 0  --from_first-->  every rank

It works where gloo and NCCL do not, so that it can be told why they do not. Slow (a message is a
round trip to the first node's torchrun), and for small things: what travels is JSON.
"""

from __future__ import annotations

import json
from typing import Any

from torch.distributed import PrefixStore, Store

from geneformer_mcore.distributed.groups import Rendezvous


class Exchange:
    """All ranks make the same calls in the same order.

    Raises torch's DistStoreError where a rank does not come within the store's time limit; the
    watch of a job ends it before.
    """

    def __init__(self, meeting: Rendezvous) -> None:
        self.rank, self.world_size = meeting.rank, meeting.world_size
        self._store: Store = PrefixStore("preflight", meeting.store)
        self._calls = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which judges."""
        return self.rank == 0

    def to_first(self, value: Any) -> list[Any]:
        """Every rank's `value`, in order of rank, on rank 0; an empty list elsewhere."""
        key = self._next_key()
        self.put(f"{key}/{self.rank}", value)
        if not self.is_first:
            return []
        return [self.take(f"{key}/{rank}") for rank in range(self.world_size)]

    def from_first(self, value: Any = None) -> Any:
        """Rank 0's `value` on every rank."""
        key = self._next_key()
        if self.is_first:
            self.put(key, value)
        return self.take(key)

    def put(self, key: str, value: Any) -> None:
        """Lays down `value` for whoever knows the key."""
        self._store.set(key, json.dumps(value))

    def take(self, key: str) -> Any:
        """What lies under the key; waits until something does."""
        return json.loads(self._store.get(key))

    def _next_key(self) -> str:
        self._calls += 1
        return str(self._calls)
