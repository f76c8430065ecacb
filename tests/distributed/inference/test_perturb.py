"""Perturbed cells: equal to the plain reference and to embedding them, on any number of ranks."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.types import CLS, NUM_SPECIALS
from tests.distributed import toy
from tests.distributed.commands import assert_refused, commands, succeed
from tests.distributed.inference.trained import EMPTY, LONG, NUM_CELLS, ONE_GENE, UNKNOWN, Trained
from tests.distributed.parity import PP2, TP2
from tests.distributed.ranks import run_ranks
from tests.support.small_cells import gene_id, write_h5ad

OTHER = 8
"""An ordinary cell, shorter than seq_length."""
FEW_CELLS = [0, 1, 2, ONE_GENE, UNKNOWN, OTHER, EMPTY, LONG, 40]
PLAIN, SMALL = "--null 0", "--top 6 --null 4 --goal cell_type=b"
PLANTED, PLANTED_GENES = 33, 60


class Asked:
    """Genes of the long cell, one that no cell has, and a group of genes of two cells."""

    def __init__(self, tokens: list[np.ndarray]) -> None:
        long, other = tokens[LONG].tolist(), tokens[OTHER].tolist()
        self.fifth, self.ninth = long[5], long[9]
        self.trio = [long[3], long[50], other[1]]
        genes = range(NUM_SPECIALS, toy.VOCABULARY)
        self.absent = next(gene for gene in genes if gene not in np.concatenate(tokens))


@pytest.fixture(scope="module")
def asked(model: Trained) -> Asked:
    return Asked(model.tokens)


def write_planted_cells(path: Path) -> None:
    """Cells that differ from those of the goal by one gene: no other leads all the way there."""
    counts = np.tile(np.random.default_rng(4).integers(1, 20, PLANTED_GENES), (8, 1))
    counts[:, PLANTED] = [0] * 4 + [900] * 4
    write_h5ad(path, counts.astype(np.float32), obs={"state": ["well"] * 4 + ["ill"] * 4})


@pytest.fixture(scope="module")
def folder(model: Trained, asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    few, groups = folder / "few.h5ad", folder / "groups.gmt"
    # Enough where each perturbed cell is compared by itself.
    anndata.read_h5ad(model.h5ad)[FEW_CELLS].write_h5ad(few)
    write_planted_cells(folder / "planted_cells.h5ad")
    genes = "\t".join([*map(name, asked.trio), "NOT1"])
    groups.write_text(f"trio\twhatever\t{genes}\nsingle\t\t{name(asked.trio[0])}\n")

    def line(title: str, *more: object, h5ad: Path = few) -> list[str]:
        return ["perturb", *model.line("--output", folder / f"{title}.h5ad", *more, h5ad=h5ad)]

    fifth, over = f"--genes {name(asked.fifth)} {PLAIN}", f"--mode overexpress {PLAIN}"
    tables = ("--gene-effects", folder / "genes.csv", "--table", folder / "b.csv")
    toward = "--goal state=well --start state=ill --all-genes --null 200"
    lines = [
        line("b", SMALL, *tables, h5ad=model.h5ad),
        line("planted", toward, h5ad=folder / "planted_cells.h5ad"),
        line("everything", "--all-genes", PLAIN),
        line("truncated", fifth, "--truncated"),
        line("over", "--genes", name(asked.ninth), name(asked.absent), over),
        line("cls", fifth, "--pooling cls --layer 3"),
        line("delete", "--groups", groups, PLAIN),
        line("overexpress", "--groups", groups, over),
    ]
    succeed(lines)
    return folder


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """1 - cosine, as it is written down."""
    return float(1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def embedding(model: Trained, tokens: np.ndarray) -> np.ndarray:
    """float64 [H]: the mean over the genes, by the plain reference."""
    return model.states(tokens)[1:].mean(axis=0)


def gene_shifts(model: Trained, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    old, new, places = model.states(before), model.states(after), before.tolist()
    return {
        name(token): apart(old[places.index(token)], new[place])
        for place, token in enumerate(after.tolist())
        if place and token in before[1:]
    }


def without(model: Trained, cell: int, *tokens: int) -> np.ndarray:
    """The sentence of a cell whose counts of these genes are taken away."""
    counts = model.counts[cell].copy()
    counts[[token - NUM_SPECIALS for token in tokens]] = 0
    return model.sentence(counts)


def name(token: int) -> str:
    return gene_id(token - NUM_SPECIALS)


def assert_shifts(
    found: anndata.AnnData, cell: int, gene: str, model: Trained, after: np.ndarray
) -> float:
    """Compares the shift of a cell, and the mean shift of its genes; returns the former."""
    row, before = found[f"cell{cell}", gene], model.tokens[cell]
    shift = apart(embedding(model, before), embedding(model, after))
    genes = np.mean([*gene_shifts(model, before, after).values()] or [np.nan])
    for value, right in ((row.X, shift), (row.layers["gene_shift"], genes)):
        np.testing.assert_allclose(value[0, 0], right, rtol=1e-3, atol=2e-7)
    return shift


def test_deleting_is_being_without_the_count(model: Trained, folder: Path) -> None:
    everything, sentences = anndata.read_h5ad(folder / "everything.h5ad"), model.tokens
    assert len(sentences[LONG]) == toy.SEQ_LENGTH > len(sentences[OTHER]) + 1
    for cell in (LONG, OTHER):
        for place in (1, 7, len(sentences[cell]) - 1):
            token = int(sentences[cell][place])
            after = without(model, cell, token)
            moved_in = set(after.tolist()) - set(sentences[cell].tolist())
            assert len(moved_in) == (cell == LONG), "the next gene moves in"
            assert_shifts(everything, cell, name(token), model, after)


def test_only_genes_of_a_cell_can_be_deleted(model: Trained, folder: Path) -> None:
    everything = anndata.read_h5ad(folder / "everything.h5ad")
    tokens = np.arange(NUM_SPECIALS, toy.VOCABULARY)
    has_NV = np.stack([np.isin(tokens, model.tokens[cell][1:]) for cell in FEW_CELLS])
    assert set(everything.var_names) == {name(token) for token in tokens[has_NV.any(axis=0)]}
    columns = [int(gene[4:]) for gene in everything.var_names]
    has_NP = has_NV[:, columns]
    has_NP[FEW_CELLS.index(ONE_GENE)] = False  # Without its only gene there is nothing to embed.
    np.testing.assert_array_equal(~np.isnan(everything.X), has_NP)
    assert not has_NP[[FEW_CELLS.index(cell) for cell in (UNKNOWN, EMPTY)]].any()
    var = everything.var
    np.testing.assert_array_equal(var["n_cells"], has_NP.sum(axis=0))
    detected = (model.counts[FEW_CELLS][:, columns] > 0).sum(axis=0)
    np.testing.assert_array_equal(var["n_detected"], detected)
    means = np.nanmean(everything.X.astype(np.float64)[:, has_NP.any(axis=0)], axis=0)
    np.testing.assert_allclose(var["shift"].dropna(), means, rtol=1e-6)


def test_other_ways_to_perturb_and_embed(model: Trained, folder: Path, asked: Asked) -> None:
    """Truncated, as Hugging Face deletes; [CLS] of another layer."""
    sentence, token = model.tokens[LONG], asked.fifth
    found = anndata.read_h5ad(folder / "truncated.h5ad")
    deleted = np.delete(sentence, 5)  # delete_indices: nothing moves in
    shift = assert_shifts(found, LONG, name(token), model, deleted)
    whole = apart(embedding(model, sentence), embedding(model, without(model, LONG, token)))
    assert abs(shift / whole - 1) > 0.01, "the two ways must differ to tell them apart"
    assert found.uns["geneformer"]["perturb"]["truncated"]
    found = anndata.read_h5ad(folder / "cls.h5ad")
    both = sentence, without(model, LONG, token)
    expected = apart(*(model.states(tokens, 3)[0] for tokens in both))
    shift = found[f"cell{LONG}", name(token)].X[0, 0]
    np.testing.assert_allclose(shift, expected, rtol=1e-3, atol=2e-7)
    assert found.uns["geneformer"]["layer"] == "3"


def overexpressed(sentence: np.ndarray, *tokens: int) -> np.ndarray:
    """What Geneformer's overexpress_tokens makes of it."""
    rest = [token for token in sentence[1:].tolist() if token not in tokens]
    return np.array([CLS, *tokens, *rest][: toy.SEQ_LENGTH])


def test_overexpression(model: Trained, folder: Path, asked: Asked) -> None:
    sentences = model.tokens
    assert asked.ninth not in sentences[OTHER]
    found = anndata.read_h5ad(folder / "over.h5ad")
    for cell in (LONG, OTHER):
        for gene in (asked.ninth, asked.absent):
            assert_shifts(found, cell, name(gene), model, overexpressed(sentences[cell], gene))
    last = overexpressed(sentences[LONG], asked.absent)[-1]
    assert last == sentences[LONG][-2], "the last fell off"
    assert found.var["n_cells"].tolist() == [len(FEW_CELLS) - 2] * 2


def test_groups(model: Trained, folder: Path, asked: Asked) -> None:
    sentences, trio = model.tokens, asked.trio
    deleted, over = (anndata.read_h5ad(folder / f"{m}.h5ad") for m in ("delete", "overexpress"))
    for found in (deleted, over):
        assert found.var_names.tolist() == ["trio", "single"]
        assert found.var["n_genes"].tolist() == [3, 1]
    for cell in (LONG, OTHER):
        assert_shifts(deleted, cell, "trio", model, without(model, cell, *trio))
        assert_shifts(over, cell, "trio", model, overexpressed(sentences[cell], *trio))
    genes = [set(sentences[cell][1:].tolist()) for cell in FEW_CELLS]
    has = [bool(each & set(trio) and each - set(trio)) for each in genes]
    assert (~np.isnan(deleted[:, "trio"].X[:, 0])).tolist() == has


def test_any_ranks_give_the_same(model: Trained, folder: Path, tmp_path: Path) -> None:
    lines = []
    for more in (f"--tokens-per-batch {toy.SEQ_LENGTH}", TP2, PP2):
        there = tmp_path / str(len(lines))
        there.mkdir()
        tables = ("--gene-effects", there / "genes.csv", "--table", there / "b.csv")
        words = model.line("--output", there / "b.h5ad", SMALL, *tables, more)
        lines.append(["perturb", *words])
    succeed(lines, ranks=2)
    for there in tmp_path.iterdir():
        found, expected = (anndata.read_h5ad(each / "b.h5ad") for each in (there, folder))
        for layer in (None, "gene_shift", "goal_shift"):
            one, other = found.to_df(layer), expected.to_df(layer)
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
        for table, index in (("b.csv", [0]), ("genes.csv", [0, 1])):
            both = (pd.read_csv(each / table, index_col=index) for each in (there, folder))
            one, other = (each.sort_index() for each in both)
            pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-6)


def test_moved_genes_are_those_of_the_reference(model: Trained, folder: Path) -> None:
    found = pd.read_csv(folder / "genes.csv")
    perturbation = found["perturbation"][0]
    token = int(perturbation[4:]) + NUM_SPECIALS
    moved = pd.DataFrame(
        gene_shifts(model, before, without(model, cell, token))
        for cell, before in enumerate(model.tokens)
        if cell % 2 == 0 and token in before[1:] and len(before) > 2
    )
    expected = moved.mean()
    mine = found[found["perturbation"] == perturbation].set_index("feature_id")
    np.testing.assert_allclose(mine["shift"], expected[mine.index], rtol=1e-3, atol=1e-6)
    assert mine["n_cells"].tolist() == moved.count()[mine.index].tolist()
    assert mine["shift"].is_monotonic_decreasing
    assert mine["shift"].iloc[0] == pytest.approx(expected.max(), rel=1e-3)


def test_toward_the_goal(model: Trained, folder: Path) -> None:
    found, sentences = anndata.read_h5ad(folder / "b.h5ad"), model.tokens
    not_the_goals = [*range(0, 40, 2), 40]
    assert found.obs_names.tolist() == [f"cell{n}" for n in not_the_goals]
    goals = [embedding(model, tokens) for tokens in sentences[1:40:2] if len(tokens) > 1]
    goal = np.mean(goals, axis=0)
    signs = set()
    for gene in found.var_names[:4]:
        token = int(gene[4:]) + NUM_SPECIALS
        for cell in (n for n in range(0, 40, 2) if token in sentences[n][1:]):
            before, after = sentences[cell], without(model, cell, token)
            expected = apart(embedding(model, before), goal) - apart(embedding(model, after), goal)
            value = found[f"cell{cell}", gene].layers["goal_shift"][0, 0]
            np.testing.assert_allclose(value, expected, rtol=1e-3, atol=2e-7)
            signs.add(np.sign(value))
    assert signs == {-1, 1}


def test_a_planted_gene_is_found(folder: Path) -> None:
    found = anndata.read_h5ad(folder / "planted.h5ad")
    assert found.obs_names.tolist() == ["c4", "c5", "c6", "c7"]
    row, others = found.var.loc[gene_id(PLANTED)], found.var.drop(index=gene_id(PLANTED))
    assert row["goal_shift"] == pytest.approx(row["shift"], rel=1e-4), "it becomes the goal"
    assert row["goal_shift"] > others["goal_shift"].max() > 0 > others["goal_shift"].min()
    # All other genes are in as many cells, and its controls.
    assert row["n_controls"] == PLANTED_GENES - 1
    assert row["goal_p"] == pytest.approx(2 / PLANTED_GENES)
    assert others["goal_p"].mean() == pytest.approx(0.5, abs=0.1)


def test_the_plot_and_what_is_printed(model: Trained, tmp_path: Path) -> None:
    before = model.h5ad.read_bytes()
    plots = {tmp_path / "four.png": (4, 2), tmp_path / "nine.png": (9, 3)}
    lines = [["perturb", *model.line("--plot", path, "--top", top, "--null", null)]
             for path, (top, null) in plots.items()]  # fmt: skip
    for (path, (top, _)), each in zip(plots.items(), succeed(lines), strict=True):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"41 cells x {top} perturbations" in each.out
    assert len({path.stat().st_size for path in plots}) == 2
    assert model.h5ad.read_bytes() == before


def by_python(run: str, h5ad: str, genes: list[str]) -> tuple[anndata.AnnData, list[str]]:
    import geneformer_mcore

    os.environ.pop("RANK")
    torch.distributed.destroy_process_group()
    adata, told = anndata.read_h5ad(h5ad), []
    tempfile.tempdir = "/proc/nowhere"  # Nothing is written.
    for wrong in ({"start": "cell_typ=a"}, {"start": "cell_type=a", "goal": "cell_type=z"}):
        with pytest.raises(DataError) as error:
            geneformer_mcore.perturb(adata, run, top=1, **wrong)
        told.append(str(error.value))
    adata.obs["kind"] = pd.Categorical(["x"] * 21 + ["y"] * 20)
    groups = {"two": genes}
    found = geneformer_mcore.perturb(adata, run, genes, goal="kind=y", null=3, groups=groups)
    assert list(adata.obs.columns) == ["cell_type", "kind"]
    return found, told


def test_from_python(model: Trained) -> None:
    tokens = model.tokens[LONG][1:3].tolist()
    genes = [*map(name, tokens)]
    ((found, told),) = run_ranks(by_python, 1, str(model.run), str(model.h5ad), genes)
    assert found.obs_names.tolist() == [f"cell{n}" for n in range(21)]
    assert found.obs["cell_type"].tolist()[:3] == ["a", "b", "a"]
    assert found.var_names.tolist() == [*genes, "two"]
    assert set(found.layers) == {"gene_shift", "goal_shift"}
    assert_shifts(found, LONG, "two", model, without(model, LONG, *tokens))
    assert found.uns["geneformer"]["perturb"]["goal"] == "kind=y"
    assert told[0].startswith("the AnnData: obs has no column cell_typ ")
    assert "It has cell_type. Remedy" in told[0]
    assert "the AnnData: no cell of obs column cell_type is z. Values and cells: a (21)" in told[1]


def test_cells_of_start_and_goal_count_for_the_goal(model: Trained, tmp_path: Path) -> None:
    both = anndata.read_h5ad(model.h5ad)
    both.obs["kind"] = ["x" if number < 3 else "y" for number in range(NUM_CELLS)]
    both.write_h5ad(tmp_path / "both.h5ad")
    more = (f"{PLAIN} --top 1 --goal kind=x --output", tmp_path / "b.h5ad")
    words = model.line(*more, h5ad=tmp_path / "both.h5ad")
    lines = [[*words, "--start", "cell_type=a"], [*words, "--start", "kind=x", "--overwrite"]]
    ((ended, refused),) = run_ranks(commands, 1, "perturb", lines)
    assert ended.code == 0, ended.err
    assert "2 of 21 cells of cell_type=a are kind=x too: they count for the goal only" in ended.out
    found = anndata.read_h5ad(tmp_path / "b.h5ad").obs_names.tolist()
    assert found == [f"cell{n}" for n in range(4, NUM_CELLS, 2)]
    assert refused.code == 2
    assert "all 3 cells of kind=x are kind=x, so none is left to move toward it" in refused.err


def test_wrong_input(model: Trained, asked: Asked, tmp_path: Path) -> None:
    lost, store, out = tmp_path / "lost.h5ad", tmp_path / "store", tmp_path / "b.csv"
    cells = anndata.read_h5ad(model.h5ad)
    cells.obs["kind"] = ["x" if number in (UNKNOWN, EMPTY) else "y" for number in range(NUM_CELLS)]
    cells.write_h5ad(lost)
    build_store([str(model.h5ad)], store, vocabulary=model.vocabulary, seq_length=toy.SEQ_LENGTH)
    cases = {
        "nothing is to be perturbed": model.line("--table", out),
        "nothing is to be written": model.line("--top 2"),
        "cannot be read": model.line("--table", out, "--groups nowhere.gmt"),
    }
    for text, file, content in (
        ("there is no group", "empty.json", "{}"),
        ('JSON {"group": ["gene"', "list.json", '["a"]'),
        ("line 1: there is no tab", "strange.gmt", "NOT1 NOT2\n"),
        ("group g: 1 of 1 genes", "unknown.json", '{"g": ["NOT1"]}'),
    ):
        (tmp_path / file).write_text(content)
        cases[text] = model.line("--table", out, "--groups", tmp_path / file)
    of_one_gene = {
        "is a token store": f"--input {store}",
        "2 of 3 genes are not among the 695": "ENSG00000000O8 WHAT",
        "(near: ENSG": "ENSG000000000081",
        "none has ENSG": f"--genes {name(asked.absent)}",
        "no cell of the goal has": f"--input {lost} --goal kind=x",
        "none of the 2 cells has a gene": f"--input {lost} --start kind=x",
        "no column kind": "--goal kind=b",
        "no cell of obs column cell_type is c. Values and cells: a (21)": "--start cell_type=c",
        "cells are named by COLUMN=VALUE": "--start cell_type",
        "--truncated goes with --mode delete": "--truncated --mode overexpress",
        "--max-cells must be at least 0": "--max-cells -1",
        "--null must be at least 0": "--null -1",
        "--top must be at least 1": "--top 0",
        "moved genes, and --most-moved is 0": f"--gene-effects {tmp_path}/g.csv --most-moved 0",
        "must be different files": f"--gene-effects {out}",
        "must end in .h5ad": f"--output {tmp_path}/b.npy",
        "must end in .csv or .tsv": f"--table {tmp_path}/b.txt",
        "0 (the embedding) to 4": "--layer 5",
        "no such file": "--input no.h5ad",
        "no folder": "--checkpoint nowhere",
        "the number of ranks (1)": "parallel.tensor=2",
        "not allowed with argument": "--top 3 --all-genes",
    }
    for text, more in of_one_gene.items():
        cases[text] = model.line("--table", out, "--genes", gene_id(7), more)
    assert_refused("perturb", cases)
    assert not out.exists()
