"""Units of work: how they are cut and named, their files and labels, and how reports add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given

from geneformer_mcore.errors import DataError
from geneformer_mcore.io import progress
from geneformer_mcore.store.ingest import buckets, labels
from geneformer_mcore.store.ingest import plan as plans
from geneformer_mcore.store.ingest.sources import InputSource, Refusal, in_order
from geneformer_mcore.store.keys import order_keys
from geneformer_mcore.store.report import _binned, _median, _reached, sum_skipped
from geneformer_mcore.store.split.table import RandomSplit
from geneformer_mcore.tokenizer.genes import GeneMap, InputOptions
from tests.support.small_cells import flip_bit, vocabulary_of
from tests.support.small_store import cells_table, write_unit

# Buckets


def test_buckets_are_a_power_of_two_and_not_too_full() -> None:
    most = buckets.CELLS_PER_BUCKET
    assert [buckets.count_buckets(n) for n in (1, most, most + 1)] == [1, 1, 2]
    for cells in (10**5, 10**6, 23_600_000):
        found = buckets.count_buckets(cells)
        assert found & (found - 1) == 0
        assert most / 2 < cells / found <= most


@given(st.integers(0, 10), st.integers(0, 2**32), st.integers(0, 200))
def test_codes_ascend_with_split_and_order_key(power: int, seed: int, num_cells: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**64, num_cells, np.uint64)
    splits = rng.integers(0, 3, num_cells).astype(np.int8)
    codes = buckets.bucket_codes(keys, splits, 1 << power)
    assert codes.min(initial=0) >= 0
    assert codes.max(initial=0) < 3 << power
    by_key = np.lexsort((order_keys(keys), splits))
    assert np.all(np.diff(codes[by_key]) >= 0)
    order, starts = buckets.by_bucket(codes, 1 << power)
    assert (len(starts), starts[0], starts[-1]) == ((3 << power) + 1, 0, num_cells)
    for code in set(codes.tolist()):
        assert set(codes[order[starts[code] : starts[code + 1]]]) == {code}


def test_two_cells_may_share_a_key_but_not_their_names() -> None:
    def table(names: str) -> pa.Table:
        keys = pa.array([7, 7, 7], pa.uint64())
        return pa.table({"cell_key": keys, "dataset_id": ["d"] * 3, "cell_id": list(names)})

    for names in ("bac", "cba"):
        assert buckets.sorted_cells(table(names))["cell_id"].to_pylist() == ["a", "b", "c"]
    with pytest.raises(DataError, match="two cells are called 'a' in dataset 'd'"):
        buckets.sorted_cells(table("aba"))


# Files


def batches_of(folder: Path, report: plans.UnitReport, num_codes: int, keep_open: bool) -> list:
    """The cells of the unit "u", bucket by bucket."""
    reader = plans.UnitReader(folder, "u", report, keep_open)
    batches = [reader.read(code) for code in range(num_codes)]
    reader.close()
    return batches


def test_a_unit_s_file_gives_its_cells_back_by_bucket(tmp_path) -> None:
    cells = cells_table([[0, 5 + number % 90] for number in range(500)])
    split = RandomSplit(0.2, 0.1)
    report = write_unit(tmp_path, "u", cells, split, num_buckets=4)
    keys_N = cells["cell_key"].to_numpy()
    codes = buckets.bucket_codes(keys_N, split.assign(keys_N, ["d"] * 500), 4)
    for keep_open in (True, False):
        batches = batches_of(tmp_path, report, 12, keep_open)
        assert pa.Table.from_batches(batches).sort_by("number").equals(cells)
        assert [len(batch) for batch in batches] == np.bincount(codes, minlength=12).tolist()
    # Any Arrow reads it.
    with pa.OSFile(str(tmp_path / "u.arrows")) as file:
        assert pa.ipc.open_stream(file).read_all().num_rows == 500


def test_buckets_and_units_without_cells(tmp_path) -> None:
    cells = cells_table([[0, *range(5, 105)]] * 2000)
    few, many = (write_unit(tmp_path, "u", cells, RandomSplit(), number) for number in (1, 1024))
    assert (many.num_bytes - few.num_bytes) / (3 * 1023) < 2000, "next to no room"
    report = write_unit(tmp_path, "u", cells.slice(0, 0), RandomSplit())
    assert [len(batch) for batch in batches_of(tmp_path, report, 3, True)] == [0, 0, 0]


def test_reports_of_damaged_units_are_none(tmp_path) -> None:
    report = write_unit(tmp_path, "u", cells_table([[0, 5, 6]] * 9), RandomSplit())
    assert plans.read_report(tmp_path, "u") is None
    plans.write_report(tmp_path, "u", report)
    assert plans.read_report(tmp_path, "u") == plans.read_sound_report(tmp_path, "u") == report
    file, record = tmp_path / "u.arrows", tmp_path / "u.json"
    raw, text = file.read_bytes(), record.read_text()
    for byte in range(0, len(raw), 37):
        flip_bit(file, byte, 6)
        assert plans.read_report(tmp_path, "u") == report
        assert plans.read_sound_report(tmp_path, "u") is None
        file.write_bytes(raw)
    file.write_bytes(raw[:-1])
    assert plans.read_report(tmp_path, "u") is None
    file.write_bytes(raw)
    for damaged in ("", "[]", "{}", text[:-9], text.replace('"tokens": 27', '"tokens": 28')):
        record.write_text(damaged)
        assert plans.read_report(tmp_path, "u") is None
    record.write_text(text)
    for kept, num_files in (("u", 2), ("v", 0)):
        plans.remove_others(tmp_path, [kept])
        assert len(list(tmp_path.iterdir())) == num_files


# Labels


def test_kinds_of_labels() -> None:
    kept = {
        "type": (pd.Categorical(["a", None, "b"]), labels.TEXT),
        "year": (pd.Categorical([2001, 2002, 2001]), labels.INTEGER),
        "count": (np.array([1, 2, 3], dtype=np.uint8), labels.INTEGER),
        "large": (np.array([1, 2, 2**63], dtype=np.uint64), labels.NUMBER),
        "score": (np.array([0.5, np.nan, 1], dtype=np.float32), labels.NUMBER),
        "doublet": ([True, False, True], labels.TRUTH),
        "maybe": (pd.array([True, None, False], dtype="boolean"), labels.TRUTH),
        "words": (["x", None, "y"], labels.TEXT),
        "nothing": ([None, None, None], labels.TEXT),
        "day": (pd.to_datetime(["2020-01-01"] * 3), labels.TEXT),
    }
    left_out = {"lists": [[1], [2], [3]], "mixed": [1, "a", (2,)], "split": ["x"] * 3}
    left_out |= dict.fromkeys(("n_counts", "tokens", "soma_x", "__x", "", 5), range(3))
    obs = pd.DataFrame({**{name: values for name, (values, _) in kept.items()}, **left_out})
    kinds = labels.label_kinds(obs)
    assert kinds == {name: kind for name, (_, kind) in kept.items()}
    columns = labels.label_columns(obs, kinds, "rows")
    assert {name: column.type for name, column in columns.items()} == kinds
    expected = {"type": ["a", None, "b"], "year": [2001, 2002, 2001]}
    expected |= {"score": [0.5, None, 1.0], "maybe": [True, None, False]}
    assert {name: columns[name].to_pylist() for name in expected} == expected


def test_files_that_disagree_about_labels() -> None:
    first = {"a": labels.INTEGER, "b": labels.INTEGER, "c": labels.TEXT}
    second = {"a": labels.NUMBER, "b": labels.TEXT, "d": labels.TRUTH}
    kinds = labels.unify_kinds([first, second, {"d": labels.INTEGER}])
    assert kinds == {"a": labels.NUMBER, "b": labels.TEXT, "c": labels.TEXT, "d": labels.TEXT}
    obs = pd.DataFrame({"a": [1], "b": [2], "d": [True]})
    columns = labels.label_columns(obs, labels.label_kinds(obs), "rows")
    cells = pa.table({"cell_id": ["x"], **columns})
    unified = labels.unify_labels(cells, kinds)
    assert unified.schema == pa.schema({"cell_id": pa.string(), **kinds})
    assert unified.to_pylist() == [{"cell_id": "x", "a": 1.0, "b": "2", "c": None, "d": "true"}]
    obs = pd.DataFrame({"age": ["one", "two"]})
    with pytest.raises(DataError, match=r"rows 0 to 1: obs column 'age' holds other .*int64"):
        labels.label_columns(obs, {"age": labels.INTEGER}, "rows 0 to 1")
    with pytest.raises(DataError, match="'year'"):
        labels.label_columns(obs, {"year": labels.TEXT}, "rows 0 to 1")


# Plans

MAP = GeneMap(np.arange(3, dtype=np.int32), "index", 3, 0, 0, 0, 0, 1.0)
OTHER_MAP = GeneMap(np.array([0, 1, 3], np.int32), "index", 3, 0, 0, 0, 0, 1.0)
RECIPE = plans.Recipe(vocabulary_of(5), 20, InputOptions(), RandomSplit())


def source(name: str = "a", num_cells: int = 9, **changes: object) -> InputSource:
    fields = {"fingerprint": {"size": 7}, "location": "X", "stem": name, "gene_map": MAP}
    fields |= {"is_sequential": False, "passed_over": (), "kinds": {}, "left_out": ()}
    return InputSource(name=name, address=f"/{name}", num_cells=num_cells, **(fields | changes))


def plan_of(*sources: InputSource, refused: Sequence[Refusal] = (), **changes) -> plans.Plan:
    """A plan of one file, unless sources are given, by a recipe with these changes."""
    return plans.make_plan(replace(RECIPE, **changes), list(sources) or [source()], list(refused))


def names(plan: plans.Plan) -> list[str]:
    return [unit.name for unit in plan.units]


@pytest.mark.parametrize("sizes", [[1], [4096], [4097, 3], [100_000], [3_000_000, 5, 40_000]])
def test_units_cover_all_rows_once(sizes: list[int]) -> None:
    plan = plan_of(*(source(f"s{i}", n) for i, n in enumerate(sizes)))
    for place, size in enumerate(sizes):
        spans = [(u.start, u.stop) for u in plan.units if u.source is plan.sources[place]]
        assert (spans[0][0], spans[-1][1]) == (0, size)
        assert all(first[1] == second[0] for first, second in pairwise(spans))
        assert all(0 < b - a <= plans.MOST_ROWS_PER_UNIT for a, b in spans)
    assert [unit.index for unit in plan.units] == list(range(len(plan.units)))
    assert len(set(names(plan))) == len(plan.units)
    assert sum(sizes) < 10**5 or len(plan.units) >= 25


def test_a_name_changes_with_all_that_cells_depend_on() -> None:
    (base,) = names(plan_of())
    recipe = {"vocabulary": vocabulary_of(6), "seq_length": 21, "split_rule": RandomSplit(0.3)}
    options = (InputOptions(layer="x"), InputOptions(allow_normalised=True))
    given = {"name": "b", "num_cells": 10, "fingerprint": {"size": 8}, "location": "raw.X"}
    given |= {"gene_map": OTHER_MAP, "stem": "z"}
    changed = [
        *(plan_of(**{name: value}) for name, value in recipe.items()),
        *(plan_of(options=value) for value in options),
        *(plan_of(source(**{name: value})) for name, value in given.items()),
    ]
    assert len({base, *(names(plan)[0] for plan in changed)}) == 12
    # Not with what makes no difference.
    same = plan_of(options=InputOptions(allow_low_overlap=True))
    for plan in (same, plan_of(source(), source("b", 50))):
        assert names(plan)[0] == base


def test_parts_share_all_units() -> None:
    units = plan_of(source("a", 10 * plans.LEAST_ROWS_PER_UNIT)).units
    parts = [unit.index for index in range(4) for unit in plans.Part(index, 4).of(units)]
    assert sorted(parts) == list(range(10))
    assert str(plans.Part.parse("2/4")) == "2/4"
    for wrong in ("4/4", "-1/4", "1", "a/b", "1/0", "1/2/3"):
        with pytest.raises(DataError, match="0 <= I < N"):
            plans.Part.parse(wrong)


def test_parts_of_another_plan_are_refused(tmp_path) -> None:
    for _ in range(2):
        plans.join(plan_of(), tmp_path)
    shorter = plan_of(seq_length=9)
    refused = plan_of(refused=(Refusal("b", "no"),))
    others = {"seq_length": shorter, "inputs": plan_of(source("a", 8)), "refused": refused}
    for what, other in others.items():
        with pytest.raises(DataError, match=f"other arguments: {what} differ"):
            plans.join(other, tmp_path)
    plans.declare(shorter, tmp_path)
    with pytest.raises(DataError, match="seq_length differ"):
        plans.join(plan_of(), tmp_path)


def test_inputs_are_sorted_and_named_once(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ordered = ["a.h5ad", "b.h5ad", "s3://bucket/x"]
    assert in_order(["b.h5ad", Path("a.h5ad"), "s3://bucket/x"]) == ordered
    with pytest.raises(DataError, match="given twice"):
        in_order(["a.h5ad", tmp_path / "a.h5ad"])
    with pytest.raises(DataError, match="no input"):
        in_order([])


# Reports


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_histograms_give_what_the_values_give(lengths: list[int]) -> None:
    cells = np.bincount(lengths, minlength=41)
    assert _median(cells) == np.median(lengths)
    for share in (0.05, 0.5, 0.95):
        assert _reached(cells, share) == np.quantile(lengths, share, method="inverted_cdf")


def test_reports_of_no_cell_in_bins_and_of_skipped_cells() -> None:
    assert _median(np.zeros(5, int)) == _reached(np.zeros(5, int), 0.5) == 0
    cells = np.arange(2049)
    width, binned = _binned(cells).bin_tokens, _binned(cells).cells
    assert (sum(binned), len(binned) <= 128) == (cells.sum(), True)
    assert binned[1] == cells[width : 2 * width].sum()
    summed = sum_skipped([{"b": 1}, {}, {"a": 2, "b": 3}])
    assert list(summed.items()) == [("a", 2), ("b", 4)]


def test_progress_and_clock(monkeypatch) -> None:
    lines: list[str] = []
    stream = SimpleNamespace(isatty=lambda: True, write=lines.append, flush=lambda: None)
    monkeypatch.setattr(progress.time, "monotonic", iter([0.0, 10.0, 20.0]).__next__)
    bar = progress.ProgressLine("cells", stream)
    bar.update("tokenising", 500, 2000)
    bar.update("tokenising", 1000, 2000)
    monkeypatch.undo()
    shown = "tokenising [############------------]  50%  1,000 of 2,000 cells, 50/s, 0:20 left"
    assert lines[-2].endswith(shown)
    assert bar.seconds == {"tokenising": 10.0}
    assert [progress.clock(s) for s in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
