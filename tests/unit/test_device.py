"""How many threads a rank takes on a CPU."""

from __future__ import annotations

import os

import pytest

from geneformer_mcore.distributed import device


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"), [(8, None, 8), (8, "2", 4), (8, "3", 2), (2, "99", 1)]
)
def test_ranks_of_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: str | None, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert device._fair_threads() == threads
