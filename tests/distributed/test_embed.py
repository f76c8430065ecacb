"""Embeddings of cells and genes: equal to the plain reference, in the input's order, anywhere."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from tests.distributed import toy, trained
from tests.distributed.commands import commands
from tests.distributed.parity import PP2, SEQUENCE, TP2
from tests.distributed.ranks import run_ranks
from tests.distributed.trained import EMPTY, NUM_CELLS, NUM_GENES, ONE_GENE, UNKNOWN, Trained
from tests.small_cells import gene_id, vocabulary_of
from tests.small_experiment import write_experiment

MISSING = [UNKNOWN, EMPTY]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small trained run and its cells."""
    return trained.make(tmp_path_factory.mktemp("trained"))


def embedded(model: Trained, output: Path, *more: str, ranks: int = 1) -> np.ndarray:
    """What the command writes to `output`."""
    line = ["--checkpoint", str(model.run), "--input", str(model.h5ad), "--output", str(output)]
    for (ended,) in run_ranks(commands, ranks, "embed", [[*line, *more]]):
        assert ended.code == 0, ended.err
    if output.suffix == ".npy":
        return np.load(output)
    return anndata.read_h5ad(output).obsm["X_geneformer"]


def wanted(model: Trained, num_layers: int | None = None) -> list[np.ndarray]:
    """float64 [tokens, H] of each cell by itself, by the plain reference."""
    reference = model.reference()
    found = []
    with torch.no_grad():
        for tokens in model.tokens():
            ids, length = torch.from_numpy(tokens)[None], torch.tensor([len(tokens)])
            hidden = (
                reference.hidden(ids, length)
                if num_layers is None
                else reference.states(ids, length, num_layers)
            )
            found.append(hidden[0].numpy())
    return found


def means(states: list[np.ndarray]) -> np.ndarray:
    """[cells, H]: of all genes, [CLS] left out; NaN where there is none."""
    nothing = np.full(states[0].shape[1], np.nan)
    return np.stack([each[1:].mean(axis=0) if len(each) > 1 else nothing for each in states])


@pytest.fixture(scope="module")
def result(model: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AnnData that one rank writes."""
    path = tmp_path_factory.mktemp("result") / "b.h5ad"
    embedded(model, path)
    return path


def test_equals_the_plain_reference(model: Trained, result: Path) -> None:
    found = anndata.read_h5ad(result).obsm["X_geneformer"]
    expected = means(wanted(model))
    assert found.dtype == np.float32
    assert found.shape == (NUM_CELLS, 32)
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == MISSING
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.nanstd(expected, axis=0).min() > 0.01, "cells that are alike would prove nothing"


def test_the_last_gene_counts_and_one_gene_is_enough(model: Trained, result: Path) -> None:
    found = anndata.read_h5ad(result).obsm["X_geneformer"]
    states = wanted(model)
    np.testing.assert_allclose(found[ONE_GENE], states[ONE_GENE][1], rtol=0, atol=1e-5)
    others = [i for i in range(NUM_CELLS) if i not in (*MISSING, ONE_GENE)]
    for i in others:
        without_last = states[i][1:-1].mean(axis=0)
        assert np.abs(found[i] - without_last).max() > 1e-3


def test_the_output_is_the_input_and_more(model: Trained, result: Path) -> None:
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
    assert facts["model"]["num_layers"] == 4
    assert facts["model"]["hidden_size"] == 32
    assert facts["version"]


def test_scanpy_takes_it(result: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scanpy as sc

        adata = anndata.read_h5ad(result)
        adata = adata[adata.obs["geneformer_embedded"]].copy()
        sc.pp.neighbors(adata, use_rep="X_geneformer", n_neighbors=5)
    assert adata.obsp["connectivities"].shape == (NUM_CELLS - 2, NUM_CELLS - 2)
    assert adata.obsp["connectivities"].nnz > 0


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, ()), (2, (TP2,)), (2, (PP2,)), (2, SEQUENCE), (4, (TP2, PP2))],
    ids=["data 2", "tensor 2", "pipeline 2", "sequence 2", "tensor 2 pipeline 2"],
)
def test_any_layout_gives_the_same(
    ranks: int, layout: tuple[str, ...], model: Trained, result: Path, tmp_path: Path
) -> None:
    alone = anndata.read_h5ad(result).obsm["X_geneformer"]
    found = embedded(model, tmp_path / "b.npy", *layout, ranks=ranks)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)


def test_small_batches_and_blocks_change_nothing(
    model: Trained, result: Path, tmp_path: Path
) -> None:
    alone = anndata.read_h5ad(result).obsm["X_geneformer"]
    few = str(toy.SEQ_LENGTH)
    for ranks in (1, 3):
        path = tmp_path / f"{ranks}.npy"
        found = embedded(model, path, "--tokens-per-batch", few, ranks=ranks)
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "layout"),
    [("second-to-last", ()), ("3", (PP2,)), ("1", (PP2,)), ("0", ()), ("4", (TP2,))],
)
def test_layers(layer: str, layout: tuple[str, ...], model: Trained, tmp_path: Path) -> None:
    number = 3 if layer == "second-to-last" else int(layer)
    path = tmp_path / "b.npy"
    found = embedded(model, path, "--layer", layer, *layout, ranks=1 + len(layout))
    expected = means(wanted(model, number))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [None, 3])
def test_cls(layer: int | None, model: Trained, tmp_path: Path) -> None:
    more = ("--pooling", "cls", *(("--layer", str(layer)) if layer else ()))
    found = embedded(model, tmp_path / "b.npy", *more)
    expected = np.stack([each[0] for each in wanted(model, layer)])
    expected[MISSING] = np.nan
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_number_formats(model: Trained, result: Path, tmp_path: Path) -> None:
    exact = anndata.read_h5ad(result).obsm["X_geneformer"]
    half = embedded(model, tmp_path / "half.h5ad", "--dtype", "float16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, exact, rtol=1e-3, atol=1e-3)
    brain = embedded(model, tmp_path / "brain.npy", "--dtype", "bfloat16")
    assert brain.dtype == np.float32
    known = ~np.isnan(exact).any(axis=1)
    assert not (brain[known].view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(brain, exact, rtol=2**-8, atol=0)
    computed = embedded(model, tmp_path / "bf16.npy", "--precision", "bf16")
    assert 1e-5 < np.nanmax(np.abs(computed - exact)) < 0.3


def test_a_model_trained_in_bf16_is_used_with_its_exact_weights(tmp_path: Path) -> None:
    model = trained.make(tmp_path, "train.precision=bf16")
    rounded = means(wanted(model))  # the stage's own weights are the rounded ones
    found = embedded(model, tmp_path / "b.npy")
    difference = np.nanmax(np.abs(found - rounded))
    assert 1e-4 < difference < 0.3


@pytest.mark.parametrize("layer", [None, 3])
def test_a_model_whose_norms_come_after(layer: int | None, tmp_path: Path) -> None:
    """As those that come from Hugging Face."""
    model = trained.make(tmp_path, "model.norm=post")
    more = ("--layer", str(layer)) if layer else ()
    found = embedded(model, tmp_path / "b.npy", *more)
    np.testing.assert_allclose(found, means(wanted(model, layer)), rtol=0, atol=1e-5)


def test_npy_says_what_it_is(model: Trained, result: Path, tmp_path: Path) -> None:
    import json

    path = tmp_path / "b.npy"
    found = embedded(model, path)
    np.testing.assert_array_equal(found, anndata.read_h5ad(result).obsm["X_geneformer"])
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["cells"] == NUM_CELLS
    assert facts["step"] == trained.STEP
    assert facts["precision"] == "fp32"


def test_the_input_is_left_alone_and_a_step_folder_will_do(model: Trained, tmp_path: Path) -> None:
    before = hashlib.sha256(model.h5ad.read_bytes()).hexdigest()
    changed = model.h5ad.stat().st_mtime_ns
    line = ["--checkpoint", str(model.step_folder), "--input", str(model.h5ad)]
    line += ["--output", str(tmp_path / "b.h5ad")]
    ((ended,),) = run_ranks(commands, 1, "embed", [line])
    assert ended.code == 0, ended.err
    assert hashlib.sha256(model.h5ad.read_bytes()).hexdigest() == before
    assert model.h5ad.stat().st_mtime_ns == changed
    assert "41 cells x 32 (float32), 2 without a known gene" in ended.out


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".npy"])
def test_genes(suffix: str, model: Trained, tmp_path: Path) -> None:
    path = tmp_path / f"genes{suffix}"
    ((ended,),) = run_ranks(
        commands, 1, "embed", [["--checkpoint", str(model.run), "--gene-embeddings", str(path)]]
    )
    assert ended.code == 0, ended.err
    expected = model.weights["embedding.word_embeddings.weight"][5 : toy.VOCABULARY]
    if suffix == ".npy":
        found = np.load(path)
    else:
        table = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",")
        assert table["feature_id"].tolist() == [gene_id(i) for i in range(NUM_GENES)]
        assert list(table.columns[:2]) == ["feature_id", "name"]
        found = table.iloc[:, 2:].to_numpy(np.float32)
    np.testing.assert_array_equal(found, expected)


def api(run: str, h5ad: str, copy: bool) -> tuple[list[str], np.ndarray | None, np.ndarray]:
    """(names in obsm of the AnnData given, its embedding, that of what is returned)."""
    import geneformer_mcore

    os.environ.pop("RANK")
    adata = anndata.read_h5ad(h5ad)
    returned = geneformer_mcore.embed(adata, run, copy=copy)
    again = adata if returned is None else returned
    assert (returned is None) == (not copy)
    assert again.obs["geneformer_embedded"].sum() == NUM_CELLS - 2
    assert again.uns["geneformer"]["layer"] == "last"
    view = again[::-1]
    geneformer_mcore.embed(view, run, key_added="X_again", layer=4)
    assert view.uns["geneformer"]["layer"] == "4"
    assert "X_again" not in again.obsm
    return sorted(adata.obsm), adata.obsm.get("X_geneformer"), again.obsm["X_geneformer"]


@pytest.mark.parametrize("copy", [False, True])
def test_from_python(copy: bool, model: Trained, result: Path) -> None:
    ((names, inside, found),) = run_ranks(api, 1, str(model.run), str(model.h5ad), copy)
    assert names == (["X_other"] if copy else ["X_geneformer", "X_other"])
    assert (inside is None) == copy
    expected = anndata.read_h5ad(result).obsm["X_geneformer"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_the_package_stays_light(repository: Path) -> None:
    code = "import sys, geneformer_mcore; geneformer_mcore.embed; print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert ended.stdout == "False\n"


def damaged(model: Trained, folder: Path) -> Path:
    run = folder / "damaged"
    shutil.copytree(model.run, run)
    file = next((run / "checkpoints" / model.step_folder.name).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    return run


def test_wrong_input_is_answered_in_one_message(model: Trained, tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "checkpoints"
    shutil.copytree(model.run / "checkpoints", alone)
    vocabulary_of(NUM_GENES + 1).save(tmp_path / "other.json")
    there = tmp_path / "there.h5ad"
    there.write_text("")
    strange = anndata.read_h5ad(model.h5ad)
    strange.var_names = [f"ENSMUSG{i:011d}" for i in range(strange.n_vars)]
    strange.write_h5ad(tmp_path / "strange.h5ad")
    normalised = anndata.read_h5ad(model.h5ad)
    normalised.X = normalised.X * 0.37
    normalised.write_h5ad(tmp_path / "normalised.h5ad")
    run, cells, out = str(model.run), str(model.h5ad), str(tmp_path / "b.h5ad")
    good = ["--checkpoint", run, "--input", cells, "--output", out]
    cases = {
        "no folder": ["--checkpoint", "nowhere", *good[2:]],
        "a folder without any": ["--checkpoint", str(tmp_path), *good[2:]],
        "1 damaged one(s)": ["--checkpoint", str(damaged(model, tmp_path)), *good[2:]],
        "was not found": ["--checkpoint", str(alone.parent), *good[2:]],
        "its token ids mean other genes": [*good, "--vocabulary", str(tmp_path / "other.json")],
        "another file than the input": [*good[:-1], cells],
        "exists already": [*good[:-1], str(there)],
        "must end in .h5ad or .npy": [*good[:-1], str(tmp_path / "b.csv")],
        "must end in .csv": [*good, "--gene-embeddings", str(tmp_path / "genes.h5ad")],
        "no such file": ["--checkpoint", run, "--input", "no.h5ad", "--output", out],
        "0 of 725 genes": [*good[:2], "--input", str(tmp_path / "strange.h5ad"), *good[4:]],
        "counts": [*good[:2], "--input", str(tmp_path / "normalised.h5ad"), *good[4:]],
        "--counts-layer": [*good, "--counts-layer", "nothing"],
        "0 (the embedding) to 4": [*good, "--layer", "5"],
        "and is first": [*good, "--layer", "first"],
        "tokens per batch (95) must be at least the 96": [*good, "--tokens-per-batch", "95"],
        "only the layout can be set here": [*good, "train.steps=3"],
        "parallel.tensor (3)": [*good, "parallel.tensor=3"],
        "the number of ranks (1)": [*good, "parallel.tensor=2"],
        "go together": good[:4],
        "nothing is asked for": good[:2],
        "invalid choice: 'max'": [*good, "--pooling", "max"],
    }
    (found,) = run_ranks(commands, 1, "embed", list(cases.values()))
    for (text, line), ended in zip(cases.items(), found, strict=True):
        assert ended.code == 2, (line, ended)
        assert text in ended.err, (text, ended.err)
        assert "Traceback" not in ended.err
        assert ended.err.count("error: ") == 1, ended.err
    assert not Path(out).exists()


def test_what_one_rank_meets_all_ranks_say(model: Trained, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(model.h5ad)
    cells.X.data[-1] = 0.5
    path = tmp_path / "half.h5ad"
    cells.write_h5ad(path)
    line = ["--checkpoint", str(model.run), "--input", str(path)]
    line += ["--output", str(tmp_path / "b.npy")]
    (first,), (second,) = run_ranks(commands, 2, "embed", [line])
    assert (first.code, second.code) == (2, 2)
    assert "0.5" in first.err
    assert second.err == ""


@pytest.mark.parametrize(("command", "more"), [("embed", ()), ("perturb", ("--top", "1"))])
def test_an_experiment_with_text_of_its_own_for_every_cell(
    command: str, more: tuple[str, ...], model: Trained, tmp_path: Path
) -> None:
    address = write_experiment(tmp_path / "census", {"one": anndata.read_h5ad(model.h5ad)})
    path = tmp_path / "b.h5ad"
    line = ["--checkpoint", str(model.run), "--input", address, "--output", str(path), *more]
    ((ended,),) = run_ranks(commands, 1, command, [line])
    assert ended.code == 0, ended.err
    found = anndata.read_h5ad(path).obs
    assert found["observation_joinid"].tolist() == [f"cell{i}" for i in range(NUM_CELLS)]


def test_a_store_in_its_own_order(model: Trained, tmp_path: Path, repository: Path) -> None:
    from geneformer_mcore.store.ingest import build_store

    store = tmp_path / "store"
    build_store([str(model.h5ad)], store, vocabulary=model.vocabulary, seq_length=toy.SEQ_LENGTH)
    path = tmp_path / "b.h5ad"
    line = ["--checkpoint", str(model.run), "--input", str(store), "--output", str(path)]
    ((ended,),) = run_ranks(commands, 1, "embed", [line])
    assert ended.code == 0, ended.err
    found = anndata.read_h5ad(path)
    assert found.n_obs == NUM_CELLS - 2
    assert set(found.obs["cell_type"]) == {"a", "b"}
    names = [f"cell{i}" for i in range(NUM_CELLS)]
    expected = pd.DataFrame(means(wanted(model)), index=names).loc[found.obs_names]
    np.testing.assert_allclose(found.obsm["X_geneformer"], expected, rtol=0, atol=1e-5)
