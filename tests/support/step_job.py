"""The toy cells as a flat copy, and what benchmarks/train_step.py is asked for with them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.peers.steps import Job
from geneformer_mcore.store.local_cache import ensure
from tests.distributed import toy


class Cells(toy.ToyCells):
    """What a flat copy can be made of."""

    def __len__(self) -> int:
        return self.num_cells


def job_in(folder: Path) -> Job:
    """A small model and 120 cells, copied into `folder`."""
    cells = Cells()
    copy = ensure(cells, "c0" * 32, len(cells.tokens), folder)
    changes = (*toy.SETTINGS, f"data.seq_length={toy.SEQ_LENGTH}", "data.pad_multiple=8")
    return Job(str(copy.folder), "10m", changes, toy.VOCABULARY)
