"""Labels of a run: the cells that have one, the classes, and values that are no label."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from geneformer_mcore.data.collate import make_batch
from geneformer_mcore.data.labelled import LabelledBatches, labelled_source
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.errors import DataError
from geneformer_mcore.inference.cells import rows_with
from geneformer_mcore.io.frames import label_texts
from geneformer_mcore.training.datasets import RunCells
from geneformer_mcore.training.finetuning import labelled
from geneformer_mcore.types import CellViews, KnownLengths, RaggedCells, RandomAccess
from tests.support.small_cells import vocabulary_of
from tests.unit.data.identified_cells import views

NUM_CELLS = 20
KEYS = np.arange(NUM_CELLS, dtype=np.uint64) * np.uint64(7)


class Stored:
    """Cells of 2 to 6 tokens, by row."""

    def __init__(self) -> None:
        self.all_lengths = np.arange(NUM_CELLS) % 5 + 2
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> RaggedCells:
        self.reads.append((start, stop))
        lengths = self.all_lengths[start:stop]
        tokens_T = np.repeat(np.arange(start, stop), lengths).astype(np.uint16)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return RaggedCells(tokens_T, offsets, KEYS[start:stop])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.all_lengths[rows]


class Mapped(Stored):
    """The same from memory."""

    def views(self, rows: np.ndarray) -> CellViews:
        return views(self.read(0, NUM_CELLS)).part(rows)


def cells_with(values: Sequence[object]) -> RunCells:
    table = pa.table({"cell_key": KEYS, "kind": pa.array(values)})
    return RunCells(
        name="stores/x", vocabulary=vocabulary_of(9), content_hash="c",
        rows={"train": (0, 12), "validation": (12, 16), "test": (16, 20)},
        seq_length=8, source=Stored(), span_cells=4, window_spans=1,
        names=lambda rows: [f"c{row}" for row in rows], labels=lambda name: table,
    )  # fmt: skip


VALUES = ["b", None, "a", "b", "", "b", "a", "nan", "b", "a", "a", "b",
          "a", "z", None, "b", "z", "b", "a", "y"]  # fmt: skip
KNOWN = [0, 2, 3, 5, 6, 8, 9, 10, 11, 12, 15, 17, 18]


def test_classes_and_skipped_cells() -> None:
    cells, labels = labelled(cells_with(VALUES), "kind")
    assert labels.classes == ("a", "b")
    assert labels.counts == {
        "train": {"a": 4, "b": 5}, "validation": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}
    }  # fmt: skip
    assert labels.unlabelled == {"train": 3, "validation": 1, "test": 0}
    assert labels.unseen == {"y": 1, "z": 2}
    assert cells.rows == {"train": (0, 9), "validation": (9, 11), "test": (11, 13)}
    assert labels.keys_N.tolist() == KEYS[KNOWN].tolist()
    assert labels.classes_N.tolist() == [int(VALUES[row] == "b") for row in KNOWN]
    assert cells.names(np.array([1, 12])) == ["c2", "c18"]
    lines = "\n".join(labels.told())
    for part in ("2 classes, 9 training cells, the fewest 4 of a class", "y (1), z (2)",
                 "4 cell(s) without a value of kind are left out"):  # fmt: skip
        assert part in lines


@pytest.mark.parametrize("kind", [Stored, Mapped])
def test_the_cells_are_those_with_a_label(kind: type[Stored]) -> None:
    source = labelled_source(kind(), np.array(KNOWN))
    assert isinstance(source, KnownLengths)
    assert isinstance(source, RandomAccess) == (kind is Mapped)
    block = source.read(2, 11)
    assert block.tokens_T[block.offsets[:-1]].tolist() == KNOWN[2:11]
    assert block.lengths.tolist() == source.lengths(np.arange(2, 11)).tolist()
    assert block.keys_N.tolist() == KEYS[KNOWN[2:11]].tolist()
    assert len(source.read(3, 3)) == 0
    if isinstance(source, RandomAccess):
        assert source.views(np.array([12, 0])).ragged().keys_N.tolist() == [7 * 18, 0]


def test_cells_far_apart_are_read_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geneformer_mcore.data.labelled._FAR", 3)
    stored, rows = Stored(), np.array([0, 2, 9, 10, 19])
    block = labelled_source(stored, rows).read(0, 5)
    assert stored.reads == [(0, 3), (9, 11), (19, 20)]
    assert block.keys_N.tolist() == KEYS[rows].tolist()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (["a", None] * 10, "have 1 (a)"),
        ([None] * 20, "have 0"),
        ([f"cell {i}" for i in range(20)], "12 values in 12 training cells"),
        ([0.5, 1.5] * 10, "numbers with a fraction"),
    ],
)
def test_values_that_are_no_label(values: list[object], error: str) -> None:
    with pytest.raises(DataError, match=rf"{re.escape(error)}.*Remedy: another `label=`"):
        labelled(cells_with(values), "kind")


@pytest.mark.parametrize("values", [[3, 11], [True, False]])
def test_whole_numbers_and_truths_are_names(values: list[object]) -> None:
    _, labels = labelled(cells_with(values * 10), "kind")
    assert set(labels.classes) == set(map(str, values))


@pytest.mark.parametrize("packed", [False, True])
def test_batches_predict_classes_and_mask_nothing(packed: bool) -> None:
    block = Stored().read(3, 8)
    classes = np.arange(NUM_CELLS) % 4
    # In another order than the cells: they are found by their keys.
    order = np.random.default_rng(0).permutation(NUM_CELLS)
    maker = LabelledBatches(make_batch, KEYS[order], classes[order])
    masking = Masking(0.9, (1.0, 0.0, 0.0), 14, 1)
    idle = np.array([False, False, True, False, False])
    batch = maker(views(block), np.zeros(5, np.int64), idle, masking, 32, packed)
    predicted = [3, 4, 6, 7]
    flat = batch.tokens_BS.flatten()
    assert flat[batch.selected_M].tolist() == predicted
    assert batch.labels_M.tolist() == [row % 4 for row in predicted]
    starts = block.offsets[:-1] if packed else np.arange(5) * 32
    assert batch.selected_M.tolist() == starts[~idle].tolist()
    assert sorted(flat[flat != 2].tolist()) == sorted(block.tokens_T.tolist())


def test_whole_numbers_of_which_some_are_missing_are_no_fractions() -> None:
    """They are floats in every h5ad; every command knows a label by the same text."""
    numbers = [0.0, 3.0, float("nan"), 11.0] * 5
    _, labels = labelled(cells_with(numbers), "kind")
    assert labels.classes == ("0", "11", "3")
    assert labels.unlabelled["train"] == 3
    obs = pd.DataFrame({"kind": numbers})
    assert label_texts(obs["kind"]).tolist() == ["0", "3", "", "11"] * 5
    assert rows_with(obs, "kind=3", "a.h5ad").tolist() == [1, 5, 9, 13, 17]
    texts = pd.Categorical([" a", "None", None, "nan", "0.5"])
    assert label_texts(pd.Series(texts)).tolist() == ["a", "", "", "", "0.5"]
