"""The stream of batches: one and the same over ranks, prefetching, sources, stops and restarts."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_mcore.data.collate import Collator, cells_of, make_batch
from geneformer_mcore.data.loader import Budget, Feed, Share
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.store import local_cache
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.types import NUM_SPECIALS, Batch, KnownLengths, RaggedCells, TokenSource
from tests.distributed.ranks import run_ranks
from tests.small_store import write_small_store
from tests.unit.identified_cells import (
    MASKING,
    VOCABULARY,
    Cells,
    cell,
    feed,
    ragged,
    true_tokens,
    views,
)
from tests.unit.plain_batch import make_batch_plainly

BATCH = 24
NUM_CELLS = 500
SIZES = (1, 2, 3, 4, 8)
FEW_SIZES = (1, 3, 8)
STEPS_PAST_AN_EPOCH = NUM_CELLS // BATCH + 3


def sights(batch: Batch) -> Iterator[tuple[int, bytes]]:
    """(key, all that is seen of the cell and asked of it) of every cell of a batch."""
    num_positions = batch.tokens_BS.shape[1]
    tokens = batch.tokens_BS.flatten().numpy().astype("<i8")
    cells, selected = cells_of(batch, batch.selected_M).numpy(), batch.selected_M.numpy()
    for b, key in enumerate(batch.keys_N.tolist()):
        start = b * num_positions if batch.bounds is None else int(batch.bounds[b])
        here = cells == b
        asked = [selected[here] - start, batch.labels_M.numpy()[here]]
        seen = tokens[start : start + int(batch.lengths_N[b])]
        yield key, seen.tobytes() + b"|" + np.stack(asked).tobytes()


def stream_hash(
    source: TokenSource,
    size: int,
    prefetch: int,
    steps: int = 45,
    maker: Collator = make_batch,
) -> str:
    """Of the cells and masks of all ranks, step after step, in the order of the global batch."""
    order = Sampler(0, NUM_CELLS, span_cells=8, window_spans=3, seed=7)
    feeds = [
        Feed(source, order, MASKING, Share(BATCH, BATCH // size, rank, size), 64, 16, maker)
        for rank in range(size)
    ]
    digest = hashlib.sha256()
    streams = [each.steps(0, prefetch) for each in feeds]
    for _ in range(steps):
        dealt = [list(sights(next(stream)[0])) for stream in streams]
        for i in range(BATCH):
            key, seen = dealt[i % size][i // size]
            digest.update(key.to_bytes(8, "little") + seen)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    return digest.hexdigest()


@pytest.fixture(scope="module")
def truth() -> str:
    return stream_hash(Cells(NUM_CELLS), 1, 0)


@pytest.mark.parametrize(
    ("size", "prefetch"), [*((size, 0) for size in SIZES), (1, 1), (2, 4), (3, 1), (8, 4)]
)
def test_one_stream_over_ranks_and_prefetching(truth: str, size: int, prefetch: int) -> None:
    assert stream_hash(Cells(NUM_CELLS), size, prefetch) == truth


def steps_of(
    source: TokenSource, size: int, budget: Budget | None, maker: Collator = make_batch
) -> Iterator[list[tuple[int, bytes]]]:
    """The cells and masks of all ranks, step after step, sorted."""
    order = Sampler(0, NUM_CELLS, span_cells=8, window_spans=3, seed=7)
    share = [Share(BATCH, BATCH // size, rank, size) for rank in range(size)]
    feeds = [Feed(source, order, MASKING, each, 64, 16, maker, budget) for each in share]
    for position in range(0, 45 * BATCH, BATCH):
        steps = [feed.step(position) for feed in feeds]
        assert len({len(batches) for batches in steps}) == 1, "ranks differ in micro batches"
        batches = list(itertools.chain.from_iterable(steps))
        assert len({batch.tokens_BS.shape for batch in batches}) == 1
        yield sorted(itertools.chain.from_iterable(map(sights, batches)))


@pytest.mark.parametrize("size", FEW_SIZES)
@pytest.mark.parametrize("budget", [Budget(64), Budget(200, multiple=2), Budget(5000)])
def test_packed_the_cells_of_a_step_are_the_same(size: int, budget: Budget) -> None:
    cells = Cells(NUM_CELLS)
    for packed, padded in zip(steps_of(cells, size, budget), steps_of(cells, 1, None), strict=True):
        assert packed == padded


class Spanned(Cells):
    """Cells that are read by spans, and whose lengths are known: as a token store's."""

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return rows % 50 + 2


@pytest.mark.parametrize(
    ("size", "global_batch", "window_spans"), [(1, 70, 1), (2, 60, 2), (3, 99, 3)]
)
def test_packed_steps_that_straddle_windows(
    size: int, global_batch: int, window_spans: int
) -> None:
    """A rank's cells come in the order of its micro batches, newer windows before older ones."""
    order = Sampler(0, NUM_CELLS, span_cells=16, window_spans=window_spans, seed=3)
    sources = Spanned(NUM_CELLS), Cells(NUM_CELLS)
    assert [isinstance(source, KnownLengths) for source in sources] == [True, False]
    for rank in range(size):
        share = Share(global_batch, 1, rank, size)
        feeds = [
            Feed(source, order, MASKING, share, 64, 8, budget=Budget(150)) for source in sources
        ]
        for position in range(0, 60 * global_batch, global_batch):
            found, wanted = (
                [sorted(sights(batch)) for batch in feed.step(position)] for feed in feeds
            )
            assert found == wanted


def test_packed_batches_are_full() -> None:
    order = Sampler(0, NUM_CELLS, span_cells=8, window_spans=3, seed=7)
    feed = Feed(Cells(NUM_CELLS), order, MASKING, Share(BATCH, 1, 0, 1), 64, 8, budget=Budget(200))
    for position in range(0, 10 * BATCH, BATCH):
        batches = feed.step(position)
        real = sum(batch.num_tokens for batch in batches)
        places = sum(batch.tokens_BS.numel() for batch in batches)
        assert batches[0].tokens_BS.shape[1] <= 200
        assert real > 0.85 * places


class Given:
    """Cells held in memory, row by row (a TokenSource)."""

    def __init__(self, cells: list[np.ndarray], keys_N: np.ndarray) -> None:
        self.cells, self.keys_N = cells, keys_N

    def read(self, start: int, stop: int) -> RaggedCells:
        return ragged(self.cells[start:stop], self.keys_N[start:stop])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenStore]:
    path = tmp_path_factory.mktemp("stream") / "store"
    cells = [cell(number).tolist() for number in range(NUM_CELLS)]
    write_small_store(path, cells, VOCABULARY - NUM_SPECIALS, 64)
    with TokenStore.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def truth_of_the_store(store: TokenStore) -> str:
    """By the tokens that the store was made of: of the store, the order of cells alone is used."""
    number_of = {
        int(key): number
        for number, key in enumerate(cell_keys("d", [f"c{i}" for i in range(NUM_CELLS)]))
    }
    keys_N = store.read(0, NUM_CELLS).keys_N
    given = Given([cell(number_of[int(key)]) for key in keys_N], keys_N)
    return stream_hash(given, 1, 0, STEPS_PAST_AN_EPOCH)


@pytest.fixture(scope="module", params=["store", "flat copy"])
def source(
    request: pytest.FixtureRequest, store: TokenStore, tmp_path_factory: pytest.TempPathFactory
) -> TokenSource:
    if request.param == "flat copy":
        manifest, cache = store.manifest, tmp_path_factory.mktemp("cache")
        return local_cache.ensure(store, manifest.content_hash, manifest.tokens, cache)
    return store


def assert_packed_is_padded(
    source: TokenSource, store: TokenStore, maker: Collator = make_batch
) -> None:
    padded = steps_of(store, 1, None)
    for packed, wanted in zip(steps_of(source, 3, Budget(150), maker), padded, strict=True):
        assert packed == wanted


def test_packed_one_stream_from_every_source(source: TokenSource, store: TokenStore) -> None:
    assert_packed_is_padded(source, store)


@pytest.mark.parametrize("size", FEW_SIZES)
def test_one_stream_over_ranks_and_sources(
    truth_of_the_store: str, source: TokenSource, size: int
) -> None:
    assert stream_hash(source, size, 2, STEPS_PAST_AN_EPOCH) == truth_of_the_store


def stream_by_dali(path: Path, sizes: tuple[int, ...]) -> list[str]:
    from geneformer_mcore.data.dali import DaliBatches

    maker = DaliBatches(torch.device("cpu"))
    with TokenStore.open(path) as store:
        assert_packed_is_padded(store, store, maker)
        return [stream_hash(store, size, 2, STEPS_PAST_AN_EPOCH, maker) for size in sizes]


def test_one_stream_by_dali(store: TokenStore, truth_of_the_store: str) -> None:
    """In a process of its own, as a rank is: once, in one that had run two thousand other tests, a
    thread of DALI's or TileDB's ended all of them with a segmentation fault."""
    pytest.importorskip("nvidia.dali")
    (found,) = run_ranks(stream_by_dali, 1, store.path, FEW_SIZES)
    assert found == [truth_of_the_store] * len(FEW_SIZES)


@settings(max_examples=60)
@given(data=st.data())
def test_stops_and_restarts_continue_exactly(data: st.DataObject) -> None:
    """Stops at random steps, each time going on with another number of ranks: the cells of every
    global batch are those of the run that never stopped."""
    source, undisturbed = Cells(NUM_CELLS), feed(Cells(NUM_CELLS))
    position = 0
    for _ in range(data.draw(st.integers(1, 4))):
        size, steps = data.draw(st.sampled_from(SIZES)), data.draw(st.integers(1, 3))
        feeds = [feed(source, rank, size) for rank in range(size)]
        position += BATCH * data.draw(st.integers(0, 30))
        for _ in range(steps):
            dealt = sorted(s for f in feeds for batch in f.step(position) for s in sights(batch))
            whole = sorted(s for batch in undisturbed.step(position) for s in sights(batch))
            assert dealt == whole
            position += BATCH


@pytest.mark.parametrize("size", SIZES)
def test_each_epoch_sees_each_cell_once_with_its_own_tokens(size: int) -> None:
    """Over all ranks, from steps that straddle epochs; tokens are told apart from masks by the
    labels, which put back what was hidden."""
    num_cells = BATCH * 21 - 5
    feeds = [feed(Cells(num_cells), rank, size) for rank in range(size)]
    order, seen = feeds[0].order, []
    for step in range(2 * 21):
        _, epochs = order.rows(step * BATCH, (step + 1) * BATCH)
        for rank, each in enumerate(feeds):
            (batch,) = each.step(step * BATCH)
            tokens = batch.tokens_BS.flatten().clone()
            tokens[batch.selected_M] = batch.labels_M.int()
            rows = tokens.view_as(batch.tokens_BS)
            for row, n, key in zip(rows, batch.lengths_N, batch.keys_N.tolist(), strict=True):
                assert row[: int(n)].tolist() == true_tokens(key)
            seen += list(zip(epochs[rank::size].tolist(), batch.keys_N.tolist(), strict=True))
    assert len(set(seen)) == len(seen)
    assert {key for epoch, key in seen if epoch == 0} == set(range(num_cells))


def test_the_masks_of_a_cell_change_from_epoch_to_epoch() -> None:
    alike, order = 0, feed(Cells(NUM_CELLS)).order
    first = dict(s for step in range(21) for b in feed(Cells(NUM_CELLS)).step(step * 24)
                 for s in sights(b))  # fmt: skip
    assert order.num_cells == NUM_CELLS
    second = dict(s for step in range(21, 42) for b in feed(Cells(NUM_CELLS)).step(step * 24)
                  for s in sights(b))  # fmt: skip
    long = [key for key in first.keys() & second.keys() if key % 50 > 30]
    alike = sum(first[key] == second[key] for key in long)
    assert len(long) > 100
    assert alike == 0


@pytest.mark.parametrize(("size", "spans_per_window"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 8)])
def test_a_rank_reads_only_the_spans_it_meets(size: int, spans_per_window: int) -> None:
    """Of every full window of eight spans; no span twice in an epoch, but by ranks that share it
    (three ranks share all)."""
    sources = [Cells(16 * 64) for _ in range(size)]
    order = Sampler(0, 16 * 64, span_cells=16, window_spans=8, seed=3)
    for rank, source in enumerate(sources):
        each = Feed(source, order, MASKING, Share(24, 24 // size, rank, size), 64, 16)
        for step in range(16 * 64 // 24):
            each.step(step * 24)
        assert len(source.reads) == len(set(source.reads)) == 8 * spans_per_window


def test_a_batch_mixes_as_many_spans_as_a_window_holds() -> None:
    order = Sampler(0, 64 * 64, span_cells=64, window_spans=16, seed=3)
    rows, _ = order.rows(0, 64 * 64)
    spans = (rows // 64).reshape(-1, 32)
    assert min(len(np.unique(batch)) for batch in spans) == 16
    # Within a span cells come in no order: neighbours are as far apart as chance makes them.
    steps = np.abs(np.diff(rows[:1024].reshape(64, 16)[:, 0]))
    assert 64 / 3 * 0.7 < steps.mean() < 64 / 3 * 1.3


def test_a_batch_larger_than_several_windows_is_whole() -> None:
    """More spans at once than two windows hold: the pool grows, and gives the same cells."""
    source = Cells(200)
    order = Sampler(0, 200, span_cells=8, window_spans=1, seed=5)
    each = Feed(source, order, MASKING, Share(72, 72, 0, 1), 64, 16)
    seen = [key for step in range(3) for b in each.step(step * 72) for key in b.keys_N.tolist()]
    assert seen == order.rows(0, 216)[0].tolist()
    assert {key: s for b in each.step(0) for key, s in sights(b)} == {
        key: s for b in feed(source, batch=200).step(0) for key, s in sights(b) if key in seen[:72]
    }


def test_cells_are_cut_to_seq_length_wherever_they_come_from(tmp_path) -> None:
    copy = local_cache.ensure(Cells(NUM_CELLS), "d" * 64, 10**5, tmp_path)
    order = Sampler(0, NUM_CELLS, 8, 3, 7)
    share = Share(BATCH, BATCH, 0, 1)
    short, from_copy = (
        Feed(source, order, MASKING, share, 20, 4) for source in (Cells(NUM_CELLS), copy)
    )
    for step in range(4):
        (one,), (other,) = short.step(step * BATCH), from_copy.step(step * BATCH)
        assert int(one.lengths_N.max()) == 20
        assert list(sights(one)) == list(sights(other))


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    seed=st.integers(0, 2**63 - 1),
    probability=st.sampled_from([1e-6, 0.15, 0.5, 1.0]),
    fractions=st.sampled_from([(0.8, 0.02, 0.18), (0.8, 0.1, 0.1), (1.0, 0.0, 0.0), (0, 0, 1.0)]),
    data=st.data(),
)
def test_compiled_batches_are_the_plain_ones(
    lengths: list[int],
    seed: int,
    probability: float,
    fractions: tuple[float, float, float],
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(seed)
    cells = [rng.integers(5, 25_429, length).astype(np.uint16) for length in lengths]
    block = views(ragged(cells, rng.integers(0, 2**63, len(cells))))
    epochs = rng.integers(0, 2**40, len(cells))
    idle = np.array(data.draw(st.lists(st.booleans(), min_size=len(cells), max_size=len(cells))))
    masking = Masking(probability, fractions, 25_429, seed)
    positions = max(lengths) + data.draw(st.integers(0, 20))
    made, plain = (
        make(block, epochs, idle, masking, positions) for make in (make_batch, make_batch_plainly)
    )
    for name in ("tokens_BS", "lengths_N", "selected_M", "labels_M"):
        ours, truth = getattr(made, name), getattr(plain, name)
        assert ours.dtype == truth.dtype
        assert ours.tolist() == truth.tolist(), name
    assert np.array_equal(made.keys_N, plain.keys_N)


def test_a_cell_of_cls_alone_is_asked_nothing() -> None:
    block = views(ragged([np.zeros(1, np.uint16), cell(40)], np.array([1, 40])))
    always = Masking(1.0, (1.0, 0.0, 0.0), 300, 1)
    batch = make_batch(block, np.zeros(2, np.int64), np.zeros(2, bool), always, 48)
    assert batch.selected_M.tolist() == list(range(49, 48 + 42))


def test_an_error_of_the_source_comes_through_and_ends_the_thread() -> None:
    class Breaks(Cells):
        def read(self, start: int, stop: int) -> RaggedCells:
            if start >= 96:
                raise OSError("cut off")
            return super().read(start, stop)

    steps = feed(Breaks(NUM_CELLS)).steps(0, 2)
    with pytest.raises(OSError, match="cut off"):
        list(itertools.islice(steps, 21))
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
