"""The phases of a training, each held for a time in a process that torchrun has started.

Light to import: the phase `import` is held before torch is loaded.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.end_to_end.instants import before

PLACES = {
    "import": "",
    "opening": "geneformer_mcore.training.datasets:open_cells",
    "rendezvous": "geneformer_mcore.distributed.groups:meet",
    "first step": "geneformer_mcore.training.trainer:train_step",
    "validation": "geneformer_mcore.data.loader:Feed.validation_step",
    "saving": "geneformer_mcore.checkpoint.state:Snapshot.write",
    "ending": "geneformer_mcore.distributed.groups:stop",
}
HOLD_S = {"rendezvous": 60.0, "first step": 60.0}
"""For which a phase is held if nothing happens, by default 2 s. A rendezvous is held by rank 1
alone, and rank 0 waits for it in C++; a step is held until a signal was noted."""


class BeforeTorch:
    """A finder of modules that finds none, and holds the first import of torch."""

    def __init__(self, hold: Any) -> None:
        self._hold = hold

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "torch":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            self._hold()


def held(phase: str, note: str, rank: int) -> None:
    """When this rank comes to `phase` it writes the file `note`_RANK, and stays there."""

    def hold() -> None:
        Path(f"{note}_{rank}").touch()
        deadline = time.monotonic() + HOLD_S.get(phase, 2.0)
        while time.monotonic() < deadline and (phase, rank) != ("rendezvous", 0):
            time.sleep(0.05)
            interruption = signal.getsignal(signal.SIGTERM).__self__  # type: ignore[union-attr]
            if phase == "first step" and interruption.reason:
                return

    if phase == "import":
        sys.meta_path.insert(0, BeforeTorch(hold))  # type: ignore[arg-type]
    else:
        before(PLACES[phase], 1, hold)
