"""The stream of batches: one and the same over ranks, prefetching, sources, stops and restarts."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_mcore.data.collate import make_batch
from geneformer_mcore.data.loader import Budget, Feed
from geneformer_mcore.store import local_cache
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.types import NUM_SPECIALS, Batch, KnownLengths, RaggedCells, TokenSource
from tests.distributed.ranks import run_ranks
from tests.support.small_store import write_small_store
from tests.unit.data.identified_cells import VOCABULARY, Cells, Spanned, cell, feed, ragged, sights

BATCH = 24
NUM_CELLS = 500
CELLS = Cells(NUM_CELLS)
BUDGET = Budget(150)
SIZES = (1, 2, 3, 4, 8)
FEW_SIZES = (1, 3, 8)
STEPS_PAST_AN_EPOCH = NUM_CELLS // BATCH + 3


def feeds_of(source: TokenSource, size: int, **changes) -> list[Feed]:
    """Of all ranks, over the first NUM_CELLS cells."""
    return [feed(source, rank, size, **{"num_cells": NUM_CELLS} | changes) for rank in range(size)]


def sights_of(batches: Iterable[Batch]) -> list[tuple[int, bytes]]:
    """Of the cells of all of these, sorted."""
    return sorted(itertools.chain.from_iterable(map(sights, batches)))


def stream_hash(source, size: int, prefetch: int, steps: int = 45, maker=make_batch) -> str:
    """Of the cells and masks of all ranks, step after step, in the order of the global batch."""
    digest = hashlib.sha256()
    feeds = feeds_of(source, size, maker=maker)
    streams = [each.steps(0, prefetch) for each in feeds]
    for _ in range(steps):
        assigned = [list(sights(next(stream)[0])) for stream in streams]
        for i in range(BATCH):
            key, seen = assigned[i % size][i // size]
            digest.update(key.to_bytes(8, "little") + seen)
    for stream in streams:
        stream.close()
    return digest.hexdigest()


@pytest.fixture(scope="module")
def truth() -> str:
    return stream_hash(CELLS, 1, 0)


@pytest.mark.parametrize(
    ("size", "prefetch"), [*((size, 0) for size in SIZES), (1, 1), (2, 4), (3, 1), (8, 4)]
)
def test_one_stream_over_ranks_and_prefetching(truth: str, size: int, prefetch: int) -> None:
    assert stream_hash(CELLS, size, prefetch) == truth


def steps_of(source, size: int, budget, maker=make_batch) -> Iterator[list[tuple[int, bytes]]]:
    """The cells and masks of all ranks, step after step."""
    feeds = feeds_of(source, size, maker=maker, budget=budget)
    for position in range(0, 45 * BATCH, BATCH):
        steps = [each.step(position) for each in feeds]
        assert len({len(batches) for batches in steps}) == 1, "ranks differ in micro batches"
        batches = list(itertools.chain.from_iterable(steps))
        assert len({batch.tokens_BS.shape for batch in batches}) == 1
        yield sights_of(batches)


def assert_packed_is_padded(packed, padded, maker=make_batch, size=3, budget=BUDGET) -> None:
    """Sources: a step has the same cells and masks, whether packed or not."""
    expected = steps_of(padded, 1, None)
    for found, wanted in zip(steps_of(packed, size, budget, maker), expected, strict=True):
        assert found == wanted


@pytest.mark.parametrize("size", FEW_SIZES)
@pytest.mark.parametrize("budget", [Budget(64), Budget(200, multiple=2), Budget(5000)])
def test_packed_the_cells_of_a_step_are_the_same(size: int, budget: Budget) -> None:
    assert_packed_is_padded(CELLS, CELLS, size=size, budget=budget)


@pytest.mark.parametrize(("size", "batch", "window_spans"), [(1, 70, 1), (2, 60, 2), (3, 99, 3)])
def test_packed_steps_that_straddle_windows(size: int, batch: int, window_spans: int) -> None:
    """A rank's cells come in the order of its micro batches, newer windows before older ones."""
    sources = Spanned(NUM_CELLS), CELLS
    assert [isinstance(source, KnownLengths) for source in sources] == [True, False]
    changes = {"batch": batch, "spans": (16, window_spans), "budget": BUDGET}
    pairs = zip(*(feeds_of(source, size, **changes) for source in sources), strict=True)
    for spanned, whole in pairs:
        for position in range(0, 60 * batch, batch):
            steps = (spanned.step(position), whole.step(position))
            found, expected = ([sights_of([one]) for one in batches] for batches in steps)
            assert found == expected


def test_packed_batches_are_full() -> None:
    packing = feed(CELLS, budget=Budget(200))
    for position in range(0, 10 * BATCH, BATCH):
        batches = packing.step(position)
        real = sum(batch.num_tokens for batch in batches)
        assert batches[0].tokens_BS.shape[1] <= 200
        assert real > 0.85 * sum(batch.tokens_BS.numel() for batch in batches)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[TokenStore]:
    path = tmp_path_factory.mktemp("stream") / "store"
    cells = [cell(number).tolist() for number in range(NUM_CELLS)]
    write_small_store(path, cells, VOCABULARY - NUM_SPECIALS, 64)
    with TokenStore.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def truth_of_the_store(store) -> str:
    """By the tokens that it was made of: of the store, the order of cells alone is used."""
    names = [f"c{number}" for number in range(NUM_CELLS)]
    number_of = dict(zip(cell_keys("d", names).tolist(), range(NUM_CELLS), strict=True))

    class InMemory(Cells):
        def read(self, start: int, stop: int) -> RaggedCells:
            keys_N = store.read(start, stop).keys_N
            return ragged([cell(number_of[key]) for key in keys_N.tolist()], keys_N)

    return stream_hash(InMemory(NUM_CELLS), 1, 0, STEPS_PAST_AN_EPOCH)


@pytest.fixture(scope="module", params=["store", "flat copy"])
def source(request, store, tmp_path_factory) -> TokenSource:
    if request.param == "store":
        return store
    manifest, cache = store.manifest, tmp_path_factory.mktemp("cache")
    return local_cache.ensure(store, manifest.content_hash, manifest.tokens, cache)


def test_one_stream_over_ranks_and_sources(truth_of_the_store, source, store) -> None:
    for size in FEW_SIZES:
        assert stream_hash(source, size, 2, STEPS_PAST_AN_EPOCH) == truth_of_the_store
    assert_packed_is_padded(source, store)


def stream_by_dali(path: Path) -> set[str]:
    from geneformer_mcore.data.dali import DaliBatches

    maker = DaliBatches(torch.device("cpu"))
    with TokenStore.open(path) as store:
        assert_packed_is_padded(store, store, maker)
        return {stream_hash(store, size, 2, STEPS_PAST_AN_EPOCH, maker) for size in FEW_SIZES}


def test_one_stream_by_dali(store, truth_of_the_store) -> None:
    """In a process of its own, as a rank is: once, in one that had run two thousand other tests, a
    thread of DALI's or TileDB's ended all of them with a segmentation fault."""
    pytest.importorskip("nvidia.dali")
    assert run_ranks(stream_by_dali, 1, store.path) == [{truth_of_the_store}]


@settings(max_examples=60)
@given(data=st.data())
def test_stops_and_restarts_continue_exactly(data: st.DataObject) -> None:
    """Stops at random steps, each time resuming with another number of ranks: the cells of every
    global batch are those of the run that never stopped."""
    undisturbed, position = feed(CELLS), 0
    for _ in range(data.draw(st.integers(1, 4))):
        feeds = feeds_of(CELLS, data.draw(st.sampled_from(SIZES)))
        steps = data.draw(st.integers(1, 3))
        position += BATCH * data.draw(st.integers(0, 30))
        for _ in range(steps):
            found = itertools.chain.from_iterable(each.step(position) for each in feeds)
            assert sights_of(found) == sights_of(undisturbed.step(position))
            position += BATCH


@pytest.mark.parametrize("size", SIZES)
def test_each_epoch_sees_each_cell_once_with_its_own_tokens_and_masks(size: int) -> None:
    """Over all ranks and two epochs; labels put back the tokens that were masked."""
    num_cells = BATCH * 21 - 5
    feeds = feeds_of(Cells(num_cells), size, num_cells=num_cells)
    seen: dict[tuple[int, int], bytes] = {}
    for position in range(0, 2 * 21 * BATCH, BATCH):
        _, epochs = feeds[0].order.rows(position, position + BATCH)
        for rank, each in enumerate(feeds):
            (batch,) = each.step(position)
            tokens = batch.tokens_BS.flatten().clone()
            tokens[batch.selected_M] = batch.labels_M.int()
            rows = tokens.view_as(batch.tokens_BS)
            for row, n, key in zip(rows, batch.lengths_N, batch.keys_N.tolist(), strict=True):
                assert row[: int(n)].tolist() == cell(key).tolist()
            for epoch, (key, sight) in zip(epochs[rank::size].tolist(), sights(batch), strict=True):
                assert (epoch, key) not in seen
                seen[epoch, key] = sight
    assert {key for epoch, key in seen if epoch == 0} == set(range(num_cells))
    again = [key for epoch, key in seen if epoch == 1 and key % 50 > 30]
    assert len(again) > 100
    assert not [key for key in again if seen[0, key] == seen[1, key]], "other masks"


@pytest.mark.parametrize(("size", "spans_per_window"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 8)])
def test_a_rank_reads_only_the_spans_it_meets(size: int, spans_per_window: int) -> None:
    """Of every full window of eight spans; each whole, and none twice in an epoch, but by ranks
    that share it (three ranks share all)."""
    for rank in range(size):
        source = Cells(16 * 64)
        each = feed(source, rank, size, spans=(16, 8))
        for position in range(0, 16 * 64 - BATCH, BATCH):
            each.step(position)
        assert len(source.reads) == len(set(source.reads)) == 8 * spans_per_window
        assert {(start % 16, stop - start) for start, stop in source.reads} == {(0, 16)}


def test_a_batch_mixes_as_many_spans_as_a_window_holds() -> None:
    rows, _ = feed(Cells(64 * 64), spans=(64, 16)).order.rows(0, 64 * 64)
    spans = (rows // 64).reshape(-1, 32)
    assert min(len(np.unique(batch)) for batch in spans) == 16
    # Within a span cells come in no order: neighbours are as far apart as chance makes them.
    steps = np.abs(np.diff(rows[:1024].reshape(64, 16)[:, 0]))
    assert 64 / 3 * 0.7 < steps.mean() < 64 / 3 * 1.3


def test_a_batch_larger_than_several_windows_is_whole() -> None:
    """More spans at once than two windows hold: the pool grows, and gives the same cells."""
    source = Cells(200)
    each = feed(source, batch=72, spans=(8, 1))
    seen = [key for step in range(3) for b in each.step(step * 72) for key in b.keys_N.tolist()]
    assert seen == each.order.rows(0, 216)[0].tolist()
    whole = dict(sights_of(feed(source, batch=200).step(0)))
    assert dict(sights_of(each.step(0))) == {key: whole[key] for key in seen[:72]}


def test_cells_are_truncated_to_seq_length_from_every_source(tmp_path) -> None:
    copy = local_cache.ensure(CELLS, "d" * 64, 10**5, tmp_path)
    short, from_copy = (feed(source, seq_length=20, pad=4) for source in (CELLS, copy))
    for position in range(0, 4 * BATCH, BATCH):
        (one,), (other,) = short.step(position), from_copy.step(position)
        assert int(one.lengths_N.max()) == 20
        assert list(sights(one)) == list(sights(other))


@pytest.mark.parametrize("broken_from", [0, 96])
def test_an_error_of_the_source_reaches_the_consumer_and_ends_the_thread(broken_from: int) -> None:
    class Breaks(Cells):
        def read(self, start: int, stop: int) -> RaggedCells:
            if start >= broken_from:
                raise OSError("cut off")
            return super().read(start, stop)

    with pytest.raises(OSError, match="cut off"):
        list(itertools.islice(feed(Breaks(NUM_CELLS)).steps(0, 2), 21))
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
