"""Embeddings of cells and genes: equal to the plain reference, in the input's order, anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.ingest.build import build_store
from tests.distributed import toy
from tests.distributed.commands import assert_refused, commands, succeed
from tests.distributed.inference import trained
from tests.distributed.inference.trained import (
    EMPTY,
    NUM_CELLS,
    NUM_GENES,
    UNKNOWN,
    Trained,
    words,
)  # fmt: skip
from tests.distributed.parity import PP2, SEQUENCE, TP2
from tests.distributed.ranks import run_ranks
from tests.support.small_cells import gene_ids, vocabulary_of
from tests.support.small_experiment import write_experiment

MISSING = [UNKNOWN, EMPTY]
FEW = f"--tokens-per-batch {toy.SEQ_LENGTH}"
OF_REFERENCE: dict[str, tuple[str, str, int | None]] = {
    "b.npy": ("plain", "", None),
    "layer_0.npy": ("plain", "--layer 0", 0),
    "layer_3.npy": ("plain", "--layer second-to-last", 3),
    "cls.npy": ("plain", "--pooling cls", None),
    "cls_3.npy": ("plain", "--pooling cls --layer 3", 3),
    "post.npy": ("post", "", None),
    "post_3.npy": ("post", "--layer 3", 3),
}
"""What one rank writes from the cells -> (the model, what it is asked, the layer that is meant).
Models that come from Hugging Face are post-LN."""
OF_PLAIN = {
    "b.h5ad": "",
    "small.npy": FEW,
    "half.h5ad": "--dtype float16",
    "brain.npy": "--dtype bfloat16",
    "bf16.npy": "--precision bf16",
}
"""The same by the plain model -> what it is asked."""
OF_TWO = {
    "tensor.npy": TP2,
    "sequence.npy": " ".join(SEQUENCE),
    "pipeline.npy": PP2,
    "layer_1.npy": f"--layer 1 {PP2}",
    "layer_3.npy": f"--layer 3 {PP2}",
    "layer_4.npy": f"--layer 4 {TP2}",
}
OF_FOUR = {"data.npy": "", "small.npy": FEW, "both.npy": f"{TP2} {PP2}"}
GENE_TABLES = (".csv", ".tsv", ".npy")


def values(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    return anndata.read_h5ad(path).obsm["X_geneformer"]


def wanted(model: Trained, layer: int | None = None, by_cls: bool = False) -> np.ndarray:
    """float64 [cells, H] by the plain reference: means of genes, [CLS] left out, or that; NaN where
    there is no gene."""
    states = [model.states(tokens, layer) for tokens in model.tokens]
    found = np.stack([each[0] if by_cls or len(each) == 1 else each[1:].mean(axis=0)
                      for each in states])  # fmt: skip
    found[MISSING] = np.nan
    return found


@pytest.fixture(scope="module")
def folder(models: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = models["plain"], tmp_path_factory.mktemp("alone")
    experiment = write_experiment(folder / "census", {"one": anndata.read_h5ad(model.h5ad)})
    store = folder / "store"
    build_store([str(model.h5ad)], store, vocabulary=model.vocabulary, seq_length=toy.SEQ_LENGTH)
    asked = {name: (models[kind], more) for name, (kind, more, _) in OF_REFERENCE.items()}
    asked |= {name: (model, more) for name, more in OF_PLAIN.items()}
    asked |= {"other_bf16.npy": (models["bf16"], "")}
    lines = [
        ["embed", *each.line("--output", folder / name, more)]
        for name, (each, more) in asked.items()
    ]
    start = ("--checkpoint", model.run)
    for suffix in GENE_TABLES:
        lines.append(words("embed", *start, "--gene-embeddings", folder / f"genes{suffix}"))
    for command, source, more in (
        ("embed", Path(experiment), ""),
        ("perturb", Path(experiment), "--top 1 --null 0"),
        ("embed", store, ""),
    ):
        out = folder / f"{command}_{source.name}.h5ad"
        lines.append(words(command, *start, "--input", source, "--output", out, more))
    succeed(lines)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> Path:
    return folder / "b.h5ad"


@pytest.mark.parametrize("name", OF_REFERENCE)
def test_equals_the_plain_reference(name: str, models: dict[str, Trained], folder: Path) -> None:
    kind, more, layer = OF_REFERENCE[name]
    found, expected = values(folder / name), wanted(models[kind], layer, "cls" in more)
    assert found.dtype == np.float32
    assert found.shape == (NUM_CELLS, 32)
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == MISSING
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.nanstd(expected, axis=0).min() > 0.01, "cells that are alike would prove nothing"


def test_the_output_is_the_input_and_more(model: Trained, folder: Path, result: Path) -> None:
    before, after = anndata.read_h5ad(model.h5ad), anndata.read_h5ad(result)
    flags = after.obs["geneformer_embedded"]
    assert flags.dtype == bool
    assert np.flatnonzero(~flags.to_numpy()).tolist() == MISSING
    pd.testing.assert_frame_equal(after.obs.drop(columns="geneformer_embedded"), before.obs)
    pd.testing.assert_frame_equal(after.var, before.var)
    assert (after.X != before.X).nnz == 0
    assert after.uns["kept"] == "as it was"
    np.testing.assert_array_equal(after.obsm["X_other"], before.obsm["X_other"])
    facts = after.uns["geneformer"]
    manifest = (model.step_folder / "manifest.json").read_bytes()
    assert facts["checkpoint_hash"] == hashlib.sha256(manifest).hexdigest()
    assert facts["vocabulary_hash"] == model.vocabulary.checksum
    assert (facts["step"], facts["layer"], facts["pooling"]) == (trained.STEP, "last", "mean")
    assert (facts["model"]["num_layers"], facts["model"]["hidden_size"]) == (4, 32)
    assert facts["version"]
    np.testing.assert_array_equal(values(folder / "b.npy"), values(result))
    facts = json.loads((folder / "b.json").read_text())
    assert (facts["cells"], facts["step"]) == (NUM_CELLS, trained.STEP)
    assert facts["precision"] == "fp32"


def test_scanpy_takes_it(result: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        import scanpy as sc

        adata = anndata.read_h5ad(result)
        adata = adata[adata.obs["geneformer_embedded"]].copy()
        sc.pp.neighbors(adata, use_rep="X_geneformer", n_neighbors=5)
    assert adata.obsp["connectivities"].shape == (NUM_CELLS - 2, NUM_CELLS - 2)
    assert adata.obsp["connectivities"].nnz > 0


def test_batches_and_layouts_change_nothing(model: Trained, folder: Path, tmp_path: Path) -> None:
    alone = values(folder / "b.h5ad")
    np.testing.assert_allclose(values(folder / "small.npy"), alone, rtol=0, atol=1e-6)
    for ranks, asked in ((2, OF_TWO), (4, OF_FOUR)):
        there = tmp_path / str(ranks)
        there.mkdir()
        lines = [["embed", *model.line("--output", there / n, more)] for n, more in asked.items()]
        succeed(lines, ranks)
        for name in asked:
            found, is_layer = values(there / name), name.startswith("layer")
            expected = wanted(model, int(name[6])) if is_layer else alone
            atol = 1e-5 if is_layer else 1e-6
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=atol, err_msg=f"{ranks} {name}"
            )


def test_number_formats(models: dict[str, Trained], folder: Path) -> None:
    exact, half, brain = (values(folder / name) for name in ("b.h5ad", "half.h5ad", "brain.npy"))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, exact, rtol=1e-3, atol=1e-3)
    assert brain.dtype == np.float32
    known = ~np.isnan(exact).any(axis=1)
    assert not (brain[known].view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(brain, exact, rtol=2**-8, atol=0)
    computed = values(folder / "bf16.npy")
    assert 1e-5 < np.nanmax(np.abs(computed - exact)) < 0.3
    # A model trained in bf16 is used with its exact weights; its stage's own are rounded.
    rounded = wanted(models["bf16"])
    assert 1e-4 < np.nanmax(np.abs(values(folder / "other_bf16.npy") - rounded)) < 0.3


def test_the_input_is_left_alone_and_a_step_folder_will_do(model: Trained, tmp_path: Path) -> None:
    before = model.h5ad.read_bytes(), model.h5ad.stat().st_mtime_ns
    line = model.line("--checkpoint", model.step_folder, "--output", tmp_path / "b.h5ad")
    (ended,) = succeed([["embed", *line]])
    assert (model.h5ad.read_bytes(), model.h5ad.stat().st_mtime_ns) == before
    assert "41 cells x 32 (float32), 2 without a known gene" in ended.out


def test_genes(model: Trained, folder: Path) -> None:
    found = [np.load(folder / "genes.npy")]
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        table = pd.read_csv(folder / f"genes{suffix}", sep=separator)
        assert table["feature_id"].tolist() == gene_ids(NUM_GENES)
        assert list(table.columns[:2]) == ["feature_id", "name"]
        found.append(table.iloc[:, 2:].to_numpy(np.float32))
    expected = model.weights["embedding.word_embeddings.weight"][5 : toy.VOCABULARY]
    for each in found:
        np.testing.assert_array_equal(each, expected)


Python = tuple[list[str], np.ndarray | None, np.ndarray]


def by_python(run: str, h5ad: str) -> list[Python]:
    """Without a copy, and with one: (names in obsm of the AnnData given, its embedding, that of
    what is returned)."""
    import geneformer_mcore

    os.environ.pop("RANK")
    torch.distributed.destroy_process_group()
    found = []
    for copy in (False, True):
        adata = anndata.read_h5ad(h5ad)
        tempfile.tempdir = "/proc/nowhere"  # Nothing is written.
        returned = geneformer_mcore.embed(adata, run, copy=copy)
        assert (returned is None) == (not copy)
        again = returned if copy else adata
        assert again.obs["geneformer_embedded"].sum() == NUM_CELLS - 2
        assert again.uns["geneformer"]["layer"] == "last"
        view = again[::-1]
        geneformer_mcore.embed(view, run, key_added="X_again", layer=4)
        assert view.uns["geneformer"]["layer"] == "4"
        assert "X_again" not in again.obsm
        fractions = anndata.AnnData(adata.X * 0.37, obs=adata.obs, var=adata.var)
        with pytest.raises(DataError, match="their layer with `counts_layer=`"):
            geneformer_mcore.embed(fractions, run)
        embedding = again.obsm["X_geneformer"]
        found.append((sorted(adata.obsm), adata.obsm.get("X_geneformer"), embedding))
    return found


def test_from_python(model: Trained, result: Path) -> None:
    (found,) = run_ranks(by_python, 1, str(model.run), str(model.h5ad))
    for copy, (names, inside, embedding) in zip((False, True), found, strict=True):
        assert names == (["X_other"] if copy else ["X_geneformer", "X_other"])
        assert (inside is None) == copy
        np.testing.assert_allclose(embedding, values(result), rtol=0, atol=1e-6)


def test_the_package_stays_light(repository: Path) -> None:
    code = "import sys, geneformer_mcore; geneformer_mcore.embed; print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"


def test_wrong_input(model: Trained, tmp_path: Path) -> None:
    alone, damaged, out = (tmp_path / name for name in ("alone", "damaged", "b.h5ad"))
    shutil.copytree(model.run / "checkpoints", alone / "checkpoints")
    shutil.copytree(model.run, damaged)
    file = next((damaged / "checkpoints" / model.step_folder.name).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    vocabulary_of(NUM_GENES + 1).save(tmp_path / "other.json")
    (tmp_path / "there.h5ad").write_text("")
    cells = anndata.read_h5ad(model.h5ad)
    cells.write_h5ad(tmp_path / "linked.h5ad")
    with h5py.File(tmp_path / "linked.h5ad", "r+") as linked:
        linked["uns/far"] = h5py.ExternalLink(str(model.h5ad), "/X")
    cells.X = cells.X * 0.37
    cells.write_h5ad(tmp_path / "normalised.h5ad")
    cells.var_names = [f"ENSMUSG{i:011d}" for i in range(cells.n_vars)]
    cells.write_h5ad(tmp_path / "strange.h5ad")
    more = {
        "no folder": "--checkpoint nowhere",
        "a folder without any": f"--checkpoint {tmp_path}",
        "1 damaged one(s)": f"--checkpoint {damaged}",
        "was not found": f"--checkpoint {alone}",
        "its token ids mean other genes": f"--vocabulary {tmp_path}/other.json",
        "another file than the input": f"--output {model.h5ad}",
        "exists already": f"--output {tmp_path}/there.h5ad",
        "must end in .h5ad or .npy": f"--output {tmp_path}/b.csv",
        "must end in .csv": f"--gene-embeddings {tmp_path}/genes.h5ad",
        "no such file": "--input no.h5ad",
        "these are elsewhere: /uns/far (a link)": f"--input {tmp_path}/linked.h5ad",
        "0 of 725 genes": f"--input {tmp_path}/strange.h5ad",
        "counts": f"--input {tmp_path}/normalised.h5ad",
        "--counts-layer": "--counts-layer nothing",
        "0 (the embedding) to 4": "--layer 5",
        "and is first": "--layer first",
        "tokens per batch (95) must be at least the 96": "--tokens-per-batch 95",
        "only the layout can be set here": "train.steps=3",
        "parallel.tensor (3)": "parallel.tensor=3",
        "the number of ranks (1)": "parallel.tensor=2",
        "invalid choice: 'max'": "--pooling max",
    }
    cases = {text: model.line("--output", out, each) for text, each in more.items()}
    cases["go together"] = model.line()
    cases["nothing is asked for"] = model.line()[:2]
    assert_refused("embed", cases)
    assert not out.exists()


def test_what_one_rank_meets_all_ranks_say(model: Trained, tmp_path: Path) -> None:
    cells, path = anndata.read_h5ad(model.h5ad), tmp_path / "half.h5ad"
    cells.X.data[-1] = 0.5
    cells.write_h5ad(path)
    line = model.line("--output", tmp_path / "b.npy", h5ad=path)
    (first,), (second,) = run_ranks(commands, 2, "embed", [line])
    assert (first.code, second.code) == (2, 2)
    assert "0.5" in first.err
    assert second.err == ""


def test_cells_of_an_experiment_and_of_a_store(model: Trained, folder: Path) -> None:
    names = [f"cell{i}" for i in range(NUM_CELLS)]
    for command in ("embed", "perturb"):
        obs = anndata.read_h5ad(folder / f"{command}_homo_sapiens.h5ad").obs
        assert obs["observation_joinid"].tolist() == names
    found = anndata.read_h5ad(folder / "embed_store.h5ad")
    assert found.n_obs == NUM_CELLS - 2
    assert set(found.obs["cell_type"]) == {"a", "b"}
    expected = pd.DataFrame(wanted(model), index=names).loc[found.obs_names]
    np.testing.assert_allclose(found.obsm["X_geneformer"], expected, rtol=0, atol=1e-5)
