"""Units of work: how inputs are cut and named, what is in their files, how reports add up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.ingest import plan as plans
from geneformer_mcore.store.ingest.buckets import (
    CELLS_PER_BUCKET,
    bucket_codes,
    by_bucket,
    count_buckets,
    sorted_cells,
)
from geneformer_mcore.store.ingest.plan import (
    Part,
    Plan,
    Recipe,
    UnitReader,
    declare,
    join,
    make_plan,
    read_report,
    read_sound_report,
    remove_others,
    write_report,
)
from geneformer_mcore.store.ingest.sources import InputSource, Refusal, in_order
from geneformer_mcore.store.keys import order_keys
from geneformer_mcore.store.report import _binned, _median, _reached, sum_skipped
from geneformer_mcore.store.split.table import RandomSplit
from geneformer_mcore.tokenizer.corpus import InputOptions
from geneformer_mcore.tokenizer.genes import GeneMap
from tests.small_cells import vocabulary_of
from tests.small_store import cells_table, write_unit

# Buckets


def test_buckets_are_a_power_of_two_and_not_too_full() -> None:
    assert [count_buckets(n) for n in (1, CELLS_PER_BUCKET, CELLS_PER_BUCKET + 1)] == [1, 1, 2]
    for cells in (10**5, 10**6, 23_600_000):
        buckets = count_buckets(cells)
        assert buckets & (buckets - 1) == 0
        assert CELLS_PER_BUCKET / 2 < cells / buckets <= CELLS_PER_BUCKET


@given(st.integers(0, 10), st.integers(0, 2**32), st.integers(0, 200))
def test_codes_ascend_with_split_and_order_key(power: int, seed: int, num_cells: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**64, num_cells, np.uint64)
    splits = rng.integers(0, 3, num_cells).astype(np.int8)
    codes = bucket_codes(keys, splits, 1 << power)
    assert codes.min(initial=0) >= 0
    assert codes.max(initial=0) < 3 << power
    by_key = np.lexsort((order_keys(keys), splits))
    assert np.all(np.diff(codes[by_key]) >= 0)
    order, starts = by_bucket(codes, 1 << power)
    assert (len(starts), starts[0], starts[-1]) == ((3 << power) + 1, 0, num_cells)
    for code in set(codes.tolist()):
        assert set(codes[order[starts[code] : starts[code + 1]]]) == {code}


def test_two_cells_may_share_a_key_but_not_their_names() -> None:
    def table(names: list[str]) -> pa.Table:
        keys = pa.array([7] * len(names), pa.uint64())
        return pa.table({"cell_key": keys, "dataset_id": ["d"] * len(names), "cell_id": names})

    for names in (["b", "a", "c"], ["c", "b", "a"]):
        assert sorted_cells(table(names))["cell_id"].to_pylist() == ["a", "b", "c"]
    with pytest.raises(DataError, match="two cells are called 'a' in dataset 'd'"):
        sorted_cells(table(["a", "b", "a"]))


# Files


def test_a_unit_s_file_gives_its_cells_back_by_bucket(tmp_path: Path) -> None:
    cells = cells_table([[0, 5 + number % 90] for number in range(500)])
    split = RandomSplit(0.2, 0.1)
    report = write_unit(tmp_path, "u", cells, split, num_buckets=4)
    for keep_open in (True, False):
        reader = UnitReader(tmp_path, "u", report, keep_open)
        batches = [reader.read(code) for code in range(12)]
        reader.close()
        assert sum(map(len, batches)) == 500
        found = pa.Table.from_batches(batches).sort_by("number")
        assert found.equals(cells)
        codes = bucket_codes(
            cells["cell_key"].to_numpy(), split.assign(cells["cell_key"].to_numpy(), ["d"] * 500), 4
        )
        assert [len(batch) for batch in batches] == np.bincount(codes, minlength=12).tolist()
    # Any Arrow reads it.
    with pa.OSFile(str(tmp_path / "u.arrows")) as file:
        assert pa.ipc.open_stream(file).read_all().num_rows == 500


def test_buckets_without_a_cell_take_next_to_no_room(tmp_path: Path) -> None:
    cells = cells_table([[0, *range(5, 105)]] * 2000)
    few, many = (
        write_unit(tmp_path, f"{number}", cells, RandomSplit(), num_buckets=number)
        for number in (1, 1024)
    )
    assert (many.num_bytes - few.num_bytes) / (3 * 1023) < 2000


def test_a_unit_without_cells(tmp_path: Path) -> None:
    report = write_unit(tmp_path, "u", cells_table([[0, 5]]).slice(0, 0), RandomSplit())
    reader = UnitReader(tmp_path, "u", report, True)
    assert [len(reader.read(code)) for code in range(3)] == [0, 0, 0]
    reader.close()


def test_reports_of_damaged_units_are_none(tmp_path: Path) -> None:
    report = write_unit(tmp_path, "u", cells_table([[0, 5, 6]] * 9), RandomSplit())
    assert read_report(tmp_path, "u") is None
    write_report(tmp_path, "u", report)
    assert read_report(tmp_path, "u") == read_sound_report(tmp_path, "u") == report
    file, told = tmp_path / "u.arrows", tmp_path / "u.json"
    raw, text = file.read_bytes(), told.read_text()
    for byte in range(0, len(raw), 37):
        file.write_bytes(raw[:byte] + bytes([raw[byte] ^ 64]) + raw[byte + 1 :])
        assert read_report(tmp_path, "u") == report
        assert read_sound_report(tmp_path, "u") is None
    file.write_bytes(raw[:-1])
    assert read_report(tmp_path, "u") is None
    file.write_bytes(raw)
    for damaged in ("", "[]", "{}", text[:-9], text.replace('"tokens": 27', '"tokens": 28')):
        told.write_text(damaged)
        assert read_report(tmp_path, "u") is None
    told.write_text(text)
    remove_others(tmp_path, ["u"])
    assert len(list(tmp_path.iterdir())) == 2
    remove_others(tmp_path, ["v"])
    assert not list(tmp_path.iterdir())


# Plans


def source(name: str, num_cells: int, **changes: object) -> InputSource:
    gene_map = GeneMap(np.arange(3, dtype=np.int32), "index", 3, 0, 0, 0, 0)
    fields = {"fingerprint": {"size": 7}, "location": "X", "stem": name, "gene_map": gene_map}
    fields |= changes
    return InputSource(
        name=name,
        address=f"/{name}",
        num_cells=num_cells,
        is_sequential=False,
        passed_over=(),
        kinds={},
        left_out=(),
        **fields,  # type: ignore[arg-type]
    )


def recipe(**changes: object) -> Recipe:
    return replace(Recipe(vocabulary_of(5), 20, InputOptions(), RandomSplit()), **changes)


def names(plan: Plan) -> list[str]:
    return [unit.name for unit in plan.units]


@pytest.mark.parametrize("sizes", [[1], [4096], [4097, 3], [100_000], [3_000_000, 5, 40_000]])
def test_units_cover_all_rows_once(sizes: list[int]) -> None:
    plan = make_plan(recipe(), [source(f"s{i}", n) for i, n in enumerate(sizes)], [])
    for place, size in enumerate(sizes):
        spans = [(u.start, u.stop) for u in plan.units if u.source is plan.sources[place]]
        assert (spans[0][0], spans[-1][1]) == (0, size)
        assert all(first[1] == second[0] for first, second in pairwise(spans))
        assert all(0 < b - a <= plans.MOST_ROWS_PER_UNIT for a, b in spans)
    assert [unit.index for unit in plan.units] == list(range(len(plan.units)))
    assert len(set(names(plan))) == len(plan.units)
    assert sum(sizes) < 10**5 or len(plan.units) >= 25


def test_a_name_changes_with_all_that_cells_depend_on() -> None:
    base = names(make_plan(recipe(), [source("a", 9)], []))
    other_genes = GeneMap(np.array([0, 1, 3], np.int32), "index", 3, 0, 0, 0, 0)
    changed = [
        make_plan(recipe(vocabulary=vocabulary_of(6)), [source("a", 9)], []),
        make_plan(recipe(seq_length=21), [source("a", 9)], []),
        make_plan(recipe(options=InputOptions(layer="x")), [source("a", 9)], []),
        make_plan(recipe(options=InputOptions(allow_normalised=True)), [source("a", 9)], []),
        make_plan(recipe(split_rule=RandomSplit(0.3)), [source("a", 9)], []),
        make_plan(recipe(), [source("b", 9)], []),
        make_plan(recipe(), [source("a", 10)], []),
        make_plan(recipe(), [source("a", 9, fingerprint={"size": 8})], []),
        make_plan(recipe(), [source("a", 9, location="raw.X")], []),
        make_plan(recipe(), [source("a", 9, gene_map=other_genes)], []),
        make_plan(recipe(), [source("a", 9, stem="z")], []),
    ]
    found = [names(plan)[0] for plan in changed]
    assert len({*base, *found}) == len(changed) + 1
    # Not with what makes no difference.
    same = make_plan(recipe(options=InputOptions(allow_low_overlap=True)), [source("a", 9)], [])
    assert names(same) == base
    more = make_plan(recipe(), [source("a", 9), source("b", 50)], [])
    assert names(more)[:1] == base


def test_parts_share_all_units() -> None:
    plan = make_plan(recipe(), [source("a", 10 * plans.LEAST_ROWS_PER_UNIT)], [])
    parts = [Part(index, 4).of(plan.units) for index in range(4)]
    assert sorted(unit.index for part in parts for unit in part) == list(range(10))
    assert str(Part.parse("2/4")) == "2/4"
    for wrong in ("4/4", "-1/4", "1", "a/b", "1/0", "1/2/3"):
        with pytest.raises(DataError, match="0 <= I < N"):
            Part.parse(wrong)


def test_parts_of_another_plan_are_refused(tmp_path: Path) -> None:
    plan = make_plan(recipe(), [source("a", 9)], [])
    join(plan, tmp_path)
    join(plan, tmp_path)
    for other, what in (
        (make_plan(recipe(seq_length=9), [source("a", 9)], []), "seq_length"),
        (make_plan(recipe(), [source("a", 8)], []), "inputs"),
        (make_plan(recipe(), [source("a", 9)], [Refusal("b", "no")]), "refused"),
    ):
        with pytest.raises(DataError, match=f"asked for otherwise: {what} differ"):
            join(other, tmp_path)
    declare(make_plan(recipe(seq_length=9), [source("a", 9)], []), tmp_path)
    with pytest.raises(DataError, match="seq_length differ"):
        join(plan, tmp_path)


def test_inputs_are_sorted_and_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given_names = ["b.h5ad", Path("a.h5ad"), "s3://bucket/x"]
    assert in_order(given_names) == ["a.h5ad", "b.h5ad", "s3://bucket/x"]
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


def test_no_cell_has_no_lengths() -> None:
    assert _median(np.zeros(5, int)) == _reached(np.zeros(5, int), 0.5) == 0


def test_bins_hold_all_cells() -> None:
    cells = np.arange(2049)
    binned = _binned(cells)
    assert sum(binned["cells"]) == cells.sum()
    assert len(binned["cells"]) <= 128
    width = binned["bin_tokens"]
    assert binned["cells"][1] == cells[width : 2 * width].sum()


def test_skipped_are_summed_by_reason() -> None:
    parts = [{"b": 1}, {}, {"a": 2, "b": 3}]
    assert list(sum_skipped(parts).items()) == [("a", 2), ("b", 4)]


def test_progress_and_clock() -> None:
    from geneformer_mcore.io import progress

    lines: list[str] = []
    stream = SimpleNamespace(
        isatty=lambda: True, write=lambda text: lines.append(text), flush=lambda: None
    )
    times = iter([0.0, 10.0, 20.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.time, "monotonic", lambda: next(times))
        bar = progress.ProgressLine("cells", stream)  # type: ignore[arg-type]
        bar.update("tokenising", 500, 2000)
        bar.update("tokenising", 1000, 2000)
    assert lines[-2].endswith(
        "tokenising [############------------]  50%  1,000 of 2,000 cells, 50/s, 0:20 left"
    )
    assert bar.seconds == {"tokenising": 10.0}
    assert [progress.clock(s) for s in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]
