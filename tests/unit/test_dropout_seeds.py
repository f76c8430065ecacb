"""Seeds of dropout by where a rank stands: no two places may drop the same units."""

from __future__ import annotations

import itertools

import pytest

from geneformer_mcore.distributed import groups
from geneformer_mcore.distributed.groups import Topology

TENSOR, PIPELINE, DATA = 2, 3, 4


def seeds_of(seed: int, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int, int], int]:
    """(tensor, pipeline, data rank) -> what Megatron is given."""
    given: list[int] = []
    name = "model_parallel_cuda_manual_seed"
    monkeypatch.setattr(groups.tensor_parallel, name, lambda found, **_: given.append(found))
    places = list(itertools.product(range(TENSOR), range(PIPELINE), range(DATA)))
    for rank, (tensor, pipeline, data) in enumerate(places):
        groups.seed_dropout(
            seed, Topology(rank, len(places), tensor, pipeline, PIPELINE, data, DATA)
        )
    return dict(zip(places, given, strict=True))


def test_places_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than Megatron adds for tensor ranks, which get the same one."""
    seeds = seeds_of(5, monkeypatch)
    assert all(seeds[0, p, d] == seeds[1, p, d] for p in range(PIPELINE) for d in range(DATA))
    found = sorted(set(seeds.values()))
    assert len(found) == PIPELINE * DATA
    assert min(b - a for a, b in itertools.pairwise(found)) > 2718 + TENSOR


def test_seeds_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = seeds_of(5, monkeypatch), seeds_of(6, monkeypatch)
    assert not set(one.values()) & set(other.values())
