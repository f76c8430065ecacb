"""Cells of a Census as files: planned alike by all, fetched with retries, each provably whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

from geneformer_mcore.errors import DataError, MissingBackendError, NetworkError
from geneformer_mcore.io import census
from geneformer_mcore.io.census import CARD_FILTER, Release, find_release
from geneformer_mcore.io.retry import Retry, is_network_fault
from geneformer_mcore.store import census_download
from geneformer_mcore.store.census_download import (
    CensusPlan,
    Fetching,
    Selection,
    fetch_units,
    find_missing,
    make_plan,
    prepare_plan,
)
from geneformer_mcore.store.split.dataset_table import read_dataset_table
from tests.small_cells import gene_id, random_counts
from tests.small_experiment import write_experiment

NUM_GENES = 20
NETWORK = RuntimeError("S3: Error while listing: curlCode: 28, Timeout was reached")
AT_ONCE = Retry(attempts=3, wait_s=0)


def dataset(
    rng: np.random.Generator, prefix: str, num_cells: int, **obs: object
) -> anndata.AnnData:
    return anndata.AnnData(
        random_counts(rng, num_cells, NUM_GENES),
        obs=pd.DataFrame(obs, index=[f"{prefix}{place}" for place in range(num_cells)]),
        var=pd.DataFrame(
            {"feature_name": [f"S{place}" for place in range(NUM_GENES)]},
            index=[gene_id(place) for place in range(NUM_GENES)],
        ),
    )


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
def address(tmp_path_factory: pytest.TempPathFactory, cells: dict[str, anndata.AnnData]) -> str:
    return write_experiment(tmp_path_factory.mktemp("experiment") / "census", cells)


def plan_of(address: str, **selection: object) -> CensusPlan:
    fields = {"source": address, "cells_per_unit": 10, **selection}
    return make_plan(Selection(**fields), "2025", address, lambda cells: None)  # type: ignore[arg-type]


def test_plan_takes_the_card_s_cells(address: str) -> None:
    plan = plan_of(address)
    assert [(unit.name, unit.cells, unit.first, unit.last) for unit in plan.units] == [
        ("a.0000", 10, 30, 39),
        ("a.0001", 10, 40, 49),
        ("a.0002", 5, 50, 54),
        ("b.0000", 10, 0, 18),
        ("b.0001", 5, 20, 28),
        ("d", 2, 66, 67),
    ]
    assert plan.cells == 42
    assert plan.table == (
        ("a", "10x 3' v3", "lung", 20),
        ("a", "Smart-seq2", "lung", 5),
        ("b", "10x 3' v3", "gut", 15),
        ("d", "10x 3' v3", "lung", 2),
    )


def test_plan_of_other_cells(address: str) -> None:
    everything = plan_of(address, value_filter="")
    assert (everything.cells, len(everything.units)) == (69, 3 + 3 + 1 + 1)
    some = plan_of(address, limit_cells=31)
    assert [(unit.name, unit.cells, unit.last) for unit in some.units[3:]] == [("b", 6, 10)]
    assert sum(row[-1] for row in some.table) == 31
    with pytest.raises(DataError, match=r"no cell for which the filter .*'moon'"):
        plan_of(address, value_filter="tissue_general == 'moon'")
    with pytest.raises(DataError, match=r"obs cannot be read by the filter 'assay ='"):
        plan_of(address, value_filter="assay =")
    with pytest.raises(DataError, match="--limit-cells must be 1 or more, not 0"):
        plan_of(address, limit_cells=0)


def test_plan_is_kept_and_made_once(address: str, tmp_path: Path) -> None:
    folder, asked = tmp_path / "out", []

    def find(selection: Selection) -> Release:
        asked.append(selection)
        return Release("2025", address)

    given = {"source": address, "cells_per_unit": 10}
    plan = prepare_plan(folder, given, find)
    assert plan == plan_of(address)
    assert prepare_plan(folder, given, find) == prepare_plan(folder, {}, find) == plan
    assert asked == [Selection(address, cells_per_unit=10)]
    with pytest.raises(DataError, match=r"of another selection: limit_cells None, not 3\."):
        prepare_plan(folder, {"limit_cells": 3}, find)
    path = folder / "plan.json"
    path.write_text(path.read_text().replace("30", "31", 1))
    with pytest.raises(DataError, match="damaged, or of another version"):
        CensusPlan.load(folder)


def test_dataset_that_cannot_name_a_file(tmp_path: Path, rng: np.random.Generator) -> None:
    address = write_experiment(tmp_path / "census", {"../up": dataset(rng, "x", 3)})
    with pytest.raises(DataError, match=r"the data set '\.\./up' cannot name a file"):
        plan_of(address)


def test_files_hold_the_cells(
    address: str, tmp_path: Path, cells: dict[str, anndata.AnnData]
) -> None:
    plan, folder = plan_of(address), tmp_path / "out"
    told: list[tuple[str, int, int]] = []
    fetching = Fetching.of(plan, folder, AT_ONCE)
    outcome = fetch_units(fetching, plan.units, progress=lambda *news: told.append(news))
    assert (outcome.fetched, outcome.there, outcome.network, outcome.wrong) == (6, 0, [], [])
    assert told[-1] == ("fetching", 42, 42)
    pieces = {unit.name: anndata.read_h5ad(folder / unit.file) for unit in plan.units}
    expected = {"b": np.arange(0, 30, 2), "a": np.arange(25), "d": np.array([1, 2])}
    for name, rows in expected.items():
        own = [piece for unit, piece in sorted(pieces.items()) if unit.split(".")[0] == name]
        found = np.concatenate([piece.X.toarray() for piece in own])
        np.testing.assert_array_equal(found, cells[name].X.toarray()[rows])
        assert [cell for piece in own for cell in piece.obs_names] == [f"{name}{r}" for r in rows]
        assert {label for piece in own for label in piece.obs["dataset_id"]} == {name}
    piece = pieces["a.0000"]
    assert piece.X.dtype == np.float32
    assert list(piece.obs["assay"].cat.categories) == ["10x 3' v3", "Smart-seq2"]
    assert list(piece.obs["disease"].cat.categories) == ["normal"]
    assert set(piece.obs) == set(census.OBS_COLUMNS)
    assert (piece.var.index.name, piece.var_names[3]) == ("feature_id", gene_id(3))
    assert list(piece.var["feature_name"]) == [f"S{place}" for place in range(NUM_GENES)]
    plan.save(folder)
    # What the files hold is what the plan tells a split.
    files = [folder / unit.file for unit in plan.units]
    assert read_dataset_table([folder]) == read_dataset_table(files)


def test_parts_meet_and_finished_files_stay(address: str, tmp_path: Path) -> None:
    plan, folder = plan_of(address), tmp_path / "out"
    fetching = Fetching.of(plan, folder, AT_ONCE)
    assert fetch_units(fetching, plan.units[0::2], part="0/2").fetched == 3
    assert [unit.name for unit, _ in find_missing(fetching, plan.units)] == [
        unit.name for unit in plan.units[1::2]
    ]
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.h5ad")}
    outcome = fetch_units(fetching, plan.units)
    assert (outcome.there, outcome.fetched) == (3, 3)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert not list(find_missing(fetching, plan.units))
    # Of another filter, the same names are other cells.
    other = Fetching.of(replace(plan, selection=replace(plan.selection, value_filter="")), folder)
    assert len(list(find_missing(other, plan.units))) == 6


HARMS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes of"),
    (lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]), "changed since"),
    (lambda path: path.unlink(), "not fetched"),
    (lambda path: (path.parent / "done/a.0001.json").write_text("{"), "not fetched"),
]


def test_damaged_files_are_fetched_again(address: str, tmp_path: Path) -> None:
    plan, folder = plan_of(address), tmp_path / "out"
    fetching = Fetching.of(plan, folder, AT_ONCE)
    fetch_units(fetching, plan.units)
    for harm, told in HARMS:
        harm(folder / "a.0001.h5ad")
        ((unit, problem),) = find_missing(fetching, plan.units)
        assert unit.name == "a.0001"
        assert told in problem
        outcome = fetch_units(fetching, plan.units)
        assert (outcome.there, outcome.fetched) == (5, 1)
        assert not list(find_missing(fetching, plan.units))


class Failing:
    """In place of fetch_cells: fails for some data sets or first joinids, so many times each."""

    def __init__(self, failures: dict[str | int, int], error: Exception = NETWORK) -> None:
        self.left, self.error, self.calls = dict(failures), error, 0
        self.fetch = census.fetch_cells

    def __call__(self, address: str, where: str, name: str, first: int, last: int, tell):  # type: ignore[no-untyped-def]
        self.calls += 1
        key = first if first in self.left else name
        if self.left.get(key, 0) > 0:
            self.left[key] -= 1
            tell(2)
            # As ExperimentCounts tells of what TileDB tells.
            raise DataError(f"{address}: cannot be read. Remedy: none.") from self.error
        return self.fetch(address, where, name, first, last, tell)


def test_network_faults_are_tried_again(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = plan_of(address, cells_per_unit=100)
    failing = Failing({"a": 2})
    monkeypatch.setattr(census_download, "fetch_cells", failing)
    told: list[tuple[str, int, int]] = []
    fetching = Fetching.of(plan, tmp_path / "out", AT_ONCE)
    outcome = fetch_units(fetching, plan.units, progress=lambda *news: told.append(news))
    assert (outcome.fetched, outcome.network) == (3, [])
    assert failing.calls == 3 + 2
    # Cells read twice are counted once.
    done = [done for what, done, _ in told if what == "fetching"]
    assert done == sorted(done)
    assert done[-1] == 42
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert warnings[1].startswith("warning: a: ")
    assert warnings[1].endswith("(2 of 3 attempts made).")


def test_a_unit_that_fails_keeps_no_other_back(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(address, cells_per_unit=100)
    fetching = Fetching.of(plan, tmp_path / "out", AT_ONCE)
    monkeypatch.setattr(census_download, "fetch_cells", Failing({"a": 9}))
    outcome = fetch_units(fetching, plan.units)
    assert (outcome.fetched, outcome.not_begun, outcome.wrong) == (2, 0, [])
    assert outcome.network[0].startswith("a: failed 3 times, last with: ")
    assert [unit.name for unit, _ in find_missing(fetching, plan.units)] == ["a"]
    assert not list((tmp_path / "out").glob(".*"))
    # What is wrong with the data is not tried again.
    failing = Failing({"a": 9}, ValueError("a count of -1"))
    monkeypatch.setattr(census_download, "fetch_cells", failing)
    outcome = fetch_units(fetching, plan.units)
    assert (outcome.fetched, outcome.network, failing.calls) == (0, [], 1)
    assert "cannot be read" in outcome.wrong[0]


def test_it_stops_when_the_network_is_gone(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(address)
    monkeypatch.setattr(census_download, "fetch_cells", Failing(dict.fromkeys("abd", 99)))
    outcome = fetch_units(Fetching.of(plan, tmp_path / "out", AT_ONCE), plan.units)
    assert (len(outcome.network), outcome.not_begun) == (3, 3)
    # As many failures, one in between that does not fail: the network is there.
    some = Failing({30: 99, 40: 99, 0: 99, 20: 99})
    monkeypatch.setattr(census_download, "fetch_cells", some)
    outcome = fetch_units(Fetching.of(plan, tmp_path / "out", AT_ONCE), plan.units)
    assert (len(outcome.network), outcome.fetched, outcome.not_begun) == (4, 2, 0)


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("failure", "place"),
    [
        (OSError(errno.ENOSPC, FULL), 0),
        # As HDF5 2.0 tells of it, of which the rest is left out here.
        (RuntimeError(f"Set slist enabled failed (file write failed: errno = 28, '{FULL}')"), 2),
    ],
)
def test_it_stops_when_the_disk_is_full(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, place: int
) -> None:
    plan, fetched, write = plan_of(address), Failing({}), anndata.AnnData.write_h5ad
    fetching = Fetching.of(plan, tmp_path / "out", AT_ONCE)

    def fail(cells: anndata.AnnData, path: Path, **options: object) -> None:
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
    assert f"{plan.units[place].file}: cannot be written: " in outcome.wrong[0]
    assert FULL in outcome.wrong[0]
    assert "Remedy: choose another path, or make room" in outcome.wrong[0]
    assert not list((tmp_path / "out").glob(".*"))
    assert fetch_units(fetching, plan.units).fetched == 6 - place


def test_a_full_disk_is_noticed_before_hdf5_writes(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of a full disk, files may not grow beyond 100,000 bytes while one is written. HDF5
    crashes on that, at the latest when this process ends."""
    plan, write = plan_of(address), Fetching._write

    def write_limited(*arguments: object) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("HDF5 was let write")

    monkeypatch.setattr(Fetching, "_write", write_limited)
    monkeypatch.setattr(anndata.AnnData, "write_h5ad", forbidden)
    outcome = fetch_units(Fetching.of(plan, tmp_path / "out", AT_ONCE), plan.units)
    assert (len(outcome.wrong), outcome.not_begun) == (1, 5)
    assert "a.0000.h5ad: cannot be written: File too large. Remedy: " in outcome.wrong[0]
    assert not list((tmp_path / "out").glob(".*"))


def test_a_file_system_that_cannot_reserve_room(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    plan = plan_of(address)
    assert fetch_units(Fetching.of(plan, tmp_path / "out", AT_ONCE), plan.units).fetched == 6


def test_another_failure_of_hdf5_is_a_defect(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(cells: anndata.AnnData, path: Path, **options: object) -> None:
        raise RuntimeError("unable to register datatype")

    monkeypatch.setattr(anndata.AnnData, "write_h5ad", fail)
    plan = plan_of(address)
    with pytest.raises(RuntimeError, match="unable to register"):
        fetch_units(Fetching.of(plan, tmp_path / "out", AT_ONCE), plan.units)


def test_an_experiment_that_changed_is_noticed(address: str, tmp_path: Path) -> None:
    plan = plan_of(address)
    shorter = replace(plan.units[0], last=plan.units[0].last - 1)
    outcome = fetch_units(Fetching.of(plan, tmp_path / "out", AT_ONCE), [shorter])
    assert outcome.wrong == [
        "a.0000: the Census gives 9 cells, the plan says 10: it is another one now. Remedy: a new "
        "--out."
    ]
    assert not list((tmp_path / "out").glob("*.h5ad"))


def test_several_workers(address: str, tmp_path: Path) -> None:
    plan = plan_of(address)
    fetching = Fetching.of(plan, tmp_path / "out", AT_ONCE)
    assert fetch_units(fetching, plan.units, workers=2).fetched == 6
    assert not list(find_missing(fetching, plan.units))


def test_retry() -> None:
    read = DataError("a://network: cannot be read")
    read.__cause__ = RuntimeError("HTTP 503")
    left = [NETWORK, ConnectionResetError("reset"), read]

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    assert Retry(4, 0).call("x", work) == "done"
    left[:] = [NETWORK] * 3
    with pytest.raises(NetworkError, match="x: failed 3 times"):
        AT_ONCE.call("x", work)
    left[:] = [NETWORK, DataError("no such column")]
    with pytest.raises(DataError, match="no such column"):
        AT_ONCE.call("x", work)
    for local in (DataError("no column `network`"), OSError(28, "No space left on connection.h5")):
        left[:] = [NETWORK, local]
        with pytest.raises(type(local)):
            AT_ONCE.call("x", work)
    for told, is_network in (
        ("S3: Error [HTTP Response Code: -1] : curlCode: 6", True),
        ("S3: Error [HTTP Response Code: 503] SlowDown", True),
        ("S3: Error [HTTP Response Code: 404]", False),
        ("S3: Error [HTTP Response Code: 403] AccessDenied", False),
        ("The object at URI 's3://a/b' is not a valid TileDB array or group.", False),
    ):
        assert is_network_fault(RuntimeError(told)) == is_network
    with pytest.raises(DataError, match="--attempts must be 1"):
        Retry(0)


class FakeCensus(dict):  # type: ignore[type-arg]
    def __enter__(self) -> FakeCensus:
        return self

    def __exit__(self, *error: object) -> None:
        self["closed"] = True


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> FakeCensus:
    """cellxgene_census, as far as it is used, with one release and one organism."""
    opened = FakeCensus(census_data={"homo_sapiens": SimpleNamespace(uri="s3://bucket/human")})
    module = ModuleType("cellxgene_census")
    module.__spec__ = ModuleSpec("cellxgene_census", None)

    def describe(version: str) -> dict[str, str]:
        if version not in ("stable", "2025-01-30"):
            raise ValueError(f"unknown {version}.")
        return {"release_build": "2025-01-30"}

    def open_soma(*, census_version: str) -> FakeCensus:
        opened["version"] = census_version
        return opened

    module.get_census_version_description = describe  # type: ignore[attr-defined]
    module.open_soma = open_soma  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cellxgene_census", module)
    return opened


def test_release(fake_package: FakeCensus) -> None:
    assert find_release("stable") == Release("2025-01-30", "s3://bucket/human")
    # Opened by its date, whatever `stable` is by then.
    assert (fake_package["version"], fake_package["closed"]) == ("2025-01-30", True)
    with pytest.raises(DataError, match=r"no Census version '1999': unknown 1999\."):
        find_release("1999")
    with pytest.raises(DataError, match="has no organism 'martian'"):
        find_release("stable", "martian")


def test_release_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geneformer_mcore.backends.find_spec", lambda name: None)
    with pytest.raises(MissingBackendError, match=r"geneformer_mcore\[census\]"):
        find_release("stable")


def test_the_real_package_has_what_is_used() -> None:
    package = pytest.importorskip("cellxgene_census")
    assert {"open_soma", "get_census_version_description"} <= set(dir(package))


def test_card_filter_and_columns() -> None:
    # Section by section the model card's; see also its list of tracked columns.
    for part in ("suspension_type != 'na'", "is_primary_data == True", "disease == 'normal'"):
        assert part in CARD_FILTER
    card = {"assay", "sex", "development_stage", "tissue_general", "self_reported_ethnicity"}
    assert card | {"dataset_id"} <= set(census.OBS_COLUMNS)
    assert json.loads(json.dumps(census.OBS_COLUMNS))
