"""Cells of a Census as files: planned alike by all, fetched with retries, each provably whole."""

from __future__ import annotations

import errno
import os
import re
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from inspect import signature
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, Mock

import anndata
import numpy as np
import pytest

from geneformer_mcore.errors import DataError, MissingBackendError, NetworkError
from geneformer_mcore.io import census
from geneformer_mcore.io.census import Release, find_release
from geneformer_mcore.io.retry import Retry
from geneformer_mcore.store import census_download
from geneformer_mcore.store.census_download import (
    CensusPlan,
    Fetching,
    Outcome,
    Selection,
    fetch_units,
    find_missing,
    make_plan,
    prepare_plan,
)
from geneformer_mcore.store.split.dataset_table import read_dataset_table
from tests.support.small_cells import adata_of, flip_bit, gene_id, random_counts
from tests.support.small_experiment import write_experiment

NUM_GENES = 20
SYMBOLS = [f"S{place}" for place in range(NUM_GENES)]
NETWORK = RuntimeError("S3: Error while listing: curlCode: 28, Timeout was reached")
FULL = "No space left on device"
AT_ONCE = Retry(attempts=3, wait_s=0)


def dataset(rng: np.random.Generator, prefix: str, num_cells: int, **obs: object):
    counts = random_counts(rng, num_cells, NUM_GENES)
    names = [f"{prefix}{place}" for place in range(num_cells)]
    return adata_of(counts, obs=obs, cell_ids=names, var={"feature_name": SYMBOLS})


@pytest.fixture(scope="module")
def cells() -> dict[str, anndata.AnnData]:
    """Of `b` every second cell is of a disease, of `c` none is primary data."""
    rng = np.random.default_rng(20_240_530)
    return {
        "b": dataset(rng, "b", 30, disease=["normal", "cancer"] * 15, tissue_general="gut"),
        "a": dataset(rng, "a", 25, assay=["Smart-seq2"] * 5 + ["10x 3' v3"] * 20),
        "c": dataset(rng, "c", 10, is_primary_data=False),
        "d": dataset(rng, "d", 4, suspension_type=["na", "cell", "nucleus", "na"]),
    }


@pytest.fixture(scope="module")
def address(tmp_path_factory, cells) -> str:
    return write_experiment(tmp_path_factory.mktemp("experiment") / "census", cells)


def plan_of(address: str, **selection: object) -> CensusPlan:
    fields = {"source": address, "cells_per_unit": 10, **selection}
    return make_plan(Selection(**fields), "2025", address, lambda cells: None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plan(address) -> CensusPlan:
    return plan_of(address)


@pytest.fixture(scope="module")
def by_dataset(address):
    """One unit for each of a, b and d."""
    return plan_of(address, cells_per_unit=100).units


@pytest.fixture
def fetching(plan, tmp_path) -> Fetching:
    return Fetching.of(plan, tmp_path / "out", AT_ONCE)


def missing(fetching: Fetching, units) -> list[str]:
    assert not list(fetching.folder.glob(".*"))
    return [unit.name for unit, _ in find_missing(fetching, units)]


def test_plan_takes_the_card_s_cells(plan) -> None:
    assert [(unit.name, unit.cells, unit.first, unit.last) for unit in plan.units] == [
        *(("a.0000", 10, 30, 39), ("a.0001", 10, 40, 49), ("a.0002", 5, 50, 54)),
        *(("b.0000", 10, 0, 18), ("b.0001", 5, 20, 28)),
        ("d", 2, 66, 67),
    ]
    assert plan.cells == 42
    assert plan.table == (
        ("a", "10x 3' v3", "lung", 20),
        ("a", "Smart-seq2", "lung", 5),
        ("b", "10x 3' v3", "gut", 15),
        ("d", "10x 3' v3", "lung", 2),
    )


def test_plan_of_other_cells(address, tmp_path, rng) -> None:
    everything = plan_of(address, value_filter="")
    assert (everything.cells, len(everything.units)) == (69, 3 + 3 + 1 + 1)
    some = plan_of(address, limit_cells=31)
    assert [(unit.name, unit.cells, unit.last) for unit in some.units[3:]] == [("b", 6, 10)]
    assert sum(row[-1] for row in some.table) == 31
    upwards = write_experiment(tmp_path / "census", {"../up": dataset(rng, "x", 3)})
    for source, selection, message in (
        (address, {"value_filter": "tissue_general == 'moon'"}, "no cell for which .*'moon'"),
        (address, {"value_filter": "assay ="}, "obs cannot be read by the filter 'assay ='"),
        (address, {"limit_cells": 0}, "--limit-cells must be 1 or more, not 0"),
        (upwards, {}, r"the data set '\.\./up' cannot name a file"),
    ):
        with pytest.raises(DataError, match=message):
            plan_of(source, **selection)


@pytest.mark.parametrize(
    ("comparison", "told"),
    [
        ("nnz > 0.5", "obs.nnz holds whole numbers"),
        ("attr('nnz') <= val(2.9)", "compares it with 2.9"),
        ("0.5 < nnz < 9", "compares it with 0.5"),
        ("nnz > -0.5", "compares it with 0.5"),
        ("assay == 'a' or is_primary_data == 0.5", "obs.is_primary_data holds True or False"),
        ("is_primary_data == 7", "compares it with 7"),
    ],
)
def test_a_number_that_soma_would_cut_is_refused(address, comparison: str, told: str) -> None:
    with pytest.raises(DataError, match=re.escape(told)):
        plan_of(address, value_filter=comparison)


def test_a_number_that_soma_takes_as_it_is_is_not(address) -> None:
    everything = plan_of(address, value_filter="").cells
    for comparison in ("nnz > -1.0", "raw_sum > 0.5 or raw_sum < 0.5", "is_primary_data != None"):
        assert plan_of(address, value_filter=comparison).cells == everything, comparison


def test_cells_without_a_value_are_counted(tmp_path, rng) -> None:
    """No comparison holds for them: the card's filter leaves them out."""
    some = dataset(rng, "x", 8, disease=["normal", None, "cancer", None] * 2, assay=None)
    address = write_experiment(tmp_path / "census", {"x": some})
    assert census.count_missing(address, census.CARD_FILTER) == {"disease": 4}
    assert census.count_missing(address, "assay != 'a' and attr('disease') == 'x'") == {
        "assay": 8,
        "disease": 4,
    }
    for other in (None, "", "sex == 'male'", "disease == None or disease == 'x'", "no ="):
        found = census.count_missing(address, other)
        assert found == ({"disease": 4} if other and "'x'" in other else {})
    assert plan_of(address).cells == 2
    taken = census.CARD_FILTER.replace("disease ==", "(disease == None or disease ==") + ")"
    assert plan_of(address, value_filter=taken).cells == 6


def test_plan_is_kept_and_made_once(address, plan, tmp_path) -> None:
    folder, find = tmp_path / "out", Mock(return_value=Release("2025", address))
    given = {"source": address, "cells_per_unit": 10}
    for selection in (given, given, {}):
        assert prepare_plan(folder, selection, find) == plan
    find.assert_called_once_with(Selection(address, cells_per_unit=10))
    with pytest.raises(DataError, match=r"of another selection: limit_cells None, not 3\."):
        prepare_plan(folder, {"limit_cells": 3}, find)
    path = folder / "plan.json"
    path.write_text(path.read_text().replace("30", "31", 1))
    with pytest.raises(DataError, match="damaged, or of another version"):
        CensusPlan.load(folder)


def test_files_hold_the_cells(plan, fetching, cells) -> None:
    news: list[tuple[str, int, int]] = []
    outcome = fetch_units(fetching, plan.units, progress=lambda *each: news.append(each))
    assert outcome == Outcome(there=0, fetched=6, not_begun=0, network=[], wrong=[])
    assert news[-1] == ("fetching", 42, 42)
    files = {unit.name: fetching.folder / unit.file for unit in plan.units}
    pieces = {name: anndata.read_h5ad(file) for name, file in files.items()}
    for name, rows in {"b": range(0, 30, 2), "a": range(25), "d": [1, 2]}.items():
        own = anndata.concat([pieces[unit] for unit in sorted(pieces) if unit[0] == name])
        np.testing.assert_array_equal(own.X.toarray(), cells[name].X.toarray()[rows])
        assert own.obs_names.tolist() == [f"{name}{row}" for row in rows]
        assert set(own.obs["dataset_id"]) == {name}
    piece = pieces["a.0000"]
    assert piece.X.dtype == np.float32
    assert list(piece.obs["assay"].cat.categories) == ["10x 3' v3", "Smart-seq2"]
    assert list(piece.obs["disease"].cat.categories) == ["normal"]
    assert set(piece.obs) == set(census.OBS_COLUMNS)
    assert (piece.var.index.name, piece.var_names[3]) == ("feature_id", gene_id(3))
    assert list(piece.var["feature_name"]) == SYMBOLS
    # The plan gives a split the same table as the files.
    plan.save(fetching.folder)
    assert read_dataset_table([fetching.folder]) == read_dataset_table(list(files.values()))


def test_parts_meet_and_finished_files_stay(plan, fetching) -> None:
    assert fetch_units(fetching, plan.units[0::2], part="0/2", workers=2).fetched == 3
    assert missing(fetching, plan.units) == [unit.name for unit in plan.units[1::2]]
    written = {path: path.stat().st_mtime_ns for path in fetching.folder.glob("*.h5ad")}
    assert fetch_units(fetching, plan.units) == Outcome(3, 3, 0, [], [])
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not missing(fetching, plan.units)
    # Of another filter, the same names are other cells.
    everything = replace(plan, selection=replace(plan.selection, value_filter=""))
    assert len(missing(Fetching.of(everything, fetching.folder), plan.units)) == 6


def test_damaged_files_are_fetched_again(plan, fetching) -> None:
    fetch_units(fetching, plan.units)
    file, record = fetching.folder / "a.0001.h5ad", fetching.folder / "done/a.0001.json"
    for harm, expected in (
        (lambda: os.truncate(file, file.stat().st_size - 1), "bytes of"),
        (lambda: flip_bit(file, 0), "changed since"),
        (file.unlink, "not fetched"),
        (lambda: record.write_text("{"), "not fetched"),
    ):
        harm()
        ((unit, problem),) = find_missing(fetching, plan.units)
        assert unit.name == "a.0001"
        assert expected in problem
        assert fetch_units(fetching, plan.units) == Outcome(5, 1, 0, [], [])
        assert not missing(fetching, plan.units)


class Failing:
    """In place of fetch_cells: fails for some data sets or first joinids, so many times each."""

    def __init__(self, failures: dict[object, int], error: Exception = NETWORK) -> None:
        self.left, self.error, self.calls = failures, error, 0

    def __call__(self, address, where, name, first, last, count):  # type: ignore[no-untyped-def]
        self.calls += 1
        key = first if first in self.left else name
        if not self.left.get(key):
            return census.fetch_cells(address, where, name, first, last, count)
        self.left[key] -= 1
        count(2)
        # In the words of ExperimentCounts for an error of TileDB.
        raise DataError(f"{address}: cannot be read. Remedy: none.") from self.error


def test_network_faults_are_tried_again(by_dataset, fetching, monkeypatch, capsys) -> None:
    monkeypatch.setattr(census_download, "fetch_cells", failing := Failing({"a": 2}))
    news: list[tuple[str, int, int]] = []
    outcome = fetch_units(fetching, by_dataset, progress=lambda *each: news.append(each))
    assert (outcome, failing.calls) == (Outcome(0, 3, 0, [], []), 3 + 2)
    # Cells read twice are counted once.
    counted = [done for what, done, _ in news if what == "fetching"]
    assert (counted, counted[-1]) == (sorted(counted), 42)
    warnings = capsys.readouterr().err
    assert re.fullmatch(r"warning: a: .*\nwarning: a: .*\(2 of 3 attempts made\)\.\n", warnings)


def test_a_unit_that_fails_keeps_no_other_back(by_dataset, fetching, monkeypatch) -> None:
    monkeypatch.setattr(census_download, "fetch_cells", Failing({"a": 9}))
    outcome = fetch_units(fetching, by_dataset)
    assert (outcome.fetched, outcome.not_begun, outcome.wrong) == (2, 0, [])
    assert outcome.network[0].startswith("a: failed 3 times, last with: ")
    assert missing(fetching, by_dataset) == ["a"]
    # What is wrong with the data is not tried again.
    failing = Failing({"a": 9}, ValueError("a count of -1"))
    monkeypatch.setattr(census_download, "fetch_cells", failing)
    outcome = fetch_units(fetching, by_dataset)
    assert (outcome.fetched, outcome.network, failing.calls) == (0, [], 1)
    assert "cannot be read" in outcome.wrong[0]


def test_it_stops_when_the_network_is_gone(plan, fetching, monkeypatch) -> None:
    for failures, expected in (
        (dict.fromkeys("abd", 99), (3, 0, 3)),
        # As many failures, one in between that does not fail: the network is there.
        ({30: 99, 40: 99, 0: 99, 20: 99}, (4, 2, 0)),
    ):
        monkeypatch.setattr(census_download, "fetch_cells", Failing(failures))
        outcome = fetch_units(fetching, plan.units)
        assert (len(outcome.network), outcome.fetched, outcome.not_begun) == expected


@pytest.mark.parametrize(
    ("failure", "place"),
    [
        (OSError(errno.ENOSPC, FULL), 0),
        # The message of HDF5 2.0, shortened.
        (RuntimeError(f"Set slist enabled failed (file write failed: errno = 28, '{FULL}')"), 2),
    ],
    ids=["system", "HDF5"],
)
def test_it_stops_when_the_disk_is_full(plan, fetching, monkeypatch, failure, place) -> None:
    fetched, write = Failing({}), anndata.AnnData.write_h5ad

    def fail(cells, path, **options: object) -> None:
        if fetched.calls > place:
            path.write_bytes(b"what there was room for")
            raise failure
        write(cells, path, **options)

    monkeypatch.setattr(census_download, "fetch_cells", fetched)
    with monkeypatch.context() as patch:
        patch.setattr(anndata.AnnData, "write_h5ad", fail)
        outcome = fetch_units(fetching, plan.units)
    assert (fetched.calls, outcome.fetched, outcome.network) == (place + 1, place, [])
    assert (len(outcome.wrong), outcome.not_begun) == (1, 5 - place)
    for part in (f"{plan.units[place].file}: cannot be written: ", FULL, ": choose another path"):
        assert part in outcome.wrong[0]
    assert len(missing(fetching, plan.units)) == 6 - place
    assert fetch_units(fetching, plan.units).fetched == 6 - place


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EOPNOTSUPP])
def test_room_is_reserved_before_hdf5_writes(plan, fetching, monkeypatch, code) -> None:
    """HDF5 crashes on a full disk, at the latest when this process ends."""
    reserve = Mock(side_effect=OSError(code, os.strerror(code)))
    write = Mock(wraps=anndata.AnnData.write_h5ad)
    monkeypatch.setattr(os, "posix_fallocate", reserve)
    monkeypatch.setattr(anndata.AnnData, "write_h5ad", lambda *given, **more: write(*given, **more))
    outcome = fetch_units(fetching, plan.units)
    _, start, size = reserve.call_args.args
    assert (start, size > 1 << 20) == (0, True)
    if code == errno.EOPNOTSUPP:  # This file system cannot reserve room.
        assert (outcome.fetched, write.call_count) == (6, 6)
        return
    assert (len(outcome.wrong), outcome.not_begun, write.call_count) == (1, 5, 0)
    message = f"a.0000.h5ad: cannot be written: {os.strerror(code)}. Remedy: "
    assert message in outcome.wrong[0]
    assert len(missing(fetching, plan.units)) == 6


def test_another_failure_of_hdf5_is_a_defect(plan, fetching, monkeypatch) -> None:
    fail = Mock(side_effect=RuntimeError("unable to register datatype"))
    monkeypatch.setattr(anndata.AnnData, "write_h5ad", fail)
    with pytest.raises(RuntimeError, match="unable to register"):
        fetch_units(fetching, plan.units)


def test_an_experiment_that_changed_is_noticed(plan, fetching) -> None:
    shorter = replace(plan.units[0], last=plan.units[0].last - 1)
    assert fetch_units(fetching, [shorter]).wrong == [
        "a.0000: the Census gives 9 cells, the plan says 10: it is another one now. Remedy: a new "
        "`out=`."
    ]
    assert not list(fetching.folder.glob("*.h5ad"))


def test_retry() -> None:
    read = DataError("a://network: cannot be read")
    read.__cause__ = RuntimeError("HTTP 503")
    work = Mock(side_effect=[read, ConnectionResetError("reset"), NETWORK, "done"])
    assert Retry(4, 0).call("x", work) == "done"
    for error, message in (
        (NETWORK, "x: failed 3 times"),
        (DataError("no such column"), "no such column"),
        (DataError("no column `network`"), "no column"),
        (OSError(28, "No space left on connection.h5"), "No space"),
    ):
        work = Mock(side_effect=[NETWORK, NETWORK, error, "done"])
        with pytest.raises(NetworkError if error is NETWORK else type(error), match=message):
            AT_ONCE.call("x", work)
    with pytest.raises(DataError, match="`attempts=` must be 1"):
        Retry(0)


def test_release(monkeypatch) -> None:
    """Of a cellxgene_census as far as it is used, with one release and one organism."""
    opened = MagicMock()
    census_data = {"homo_sapiens": SimpleNamespace(uri="s3://bucket/human")}
    opened.__enter__.return_value = {"census_data": census_data}
    open_soma = Mock(return_value=opened)
    module = ModuleType("cellxgene_census")
    module.__spec__ = ModuleSpec("cellxgene_census", None)

    def describe(version: str) -> dict[str, str]:
        if version not in ("stable", "2025-01-30"):
            raise ValueError(f"unknown {version}.")
        return {"release_build": "2025-01-30"}

    vars(module).update(get_census_version_description=describe, open_soma=open_soma)
    monkeypatch.setitem(sys.modules, "cellxgene_census", module)
    assert find_release("stable") == Release("2025-01-30", "s3://bucket/human")
    # Opened by its date, whatever `stable` is by then.
    open_soma.assert_called_once_with(census_version="2025-01-30")
    opened.__exit__.assert_called_once()
    with pytest.raises(DataError, match=r"no Census version '1999': unknown 1999\."):
        find_release("1999")
    with pytest.raises(DataError, match="has no organism 'martian'"):
        find_release("stable", "martian")
    monkeypatch.setattr("geneformer_mcore.backends.find_spec", lambda name: None)
    with pytest.raises(MissingBackendError, match=r"geneformer_mcore\[census\]"):
        find_release("stable")


def test_the_real_package_takes_what_it_is_given() -> None:
    """Functions and arguments, without a network: their results are the Census' own."""
    reason = "the extra `census` is not installed; tests/extras.py installs it and runs this"
    package = pytest.importorskip("cellxgene_census", reason=reason)
    signature(package.get_census_version_description).bind("stable")
    signature(package.open_soma).bind(census_version="2025-01-30")
