"""Makers of batches: compiled loops and DALI make what the plain one does, DALI by itself."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from nvidia.dali import Pipeline

from geneformer_mcore import backends, exit_codes
from geneformer_mcore.config import load
from geneformer_mcore.data import collate as batch_module
from geneformer_mcore.data.collate import Collator, assembled, make_batch, rows_of
from geneformer_mcore.data.dali import DaliBatches, MaskingPipeline
from geneformer_mcore.data.masking import VALIDATION_EPOCH, Masking
from geneformer_mcore.training import datasets
from geneformer_mcore.types import CLS, NUM_SPECIALS, PAD, Batch, CellViews
from tests.unit.data.identified_cells import MASKING

CPU = torch.device("cpu")
MASKINGS = (
    MASKING,
    Masking(0.15, (0.8, 0.02, 0.18), 25_429, seed=2**40 + 1),
    Masking(0.5, (1 / 3, 1 / 3, 1 / 3), NUM_SPECIALS + 1, seed=3),
    Masking(0.0, (0.8, 0.1, 0.1), 300, seed=1),
    Masking(1e-6, (0.8, 0.1, 0.1), 25_429, seed=2**63 - 1),
    Masking(1.0, (1.0, 0.0, 0.0), 300, seed=1),
    Masking(1.0, (0.0, 0.0, 1.0), 300, seed=1),
)


@pytest.fixture(scope="module")
def dali() -> DaliBatches:
    """One maker for many batches, as in a run."""
    return DaliBatches(CPU)


def scattered(rng: np.random.Generator, lengths: list[int], vocabulary_size: int) -> CellViews:
    """Random cells of these lengths, in one array that cannot be written to, as a mapped file: the
    last comes first, and other tokens lie between them."""
    lengths_N = np.array(lengths, dtype=np.int64)
    starts_N = np.cumsum(lengths_N[::-1] + 3)[::-1] - lengths_N
    tokens_T = rng.integers(NUM_SPECIALS, vocabulary_size, int(starts_N[0]) + lengths[0])
    tokens_T = tokens_T.astype(np.uint16)
    tokens_T[starts_N] = CLS
    tokens_T.flags.writeable = False
    keys_N = rng.integers(0, 2**64, len(lengths), dtype=np.uint64)
    return CellViews(tokens_T, starts_N, lengths_N, keys_N)


def make_batch_plainly(cells, epochs_N, idle_N, masking, num_positions, packed=False) -> Batch:
    """The reference of the compiled loops and of DALI: a batch made by numpy."""
    ragged, lengths = cells.ragged(), cells.lengths_N
    seen_T, selected_T = masking.apply(ragged, epochs_N)
    selected_T &= ~np.repeat(idle_N, lengths)
    # Where each token goes in the flattened batch.
    rows = rows_of(lengths, num_positions, packed)
    place_T = np.arange(len(seen_T)) + np.repeat(rows[:-1] - ragged.offsets[:-1], lengths)
    tokens = np.full(rows[-1], PAD, dtype=np.int32)
    # Idle cells are shown as they are.
    tokens[place_T] = np.where(selected_T, seen_T, ragged.tokens_T)
    return assembled(
        cells,
        torch.from_numpy(tokens),
        torch.from_numpy(place_T[selected_T]),
        torch.from_numpy(ragged.tokens_T[selected_T].astype(np.int64)),
        num_positions,
        packed,
    )


def assert_equal(ours: Batch, expected: Batch) -> None:
    for name in ("tokens_BS", "lengths_N", "selected_M", "labels_M", "bounds", "keys_N"):
        mine, theirs = getattr(ours, name), getattr(expected, name)
        if theirs is None:
            assert mine is None, name
        else:
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
            assert (mine == theirs).all(), name
    assert ours.longest == expected.longest


def same_of(maker: Collator, lengths: list[int], masking: Masking, num_positions: int) -> Batch:
    """A batch of random cells, all of which count, after it was found equal to the plain one."""
    cells = scattered(np.random.default_rng(sum(lengths)), lengths, masking.vocabulary_size)
    given = (cells, np.arange(len(lengths)), np.zeros(len(lengths), bool), masking, num_positions)
    made = maker(*given)
    assert_equal(made, make_batch_plainly(*given))
    return made


@hypothesis.settings(max_examples=250)
@hypothesis.given(data=st.data())
def test_any_batch_is_the_plain_one(dali, data) -> None:
    """Cells, epochs, idle cells, masks and the number of positions change from call to call."""
    packed = data.draw(st.booleans())
    size = data.draw(st.sampled_from([0, 1, 3, 40] if packed else [1, 2, 7, 12]))
    lengths = data.draw(st.lists(st.integers(1, 130), min_size=size, max_size=size))
    epoch = st.sampled_from([0, 1, 1000, 2**40, VALIDATION_EPOCH])
    epochs_N = np.array(data.draw(st.lists(epoch, min_size=size, max_size=size)), np.int64)
    idle_N = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)
    masking = data.draw(st.sampled_from(MASKINGS))
    room = data.draw(st.integers(0 if lengths else 1, 100))
    num_positions = room + (sum(lengths) if packed else max(lengths))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    cells = scattered(rng, lengths or [3], masking.vocabulary_size).part(slice(size))
    given = (cells, epochs_N, idle_N, masking, num_positions, packed)
    expected = make_batch_plainly(*given)
    for maker in (make_batch, dali):
        assert_equal(maker(*given), expected)
    if packed:
        bounds = expected.bounds
        assert (bounds[0], bounds[-1]) == (0, num_positions)
        assert 0 < bounds.diff().min() <= bounds.diff().max() == expected.longest
        assert len(bounds) <= size + 2


@pytest.mark.parametrize("vocabulary_size", [NUM_SPECIALS + 1, 25_429, 2**16 - 1])
def test_every_random_gene_is_the_plain_one(vocabulary_size: int) -> None:
    """100,000 products that must be rounded alike before they are cut to whole numbers."""
    everything = Masking(1.0, (0.0, 1.0, 0.0), vocabulary_size, seed=5)
    made = same_of(DaliBatches(CPU), [2048] * 49, everything, 2048)
    assert len(made.labels_M) == 49 * 2047
    shown = made.tokens_BS[:, 1:]
    assert NUM_SPECIALS <= shown.min() <= shown.max() < vocabulary_size


def test_batches_stay_unchanged_and_threads_may_share_a_maker(dali) -> None:
    """DALI uses its memory again, for the next batch; and a pipeline has room for so many
    positions, then another one is built."""
    for num_positions in (5000, 64, 2048, 2049):
        same_of(dali, [num_positions, 3], MASKING, num_positions)
    kept, copies = [], []
    for longest in range(40, 80):
        kept.append(same_of(dali, [longest, 5], MASKING, 80))
        copies.append(kept[-1].tokens_BS.clone())
    assert all(torch.equal(batch.tokens_BS, copy) for batch, copy in zip(kept, copies, strict=True))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: same_of(dali, [n, 9], MASKING, 100), range(10, 90)))


def test_it_is_dali_that_masks_and_pads(monkeypatch) -> None:
    """The batch is one run of a pipeline of DALI's own operators, without any code of ours."""
    cells, runs = scattered(np.random.default_rng(1), [30, 7], 300), []
    given = (cells, np.zeros(2, int), np.zeros(2, bool), MASKING, 32)
    expected = make_batch_plainly(*given)

    def spied(pipeline: Pipeline, *args: object, **inputs: object) -> object:
        runs.append((pipeline, inputs))
        return run(pipeline, *args, **inputs)

    def forbidden(*args: object) -> None:
        raise AssertionError("a loop of ours was used")

    run = Pipeline.run
    monkeypatch.setattr(Pipeline, "run", spied)
    monkeypatch.setattr(Masking, "apply", forbidden)
    for name in ("make_batch", "fill_batch"):
        monkeypatch.setattr(batch_module, name, forbidden)
    assert_equal(DaliBatches(CPU)(*given), expected)

    ((pipeline, inputs),) = runs
    tokens = np.split(cells.ragged().tokens_T, [30])
    assert all(map(np.array_equal, inputs["tokens"], tokens))
    operators = pipeline.serialize()
    for operator in (b"mul(", b"bitxor(", b"rshift(", b"lt(", b"floor(", b"Pad", b"Slice"):
        assert operator in operators, operator
    for foreign in (b"PythonFunction", b"NumbaFunc", b"DLTensor"):
        assert foreign not in operators, foreign


def test_with_a_gpu_all_but_the_inputs_is_there(monkeypatch) -> None:
    """Read from the graph, which can be drawn up without a GPU."""
    outputs: list = []
    monkeypatch.setattr(Pipeline, "set_outputs", lambda _pipeline, *nodes: outputs.extend(nodes))
    MaskingPipeline(4, 64, MASKING, device_id=0, num_threads=1)
    operators, waiting = set(), [node.source for node in outputs]
    while waiting:
        operator = waiting.pop()
        if operator not in operators:
            operators.add(operator)
            waiting += [node.source for node in operator.inputs]
    on_cpu = {operator.name for operator in operators if operator.outputs[0].device == "cpu"}
    inputs = {"tokens", "streams", "idle", "num_positions"}
    assert inputs < on_cpu
    # What else: how long each cell is, by which the places are cut; and one flag per cell.
    assert len(on_cpu - inputs) == 2
    assert len(operators) > 50


def test_a_batch_on_a_gpu_is_not_pinned() -> None:
    """torch refuses to pin such a tensor: this one has no such call."""
    there = SimpleNamespace(is_cuda=True)
    batch = Batch(there, there, there, there, np.zeros(1, np.uint64))
    assert batch.pinned() is batch


def test_a_missing_dali_is_an_error_of_the_settings(monkeypatch, capsys) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: name != "nvidia.dali" or None)
    # As where it is missing: its module could not be imported either.
    monkeypatch.setitem(sys.modules, "geneformer_mcore.data.dali", None)
    config, _ = load(None, ["data.loader=dali"])
    with pytest.raises(SystemExit) as ended:
        exit_codes.run(lambda: datasets.maker(config, CPU) and 0)
    assert ended.value.code == exit_codes.WRONG_INPUT == 2
    error = capsys.readouterr().err
    assert "pip install nvidia-dali-cuda130" in error
    assert "data.loader=thread" in error
