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
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from geneformer_mcore.store.ingest.build import build_store
from tests.distributed import toy, trained
from tests.distributed.commands import Ended, calls, commands
from tests.distributed.parity import PP2, SEQUENCE, TP2
from tests.distributed.ranks import run_ranks
from tests.distributed.trained import EMPTY, NUM_CELLS, NUM_GENES, ONE_GENE, UNKNOWN, Trained
from tests.small_cells import gene_id, vocabulary_of
from tests.small_experiment import write_experiment

MISSING = [UNKNOWN, EMPTY]
FEW = ("--tokens-per-batch", str(toy.SEQ_LENGTH))
ALONE: dict[str, tuple[str, ...]] = {
    "b.h5ad": (),
    "b.npy": (),
    "small.npy": FEW,
    "layer_0.npy": ("--layer", "0"),
    "layer_3.npy": ("--layer", "second-to-last"),
    "cls.npy": ("--pooling", "cls"),
    "cls_3.npy": ("--pooling", "cls", "--layer", "3"),
    "half.h5ad": ("--dtype", "float16"),
    "brain.npy": ("--dtype", "bfloat16"),
    "bf16.npy": ("--precision", "bf16"),
}
"""What one rank writes from the cells -> what it is asked."""
OF_OTHERS = {
    "other_bf16.npy": ("bf16", ()),
    "other_post.npy": ("post", ()),
    "other_post_3.npy": ("post", ("--layer", "3")),
}
"""The same by other models."""
OF_TWO: dict[str, tuple[str, ...]] = {
    "tensor.npy": (TP2,),
    "sequence.npy": SEQUENCE,
    "pipeline.npy": (PP2,),
    "layer_1.npy": ("--layer", "1", PP2),
    "layer_3.npy": ("--layer", "3", PP2),
    "layer_4.npy": ("--layer", "4", TP2),
}
OF_FOUR: dict[str, tuple[str, ...]] = {"data.npy": (), "small.npy": FEW, "both.npy": (TP2, PP2)}
GENE_TABLES = (".csv", ".tsv", ".npy")


def line(model: Trained, output: Path, *more: str) -> list[str]:
    """A command line."""
    start = ["--checkpoint", str(model.run), "--input", str(model.h5ad)]
    return [*start, "--output", str(output), *more]


def values(path: Path) -> np.ndarray:
    """What the command has written."""
    if path.suffix == ".npy":
        return np.load(path)
    return anndata.read_h5ad(path).obsm["X_geneformer"]


def succeed(lines: list[list[str]], ranks: int) -> list[Ended]:
    """Runs them all on the same ranks; how they ended on the first."""
    first, *others = run_ranks(calls, ranks, lines)
    for ended in (first, *others):
        for text, each in zip(lines, ended, strict=True):
            assert each.code == 0, (text, each.err)
    return first


@cache
def wanted(model: Trained, num_layers: int | None = None) -> list[np.ndarray]:
    """float64 [tokens, H] of each cell by itself, by the plain reference."""
    reference = model.reference
    found = []
    with torch.no_grad():
        for tokens in model.tokens:
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
def folder(models: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that one rank writes."""
    model, folder = models["plain"], tmp_path_factory.mktemp("alone")
    experiment = write_experiment(folder / "census", {"one": anndata.read_h5ad(model.h5ad)})
    store = folder / "store"
    build_store([str(model.h5ad)], store, vocabulary=model.vocabulary, seq_length=toy.SEQ_LENGTH)
    start = ["--checkpoint", str(model.run)]
    lines = [["embed", *line(model, folder / name, *more)] for name, more in ALONE.items()]
    for name, (kind, more) in OF_OTHERS.items():
        lines.append(["embed", *line(models[kind], folder / name, *more)])
    for suffix in GENE_TABLES:
        lines.append(["embed", *start, "--gene-embeddings", str(folder / f"genes{suffix}")])
    for command, source in (("embed", experiment), ("perturb", experiment), ("embed", str(store))):
        name = f"{command}_{Path(source).name}.h5ad"
        more = ["--top", "1", "--null", "0"] if command == "perturb" else []
        lines.append([command, *start, "--input", source, "--output", str(folder / name), *more])
    succeed(lines, 1)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> Path:
    """The AnnData that one rank writes."""
    return folder / "b.h5ad"


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scanpy as sc

        adata = anndata.read_h5ad(result)
        adata = adata[adata.obs["geneformer_embedded"]].copy()
        sc.pp.neighbors(adata, use_rep="X_geneformer", n_neighbors=5)
    assert adata.obsp["connectivities"].shape == (NUM_CELLS - 2, NUM_CELLS - 2)
    assert adata.obsp["connectivities"].nnz > 0


def test_batches_and_layouts_change_nothing(model: Trained, folder: Path, tmp_path: Path) -> None:
    alone = values(folder / "b.h5ad")
    np.testing.assert_allclose(values(folder / "small.npy"), alone, rtol=0, atol=1e-6)
    for ranks, lines in ((2, OF_TWO), (4, OF_FOUR)):
        there = tmp_path / str(ranks)
        there.mkdir()
        asked = [["embed", *line(model, there / name, *more)] for name, more in lines.items()]
        succeed(asked, ranks)
        for name in lines:
            if name.startswith("layer"):
                expected = means(wanted(model, int(name[6])))
                np.testing.assert_allclose(
                    values(there / name), expected, rtol=1e-5, atol=1e-5, err_msg=name
                )
            else:
                np.testing.assert_allclose(
                    values(there / name), alone, rtol=0, atol=1e-6, err_msg=f"{ranks} {name}"
                )


@pytest.mark.parametrize("number", [0, 3])
def test_layers(number: int, model: Trained, folder: Path) -> None:
    found, expected = values(folder / f"layer_{number}.npy"), means(wanted(model, number))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "layer"), [("cls.npy", None), ("cls_3.npy", 3)])
def test_cls(name: str, layer: int | None, model: Trained, folder: Path) -> None:
    expected = np.stack([each[0] for each in wanted(model, layer)])
    expected[MISSING] = np.nan
    np.testing.assert_allclose(values(folder / name), expected, rtol=1e-5, atol=1e-5)


def test_number_formats(folder: Path) -> None:
    exact, half, brain = (values(folder / name) for name in ("b.h5ad", "half.h5ad", "brain.npy"))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, exact, rtol=1e-3, atol=1e-3)
    assert brain.dtype == np.float32
    known = ~np.isnan(exact).any(axis=1)
    assert not (brain[known].view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(brain, exact, rtol=2**-8, atol=0)
    computed = values(folder / "bf16.npy")
    assert 1e-5 < np.nanmax(np.abs(computed - exact)) < 0.3


def test_a_model_trained_in_bf16_is_used_with_its_exact_weights(
    models: dict[str, Trained], folder: Path
) -> None:
    rounded = means(wanted(models["bf16"]))  # the stage's own weights are the rounded ones
    difference = np.nanmax(np.abs(values(folder / "other_bf16.npy") - rounded))
    assert 1e-4 < difference < 0.3


@pytest.mark.parametrize(("name", "layer"), [("other_post.npy", None), ("other_post_3.npy", 3)])
def test_a_model_whose_norms_come_after(
    name: str, layer: int | None, models: dict[str, Trained], folder: Path
) -> None:
    """As those that come from Hugging Face."""
    expected = means(wanted(models["post"], layer))
    np.testing.assert_allclose(values(folder / name), expected, rtol=0, atol=1e-5)


def test_npy_says_what_it_is(result: Path, folder: Path) -> None:
    np.testing.assert_array_equal(values(folder / "b.npy"), values(result))
    facts = json.loads((folder / "b.json").read_text())
    assert facts["cells"] == NUM_CELLS
    assert facts["step"] == trained.STEP
    assert facts["precision"] == "fp32"


def test_the_input_is_left_alone_and_a_step_folder_will_do(model: Trained, tmp_path: Path) -> None:
    before = hashlib.sha256(model.h5ad.read_bytes()).hexdigest()
    changed = model.h5ad.stat().st_mtime_ns
    asked = ["--checkpoint", str(model.step_folder), "--input", str(model.h5ad)]
    (ended,) = succeed([["embed", *asked, "--output", str(tmp_path / "b.h5ad")]], 1)
    assert hashlib.sha256(model.h5ad.read_bytes()).hexdigest() == before
    assert model.h5ad.stat().st_mtime_ns == changed
    assert "41 cells x 32 (float32), 2 without a known gene" in ended.out


@pytest.mark.parametrize("suffix", GENE_TABLES)
def test_genes(suffix: str, model: Trained, folder: Path) -> None:
    path = folder / f"genes{suffix}"
    expected = model.weights["embedding.word_embeddings.weight"][5 : toy.VOCABULARY]
    if suffix == ".npy":
        found = np.load(path)
    else:
        table = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",")
        assert table["feature_id"].tolist() == [gene_id(i) for i in range(NUM_GENES)]
        assert list(table.columns[:2]) == ["feature_id", "name"]
        found = table.iloc[:, 2:].to_numpy(np.float32)
    np.testing.assert_array_equal(found, expected)


def api(run: str, h5ad: str) -> list[tuple[list[str], np.ndarray | None, np.ndarray]]:
    """Without a copy, and with one."""
    os.environ.pop("RANK")
    torch.distributed.destroy_process_group()
    return [by_python(run, h5ad, copy) for copy in (False, True)]


def by_python(run: str, h5ad: str, copy: bool) -> tuple[list[str], np.ndarray | None, np.ndarray]:
    """(names in obsm of the AnnData given, its embedding, that of what is returned)."""
    import geneformer_mcore

    adata = anndata.read_h5ad(h5ad)
    tempfile.tempdir = "/proc/nowhere"  # Nothing is written.
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


def test_from_python(model: Trained, result: Path) -> None:
    (found,) = run_ranks(api, 1, str(model.run), str(model.h5ad))
    expected = values(result)
    for copy, (names, inside, embedding) in zip((False, True), found, strict=True):
        assert names == (["X_other"] if copy else ["X_geneformer", "X_other"])
        assert (inside is None) == copy
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-6)


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
    for (text, words), ended in zip(cases.items(), found, strict=True):
        assert ended.code == 2, (words, ended)
        assert text in ended.err, (text, ended.err)
        assert "Traceback" not in ended.err
        assert ended.err.count("error: ") == 1, ended.err
    assert not Path(out).exists()


def test_what_one_rank_meets_all_ranks_say(model: Trained, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(model.h5ad)
    cells.X.data[-1] = 0.5
    path = tmp_path / "half.h5ad"
    cells.write_h5ad(path)
    asked = ["--checkpoint", str(model.run), "--input", str(path)]
    asked += ["--output", str(tmp_path / "b.npy")]
    (first,), (second,) = run_ranks(commands, 2, "embed", [asked])
    assert (first.code, second.code) == (2, 2)
    assert "0.5" in first.err
    assert second.err == ""


@pytest.mark.parametrize("command", ["embed", "perturb"])
def test_an_experiment_with_text_of_its_own_for_every_cell(command: str, folder: Path) -> None:
    found = anndata.read_h5ad(folder / f"{command}_homo_sapiens.h5ad").obs
    assert found["observation_joinid"].tolist() == [f"cell{i}" for i in range(NUM_CELLS)]


def test_a_store_in_its_own_order(model: Trained, folder: Path) -> None:
    found = anndata.read_h5ad(folder / "embed_store.h5ad")
    assert found.n_obs == NUM_CELLS - 2
    assert set(found.obs["cell_type"]) == {"a", "b"}
    names = [f"cell{i}" for i in range(NUM_CELLS)]
    expected = pd.DataFrame(means(wanted(model)), index=names).loc[found.obs_names]
    np.testing.assert_allclose(found.obsm["X_geneformer"], expected, rtol=0, atol=1e-5)
