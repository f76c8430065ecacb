"""The size of a checkpoint as preflight foretells it is the one that saving finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import toy
from tests.distributed.ranks import run_ranks


def sizes(folder: Path, given: list[str]) -> tuple[int, int]:
    """(bytes of this rank's tensors, bytes foretold of all)."""
    import torch.distributed as dist

    from geneformer_mcore.checkpoint import size
    from geneformer_mcore.checkpoint.state import Snapshot

    made = toy.make(*given)
    made.steps(1)
    snapshot = Snapshot(made.trainable, folder, dist.get_rank(), training_goes_on=False)
    return snapshot.num_bytes, size.bytes_of_tensors(made.config, toy.VOCABULARY)


@pytest.mark.parametrize(
    "given", [["train.precision=fp32"], ["train.precision=bf16", "parallel.tensor=2"]]
)
def test_size(given: list[str], tmp_path: Path) -> None:
    found = run_ranks(sizes, 2, tmp_path, given)
    assert sum(ours for ours, _ in found) == found[0][1]
