"""The size of a checkpoint as preflight foretells it is the one that saving finds."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import toy
from tests.distributed.ranks import in_turn, run_ranks


def sizes(folder: Path, given: list[str]) -> tuple[int, int]:
    """(bytes of this rank's tensors, bytes foretold of all)."""
    import torch.distributed as dist

    from geneformer_mcore.checkpoint import manager
    from geneformer_mcore.checkpoint.state import Snapshot

    made = toy.make(*given)
    made.steps(1)
    snapshot = Snapshot(made.trainable, folder, dist.get_rank(), training_goes_on=False)
    return snapshot.num_bytes, manager.bytes_of_tensors(made.config, toy.VOCABULARY)


def test_size(tmp_path: Path) -> None:
    given = [["train.precision=fp32"], ["train.precision=bf16", "parallel.tensor=2"]]
    by_rank = run_ranks(in_turn, 2, *((sizes, (tmp_path, each)) for each in given))
    for found in zip(*by_rank, strict=True):
        assert sum(ours for ours, _ in found) == found[0][1]
