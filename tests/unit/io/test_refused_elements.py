"""What anndata refuses is refused by the name of the element, and what lies in other files, too.

Each input is a good one, spoilt in one element; the outside file holds a column, or counts.
"""

from __future__ import annotations

import json
import shutil
import stat
import sys
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
import zarr
from scipy import sparse

from data_prep import build_store, build_vocabulary, make_split
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import WRONG_INPUT
from geneformer_mcore.inference import options
from geneformer_mcore.inference.cells import CountedCells
from geneformer_mcore.io import anndata_out
from geneformer_mcore.io.counts import open_counts
from geneformer_mcore.io.frames import StoredFrame
from geneformer_mcore.io.h5ad import CountsFile
from geneformer_mcore.store.ingest.sources import Inspection
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import RandomSplit
from geneformer_mcore.tokenizer.genes import InputOptions
from tests.support.small_cells import adata_of, random_counts, vocabulary_of
from tests.support.small_experiment import ORGANISM, write_experiment
from tests.support.small_store import write_small_store

NUM_CELLS, NUM_GENES = 12, 20
COUNTS = random_counts(np.random.default_rng(6), NUM_CELLS, NUM_GENES, density=0.4)
STORAGES = ("h5ad", "zarr2", "zarr3")


def cells(obs: dict[str, object] | None = None, **parts: object) -> anndata.AnnData:
    labels = pd.Categorical(["a", "b"] * (NUM_CELLS // 2))
    some = pd.array([None, *range(1, NUM_CELLS)], dtype="Int32")
    return adata_of(COUNTS, obs={"label": labels, "some": some} | (obs or {}), **parts)


def write(adata: anndata.AnnData, folder: Path, storage: str) -> Path:
    path = folder / ("a.h5ad" if storage == "h5ad" else "a.zarr")
    if storage == "h5ad":
        adata.write_h5ad(path)
    else:
        with (
            warnings.catch_warnings(action="ignore"),
            anndata.settings.override(zarr_write_format=int(storage[-1])),
        ):
            adata.write_zarr(path, convert_strings_to_categoricals=False)
    return path


def opened(path: Path) -> Any:
    """The file or store, to be changed."""
    if path.suffix == ".h5ad":
        return h5py.File(path, "r+")
    return zarr.open_group(path, mode="r+", use_consolidated=False)


def close(root: Any, path: Path) -> None:
    if path.suffix == ".h5ad":
        root.close()
    else:
        with warnings.catch_warnings(action="ignore"):
            zarr.consolidate_metadata(path)


# What anndata refuses

Edit = Callable[[Any], object]


def replaced(place: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """An array by what `change` makes of its values, under its attributes."""

    def edit(root: Any) -> None:
        values, attributes = change(root[place][:]), dict(root[place].attrs)
        del root[place]
        if isinstance(root, h5py.Group):
            root.create_dataset(place, data=values)
        else:
            root.create_array(place, data=values)
        root[place].attrs.update(attributes)

    return edit


def with_value(place: str, value: float, kind: str = "") -> Edit:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(kind or values.dtype)
        values[3] = value
        return values

    return replaced(place, change)


def as_type(place: str, kind: str) -> Edit:
    return replaced(place, lambda values: values.astype(kind))


def numbers(place: str) -> Edit:
    return replaced(place, lambda values: np.arange(len(values)))


def attribute(place: str, name: str, value: object) -> Edit:
    return lambda root: root[place].attrs.__setitem__(name, value)


def same_category_twice(root: Any) -> None:
    root["obs/label/categories"][1] = "a"


REFUSED: dict[str, tuple[Edit, str]] = {
    "indptr float": (as_type("X/indptr", "f8"), "X is damaged: its indptr .*float64"),
    "indptr uint64": (as_type("X/indptr", "u8"), "X is damaged: its indptr .*uint64"),
    "indices float": (as_type("X/indices", "f4"), "X is damaged: its indices .*float32"),
    "indices half": (with_value("X/indices", 2.5, "f8"), "X is damaged: its indices .*float64"),
    "data float16": (as_type("X/data", "f2"), "X: the values of a sparse .*float16"),
    "data of another byte order": (as_type("X/data", ">f4"), "X: the values of a sparse .*>f4"),
    "code above": (with_value("obs/label/codes", 2), "obs: column label has code 2 for one of 2"),
    "code below": (with_value("obs/label/codes", -2), "obs: column label has code -2"),
    "codes float": (as_type("obs/label/codes", "f4"), "obs: column label.* codes must be whole"),
    "code NaN": (with_value("obs/label/codes", np.nan, "f4"), "obs: column label.* codes must be"),
    "codes truth": (as_type("obs/label/codes", "?"), "obs: column label.* codes must be whole"),
    "codes short": (
        replaced("obs/label/codes", lambda codes: codes[:-1]),
        "obs: column label holds 11 values.*12 row names",
    ),
    "a category twice": (same_category_twice, "obs: column label.*each category .*see 'a'"),
    "categories in a square": (
        replaced("obs/label/categories", lambda _: np.zeros((2, 2))),
        "obs: column label.*categories are no list",
    ),
    "a column in a square": (
        replaced("obs/n", lambda n: np.ones((len(n), 3))),
        "obs: column n must have one dimension, and has 2",
    ),
    "mask short": (
        replaced("obs/some/mask", lambda mask: mask[:3]),
        r"obs: column some.*mask has shape \(3,\), its values \(12,\)",
    ),
    "numbers as obs names": (numbers("obs/_index"), "obs: column _index.*must be text"),
    "numbers as var names": (numbers("var/_index"), "var: column _index.*must be text"),
    "no name of the row names": (lambda root: root["obs"].attrs.pop("_index"), "obs has no row"),
    "another kind of file": (attribute("/", "encoding-type", "mudata"), "it is mudata of"),
    "X of another version": (attribute("X", "encoding-version", "9.9"), "X: .*of version 9.9"),
    "var of another version": (attribute("var", "encoding-version", "9.9"), "var: .*version 9.9"),
}


def look(path: Path) -> None:
    """As build_store.py looks at an input before any work."""
    vocabulary = vocabulary_of(NUM_GENES)
    Inspection(vocabulary, InputOptions(), RandomSplit())(str(path), lambda _: None)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", REFUSED)
def test_an_element_that_anndata_refuses(tmp_path: Path, kind: str, storage: str) -> None:
    edit, message = REFUSED[kind]
    path = write(cells({"n": np.arange(NUM_CELLS)}), tmp_path, storage)
    look(path)
    if (kind, storage) == ("data of another byte order", "zarr3"):
        return  # A matter of its codecs, and read alike by anndata.
    root = opened(path)
    edit(root)
    close(root, path)
    with pytest.raises(DataError, match=rf"{path.name}.*{message}.*Remedy"):
        look(path)
    if storage == "h5ad":
        with pytest.raises(Exception, match=r"."):  # Of the oracle: whatever it is.
            anndata.read_h5ad(path).X.toarray()


@pytest.mark.parametrize("place", ["layers/counts", "raw/X"])
def test_counts_elsewhere_in_the_file_are_checked_alike(tmp_path: Path, place: str) -> None:
    made = cells(layers={"counts": COUNTS} if place.startswith("layers") else {})
    made.raw = made.copy()
    path = write(made, tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        as_type(f"{place}/indices", "f8")(file)
    with pytest.raises(DataError, match=f"{place.replace('raw/', 'raw.')} is damaged: its indices"):
        open_counts(path)


UNUSED: dict[str, Edit] = {
    "a part missing": lambda root: root.pop("X/indptr"),
    "a type": as_type("X/indices", "f8"),
    "an encoding": attribute("X", "encoding-type", "array"),
    "fewer rows": attribute("X", "shape", [NUM_CELLS - 1, NUM_GENES]),
    "three dimensions": replaced("X/data", lambda data: data[:, None, None]),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_matrix_that_is_not_taken_is_looked_at(tmp_path: Path, kind: str) -> None:
    made = cells()
    made.raw = made.copy()
    path = write(made, tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        UNUSED[kind](file)
    with pytest.raises(DataError, match=r"a.h5ad: X .*Remedy|a.h5ad: X: its encoding"):
        look(path)


def test_a_wrong_code_far_down_is_found_before_any_work(tmp_path: Path) -> None:
    number = 1500
    label = pd.Categorical(["a", "b"] * (number // 2))
    counts = random_counts(np.random.default_rng(1), number, 5)
    path = write(adata_of(counts, obs={"label": label}), tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        file["obs/label/codes"][number - 2] = 7
    with pytest.raises(DataError, match="column label has code 7"):
        look(path)
    with pytest.raises(DataError, match="column label has code 7"):
        CountedCells(str(path), vocabulary_of(5), 8, InputOptions())


def test_dense_numbers_of_any_type_and_order_are_read(tmp_path: Path) -> None:
    path = write(adata_of(COUNTS.toarray()), tmp_path, "h5ad")
    for kind in ("f2", ">f8"):
        with h5py.File(path, "r+") as file:
            as_type("X", kind)(file)
        assert anndata.read_h5ad(path).X.sum() == COUNTS.sum()
        with open_counts(path) as counts:
            block = counts.read_rows(0, NUM_CELLS)
        found = sparse.csr_matrix((block.data, block.indices, block.indptr), COUNTS.shape)
        np.testing.assert_array_equal(found.toarray(), COUNTS.toarray())


# What lies in other files


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A file with a column and counts, which inputs made in the same folder name."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["column"] = np.arange(NUM_CELLS)
        file["counts"] = COUNTS.toarray()
    (tmp_path / "numbers.raw").write_bytes(np.arange(NUM_CELLS, dtype="<i8").tobytes())
    return tmp_path / "other.h5"


def linked(place: str) -> Edit:
    def edit(root: Any) -> None:
        root.pop(place, None)
        root[place] = h5py.ExternalLink("other.h5", "/column")

    return edit


def stored_outside(root: Any) -> None:
    size, place = NUM_CELLS * 8, Path(root.filename).with_name("numbers.raw")
    del root["obs/n"]
    root.create_dataset("obs/n", (NUM_CELLS,), "<i8", external=[(str(place), 0, size)])


def virtual(file: str, source: str) -> Edit:
    """layers/counts as a view of an array of a file; ".": the same one."""

    def edit(root: Any) -> None:
        name = file if file == "." else str(Path(root.filename).with_name(file))
        layout = h5py.VirtualLayout(COUNTS.shape, "f4")
        layout[:] = h5py.VirtualSource(name, source, COUNTS.shape)
        root.create_virtual_dataset("layers/counts", layout)

    return edit


def through_a_link(root: Any) -> None:
    root["uns/elsewhere"] = h5py.ExternalLink("other.h5", "/")
    del root["obs/n"]
    root["obs/n"] = h5py.SoftLink("/uns/elsewhere/column")


OUTSIDE: dict[str, tuple[Edit, str]] = {
    "a column": (linked("obs/n"), r"/obs/n \(a link\)"),
    "a column of var": (linked("var/n"), r"/var/n \(a link\)"),
    "raw": (linked("raw/X"), r"/raw/X \(a link\)"),
    "what is only copied": (linked("uns/n"), r"/uns/n \(a link\)"),
    "external storage": (stored_outside, r"/obs/n \(external storage\)"),
    "a layer": (virtual("other.h5", "counts"), r"/layers/counts \(a virtual dataset\)"),
    "through a link": (through_a_link, r"/uns/elsewhere \(a link\)"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_elements_of_an_h5ad_in_other_files(tmp_path: Path, other: Path, kind: str) -> None:
    edit, message = OUTSIDE[kind]
    path = write(cells({"n": np.arange(NUM_CELLS)}, var={"n": range(NUM_GENES)}), tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        edit(file)
    refused = rf"a.h5ad: all of its data must be in it.*: {message}\. Remedy.*`allow_external=True`"
    with pytest.raises(DataError, match=refused):
        open_counts(path)
    if kind == "a column of var":  # One of another length: damaged, wherever it is.
        return
    with open_counts(path, allow_external=True) as counts:
        obs = counts.read_obs(0, NUM_CELLS)
        assert obs["n"].tolist() == list(range(NUM_CELLS))
        assert counts.read_rows(0, NUM_CELLS).data.sum() == COUNTS.sum()


def test_links_within_the_file_are_followed(tmp_path: Path) -> None:
    """Soft ones, a second name, a circle, and a view of an array of the same file."""
    path = write(cells({"n": np.arange(NUM_CELLS)}), tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        file["uns/kept"] = file["obs/n"]
        del file["obs/n"]
        file["obs/n"] = h5py.SoftLink("/uns/kept")
        file["uns/circle"] = file["uns"]
        file["dense"] = COUNTS.toarray()
        virtual(".", "/dense")(file)
    with open_counts(path) as counts:
        assert counts.location == "layers/counts"
        assert counts.read_obs(0, 3)["n"].tolist() == [0, 1, 2]
        assert counts.read_rows(0, NUM_CELLS).data.sum() == COUNTS.sum()


def test_categories_by_a_reference_to_no_element(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        loose = file.create_dataset(None, data=[b"a"])
        file["obs/_index"], file["obs/donor"] = ["x", "y"], np.zeros(2, np.int8)
        file["obs"].attrs["_index"] = "_index"
        file["obs/donor"].attrs["categories"] = loose.ref
        with pytest.raises(DataError, match=r"column donor.*no element of the file"):
            StoredFrame(file["obs"], "obs").read(0, 2)


def test_an_output_is_whole_where_its_input_was_not(tmp_path: Path, other: Path) -> None:
    path = write(cells({"n": np.zeros(NUM_CELLS, int)}), tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        stored_outside(file)
    (tmp_path / "out").mkdir()
    copy = tmp_path / "out/b.h5ad"
    beside = anndata_out.Beside({"X_new": np.ones((NUM_CELLS, 2))}, {}, {})
    anndata_out.write_copy(path, copy, beside)
    (tmp_path / "numbers.raw").unlink()
    assert anndata.read_h5ad(copy).obs["n"].tolist() == list(range(NUM_CELLS))
    open_counts(copy).close()


@pytest.mark.parametrize("storage", STORAGES[1:])
@pytest.mark.parametrize("place", ["obs/n", "X/data/0", "var"])
def test_links_in_a_zarr_folder(tmp_path: Path, storage: str, place: str) -> None:
    path = write(cells({"n": np.arange(NUM_CELLS)}), tmp_path, storage)
    place = place.replace("data/0", "data/c/0") if storage == "zarr3" else place
    outside = tmp_path / "outside"
    (path / place).rename(outside)
    (path / place).symlink_to(outside)
    with pytest.raises(DataError, match=rf"a.zarr: .*elsewhere: {place} \(a symbolic link\)"):
        open_counts(path)
    with open_counts(path, allow_external=True) as counts:
        assert counts.read_obs(0, 2)["n"].tolist() == [0, 1]
    (path / place).unlink()
    outside.rename(path / "kept")
    (path / place).symlink_to(path / "kept")
    whole = tmp_path / "b.zarr"
    whole.symlink_to(path)  # Named by the user.
    with open_counts(whole) as counts:
        assert counts.read_obs(0, 2)["n"].tolist() == [0, 1]


def test_references_of_zarr_lead_nowhere(tmp_path: Path) -> None:
    """Paths in attributes, links as entries of an archive, and files of references."""
    path = write(cells({"n": np.arange(NUM_CELLS)}), tmp_path, "zarr2")
    shutil.copytree(path, tmp_path / "other.zarr")
    root = opened(path)
    root["obs"].attrs["column-order"] = ["../../other.zarr/obs/n"]
    close(root, path)
    with pytest.raises(DataError, match="cannot be read as an AnnData zarr"):
        open_counts(path)

    archive = tmp_path / "b.zarr.zip"
    other = tmp_path / "other.zarr"
    with zipfile.ZipFile(archive, "w") as target:
        for file in sorted(each for each in other.rglob("*") if each.is_file()):
            name = file.relative_to(other).as_posix()
            entry = zipfile.ZipInfo(name)
            if name == "obs/n/0":
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
                target.writestr(entry, str(file))
            else:
                target.writestr(entry, file.read_bytes())
    with CountsFile(archive) as counts, pytest.raises(DataError, match="column n, rows 0 to 1"):
        counts.read_obs(0, 2)

    references = tmp_path / "references.json"
    references.write_text(json.dumps({"version": 1, "refs": {".zgroup": '{"zarr_format": 2}'}}))
    for source in (str(references), f"reference://{references}"):
        with pytest.raises(DataError, match="Remedy"):
            open_counts(source)


@pytest.fixture
def census(tmp_path: Path) -> Path:
    """Of twelve cells, and "other" next to it, whose human Experiment is the same."""
    for name in ("census", "other"):
        write_experiment(tmp_path / name, {"d": adata_of(COUNTS)})
    return tmp_path / "census"


@pytest.mark.parametrize(
    "member",
    ["census_data", "census_data/homo_sapiens", f"{ORGANISM}/obs", f"{ORGANISM}/ms"]
    + [f"{ORGANISM}/ms/RNA/{each}" for each in ("var", "X", "X/raw")],
)
def test_members_of_an_experiment_elsewhere(census: Path, member: str) -> None:
    group, _, name = str(census / member).rpartition("/")
    with tiledbsoma.open(group, "d") as collection:
        del collection[name]
    with (
        tiledbsoma.open(group, "w") as collection,
        tiledbsoma.open(str(census.with_name("other") / member)) as elsewhere,
    ):
        collection.set(name, elsewhere, use_relative_uri=False)
    refused = rf"census: .*elsewhere: {name} \(file://.*/other/{member}\)\. Remedy.*allow_external"
    with pytest.raises(DataError, match=refused):
        open_counts(census)
    with open_counts(census, allow_external=True) as counts:
        assert counts.read_rows(0, NUM_CELLS).data.sum() == COUNTS.sum()


def test_links_in_an_experiments_folder(census: Path) -> None:
    obs = census / ORGANISM / "obs"
    shutil.rmtree(obs)
    obs.symlink_to(census.with_name("other") / ORGANISM / "obs")
    with pytest.raises(DataError, match=rf"elsewhere: {ORGANISM}/obs \(a symbolic link\)"):
        open_counts(census)
    with open_counts(census, allow_external=True) as counts:
        assert counts.num_cells == NUM_CELLS


def test_token_stores_with_parts_elsewhere(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_small_store(store, [[0, 5, 6], [0, 7]], 9, 8)
    shutil.copytree(store, tmp_path / "other")
    (tile,) = store.glob("tokens/__fragments/*/a0_var.tdb")
    tile.unlink()
    tile.symlink_to(tmp_path / "other" / tile.relative_to(store))
    with pytest.raises(DataError, match=r"elsewhere: tokens/.*a0_var.tdb \(a sym.*cp -rL"):
        TokenStore.open(store)
    whole = tmp_path / "linked"
    whole.symlink_to(tmp_path / "other")
    TokenStore.open(whole).close()


# The parameter and the option


def test_commands_have_the_option(
    tmp_path: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obs = {"n": np.arange(NUM_CELLS), "dataset_id": [*"dddddddddeee"]}
    path = write(cells(obs), tmp_path, "h5ad")
    with h5py.File(path, "r+") as file:
        linked("obs/n")(file)
    vocabulary_of(NUM_GENES).save(tmp_path / "v.json")
    known = ["--vocabulary", tmp_path / "v.json", "--workers", 1]
    split = ["--policy", "smallest-first", "--held-out-fraction", 0.5]
    for module, *words in (
        (build_store, *known, "--out", tmp_path / "store"),
        (build_vocabulary, "--out", tmp_path / "new.json"),
        (make_split, *split, "--out", tmp_path / "split.json"),
    ):
        command = ["command", *map(str, words), str(path)]
        monkeypatch.setattr(sys, "argv", command)
        with suppress(DataError):
            assert module.main() == WRONG_INPUT
        assert not Path(words[words.index("--out") + 1]).exists()
        monkeypatch.setattr(sys, "argv", [*command, "--allow-external"])
        assert not module.main()


def test_commands_of_models_share_the_option() -> None:
    names = {name.removeprefix("--").replace("-", "_"): None for name in options.COUNTS}
    made = options.input_options(Namespace(**names | {"allow_external": True}))
    assert made.allow_external
    assert not InputOptions().allow_external
