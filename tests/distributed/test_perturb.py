"""Perturbed cells: equal to the plain reference and to embedding them, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from geneformer_mcore.errors import DataError
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.types import CLS, NUM_SPECIALS
from tests.distributed import toy, trained
from tests.distributed.commands import calls, commands
from tests.distributed.parity import PP2, TP2
from tests.distributed.ranks import run_ranks
from tests.distributed.trained import EMPTY, LONG, NUM_CELLS, ONE_GENE, UNKNOWN, Trained
from tests.small_cells import gene_id, plain_tokens

OTHER = 8
"""An ordinary cell, shorter than seq_length."""


PLAIN = ("--null", "0")
FEW_CELLS = [0, 1, 2, ONE_GENE, UNKNOWN, OTHER, EMPTY, LONG, 40]
SMALL = ("--top", "6", "--null", "4", "--goal", "cell_type=b")
FEW_TOKENS = ("--tokens-per-batch", str(toy.SEQ_LENGTH))


@dataclass(frozen=True)
class Asked:
    """Genes of the long cell, one that no cell has, and a group of genes of two cells."""

    fifth: int
    ninth: int
    absent: int
    trio: list[int]


@pytest.fixture(scope="module")
def asked(model: Trained) -> Asked:
    sentences = model.tokens
    absent = next(t for t in range(NUM_SPECIALS, 700) if t not in np.concatenate(sentences))
    trio = [int(sentences[LONG][3]), int(sentences[LONG][50]), int(sentences[OTHER][1])]
    return Asked(int(sentences[LONG][5]), int(sentences[LONG][9]), absent, trio)


def line(model: Trained, output: Path, *more: str, h5ad: Path | None = None) -> list[str]:
    """A command line."""
    start = ["--checkpoint", str(model.run), "--input", str(h5ad or model.h5ad)]
    return [*start, "--output", str(output), *more]


def few_cells(model: Trained) -> anndata.AnnData:
    """Enough where each perturbed cell is compared by itself."""
    return anndata.read_h5ad(model.h5ad)[FEW_CELLS].copy()


def changed_cells(model: Trained) -> tuple[list[tuple[int, int]], anndata.AnnData]:
    """(cells and a gene of each, the same cells without its count)."""
    pairs = [(cell, int(model.tokens[cell][2])) for cell in (LONG, OTHER, 0, 40)]
    changed = anndata.read_h5ad(model.h5ad)[[cell for cell, _ in pairs]].copy()
    counts = changed.X.toarray()
    counts[np.arange(len(pairs)), [token - NUM_SPECIALS for _, token in pairs]] = 0
    changed.X = sparse.csr_matrix(counts)
    return pairs, changed


@pytest.fixture(scope="module")
def folder(model: Trained, asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that one rank writes."""
    folder = tmp_path_factory.mktemp("alone")
    few_cells(model).write_h5ad(folder / "few.h5ad")
    planted_cells().write_h5ad(folder / "planted_cells.h5ad")
    changed_cells(model)[1].write_h5ad(folder / "changed.h5ad")
    genes = "\t".join([*map(name, asked.trio), "NOT1"])
    groups = folder / "groups.gmt"
    groups.write_text(f"trio\twhatever\t{genes}\nsingle\t\t{name(asked.trio[0])}\n")
    fifth = ("--genes", name(asked.fifth), *PLAIN)
    files = ("--gene-effects", str(folder / "genes.csv"), "--table", str(folder / "b.csv"))
    overexpress = ("--mode", "overexpress", *PLAIN)
    toward = ("--goal", "state=well", "--start", "state=ill", "--all-genes", "--null", "200")
    of_cells = {
        "b": (model.h5ad, (*SMALL, *files)),
        "planted": (folder / "planted_cells.h5ad", toward),
    }
    of_few = {
        "everything": ("--all-genes", *PLAIN),
        "truncated": (*fifth, "--truncated"),
        "over": ("--genes", name(asked.ninth), name(asked.absent), *overexpress),
        "cls": (*fifth, "--pooling", "cls", "--layer", "3"),
        "delete": ("--groups", str(groups), *PLAIN),
        "overexpress": ("--groups", str(groups), *overexpress),
    }
    of_cells |= {title: (folder / "few.h5ad", more) for title, more in of_few.items()}
    lines = [["perturb", *line(model, folder / f"{title}.h5ad", *more, h5ad=h5ad)]
             for title, (h5ad, more) in of_cells.items()]  # fmt: skip
    for title in ("few", "changed"):
        out = folder / f"{title}.npy"
        lines.append(["embed", *line(model, out, h5ad=folder / f"{title}.h5ad")])
    (ended,) = run_ranks(calls, 1, lines, timeout_s=240)
    for words, each in zip(lines, ended, strict=True):
        assert each.code == 0, (words, each.err)
    return folder


@cache
def _states(model: Trained, tokens: bytes) -> np.ndarray:
    with torch.no_grad():
        ids = torch.frombuffer(bytearray(tokens), dtype=torch.int64)[None]
        return model.reference.hidden(ids, torch.tensor([ids.shape[1]]))[0].numpy()


def states(model: Trained, tokens: np.ndarray) -> np.ndarray:
    """float64 [tokens, H] by the plain reference."""
    return _states(model, tokens.astype(np.int64).tobytes())


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """1 - cosine, as it is written down."""
    return float(1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def wanted(model: Trained, before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """(shift of the cell, mean shift of the genes that both sentences have)."""
    old, new = states(model, before), states(model, after)
    both = [(before.tolist().index(t), n) for n, t in enumerate(after) if n and t in before[1:]]
    genes = np.mean([apart(old[a], new[b]) for a, b in both]) if both else np.nan
    return apart(old[1:].mean(axis=0), new[1:].mean(axis=0)), float(genes)


def without(model: Trained, cell: int, *tokens: int) -> np.ndarray:
    """The sentence of a cell whose counts of these genes are taken away."""
    counts = model.counts[cell].copy()
    counts[[token - NUM_SPECIALS for token in tokens]] = 0
    known = np.arange(trained.NUM_GENES) + NUM_SPECIALS
    columns = np.concatenate([known, np.zeros(trained.NUM_UNKNOWN, np.int64)])
    return plain_tokens(counts, columns, model.vocabulary, toy.SEQ_LENGTH)


def name(token: int) -> str:
    return gene_id(token - NUM_SPECIALS)


def close(found: anndata.AnnData, cell: int, gene: str, expected: tuple[float, float]) -> None:
    row = found[f"cell{cell}", gene]
    for value, right in zip((row.X[0, 0], row.layers["gene_shift"][0, 0]), expected, strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-3, atol=2e-7)


@pytest.fixture(scope="module")
def everything(folder: Path) -> anndata.AnnData:
    """Every gene deleted from every one of a few cells."""
    return anndata.read_h5ad(folder / "everything.h5ad")


def test_deleting_is_being_without_the_count(model: Trained, everything: anndata.AnnData) -> None:
    sentences = model.tokens
    assert len(sentences[LONG]) == toy.SEQ_LENGTH > len(sentences[OTHER]) + 1
    for cell in (LONG, OTHER):
        for place in (1, 7, len(sentences[cell]) - 1):
            token = int(sentences[cell][place])
            after = without(model, cell, token)
            moved_in = set(after.tolist()) - set(sentences[cell].tolist())
            assert len(moved_in) == (cell == LONG), "the next gene moves in"
            close(everything, cell, name(token), wanted(model, sentences[cell], after))


def test_deleting_is_embedding_the_cell_without_the_count(
    model: Trained, everything: anndata.AnnData, folder: Path
) -> None:
    """By the command that embeds all other cells."""
    before, after = (
        np.load(folder / f"{title}.npy").astype(np.float64) for title in ("few", "changed")
    )
    for number, (cell, token) in enumerate(changed_cells(model)[0]):
        expected = apart(before[FEW_CELLS.index(cell)], after[number])
        found = everything[f"cell{cell}", name(token)].X[0, 0]
        assert expected > 1e-4
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_only_genes_of_a_cell_can_be_deleted(model: Trained, everything: anndata.AnnData) -> None:
    sentences = [model.tokens[cell] for cell in FEW_CELLS]
    has = np.array([[token in cell[1:] for token in range(NUM_SPECIALS, toy.VOCABULARY)]
                    for cell in sentences])  # fmt: skip
    names = [gene_id(number) for number in np.flatnonzero(has.any(axis=0))]
    assert set(everything.var_names) == set(names)
    has_NP = pd.DataFrame(has, columns=[gene_id(n) for n in range(has.shape[1])])
    has_NP = has_NP[everything.var_names].to_numpy()
    has_NP[FEW_CELLS.index(ONE_GENE)] = False  # Without its only gene there is nothing to embed.
    np.testing.assert_array_equal(~np.isnan(everything.X), has_NP)
    assert not has_NP[[FEW_CELLS.index(cell) for cell in (UNKNOWN, EMPTY)]].any()
    np.testing.assert_array_equal(everything.var["n_cells"], has_NP.sum(axis=0))
    known = model.counts[FEW_CELLS, : has.shape[1]] > 0
    detected = pd.Series(known.sum(axis=0), [gene_id(n) for n in range(has.shape[1])])
    assert everything.var["n_detected"].tolist() == detected[everything.var_names].tolist()
    means = np.nanmean(everything.X.astype(np.float64)[:, has_NP.any(axis=0)], axis=0)
    np.testing.assert_allclose(everything.var["shift"].dropna(), means, rtol=1e-6)


def test_truncated_is_the_way_of_hugging_face(model: Trained, folder: Path, asked: Asked) -> None:
    sentence, token = model.tokens[LONG], asked.fifth
    found = anndata.read_h5ad(folder / "truncated.h5ad")
    deleted = np.delete(sentence, 5)  # delete_indices: nothing moves in
    cut, whole = (
        wanted(model, sentence, deleted),
        wanted(model, sentence, without(model, LONG, token)),
    )
    close(found, LONG, name(token), cut)
    assert abs(cut[0] / whole[0] - 1) > 0.01, "the two ways must differ to tell them apart"
    assert found.uns["geneformer"]["perturb"]["truncated"]


def overexpressed(sentence: np.ndarray, *tokens: int) -> np.ndarray:
    """What Geneformer's overexpress_tokens makes of it."""
    rest = [token for token in sentence[1:].tolist() if token not in tokens]
    return np.array([CLS, *tokens, *rest][: toy.SEQ_LENGTH])


def test_overexpression(model: Trained, folder: Path, asked: Asked) -> None:
    sentences = model.tokens
    token, absent = asked.ninth, asked.absent
    assert token not in sentences[OTHER]
    found = anndata.read_h5ad(folder / "over.h5ad")
    for cell in (LONG, OTHER):
        for gene in (token, absent):
            after = overexpressed(sentences[cell], gene)
            close(found, cell, name(gene), wanted(model, sentences[cell], after))
    assert overexpressed(sentences[LONG], absent)[-1] == sentences[LONG][-2], "the last fell off"
    assert found.var["n_cells"].tolist() == [len(FEW_CELLS) - 2] * 2


def test_cls_of_another_layer(model: Trained, folder: Path, asked: Asked) -> None:
    sentence, token = model.tokens[LONG], asked.fifth
    found = anndata.read_h5ad(folder / "cls.h5ad")
    old, new = (
        model.reference.states(torch.from_numpy(tokens.astype(np.int64))[None],
                                 torch.tensor([len(tokens)]), 3)[0].detach().numpy()
        for tokens in (sentence, without(model, LONG, token))
    )  # fmt: skip
    row = found[f"cell{LONG}", name(token)]
    np.testing.assert_allclose(row.X[0, 0], apart(old[0], new[0]), rtol=1e-3, atol=2e-7)
    assert found.uns["geneformer"]["layer"] == "3"


@pytest.mark.parametrize("mode", ["delete", "overexpress"])
def test_groups(mode: str, model: Trained, folder: Path, asked: Asked) -> None:
    sentences, tokens = model.tokens, asked.trio
    found = anndata.read_h5ad(folder / f"{mode}.h5ad")
    assert found.var_names.tolist() == ["trio", "single"]
    assert found.var["n_genes"].tolist() == [3, 1]
    for cell in (LONG, OTHER):
        after = (
            without(model, cell, *tokens)
            if mode == "delete"
            else overexpressed(sentences[cell], *tokens)
        )
        close(found, cell, "trio", wanted(model, sentences[cell], after))
    has = [any(token in sentences[cell][1:] for token in tokens) for cell in FEW_CELLS]
    if mode == "delete":
        has[FEW_CELLS.index(ONE_GENE)] &= (
            len(set(sentences[ONE_GENE][1:].tolist()) - set(tokens)) > 0
        )
        assert (~np.isnan(found[:, "trio"].X[:, 0])).tolist() == has


def test_any_ranks_give_the_same(model: Trained, folder: Path, tmp_path: Path) -> None:
    layouts = {"data 2": FEW_TOKENS, "tensor 2": (TP2,), "pipeline 2": (PP2,)}
    lines = []
    for layout, more in layouts.items():
        there = tmp_path / layout
        there.mkdir()
        files = ("--gene-effects", str(there / "genes.csv"), "--table", str(there / "b.csv"))
        lines.append(line(model, there / "b.h5ad", *SMALL, *files, *more))
    for ended in run_ranks(commands, 2, "perturb", lines, timeout_s=240):
        assert [each.code for each in ended] == [0] * len(lines), ended
    for layout in layouts:
        assert_same(tmp_path / layout, folder)


def assert_same(there: Path, alone: Path) -> None:
    """What two folders hold."""
    found = anndata.read_h5ad(there / "b.h5ad")
    expected = anndata.read_h5ad(alone / "b.h5ad")
    np.testing.assert_allclose(found.X, expected.X, rtol=0, atol=1e-6)
    for layer in ("gene_shift", "goal_shift"):
        np.testing.assert_allclose(found.layers[layer], expected.layers[layer], rtol=0, atol=1e-6)
    one, other = (pd.read_csv(folder / "b.csv", index_col=0) for folder in (there, alone))
    pd.testing.assert_frame_equal(one.sort_index(), other.sort_index(), rtol=1e-3, atol=1e-6)
    one, other = (
        pd.read_csv(folder / "genes.csv", index_col=[0, 1]).sort_index()
        for folder in (there, alone)
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-6)


def test_moved_genes_are_those_of_the_reference(model: Trained, folder: Path) -> None:
    found = pd.read_csv(folder / "genes.csv")
    perturbation = found["perturbation"][0]
    token = int(perturbation[4:]) + NUM_SPECIALS
    moved: dict[str, list[float]] = {}
    for cell, before in enumerate(model.tokens):
        is_goal = cell % 2 == 1 and cell < 40
        if is_goal or token not in before[1:] or len(before) < 3:
            continue
        after = without(model, cell, token)
        old, new = states(model, before), states(model, after)
        for place, gene in enumerate(after.tolist()):
            if place and gene in before[1:]:
                shift = apart(old[before.tolist().index(gene)], new[place])
                moved.setdefault(name(gene), []).append(shift)
    expected = pd.Series({gene: np.mean(each) for gene, each in moved.items()})
    mine = found[found["perturbation"] == perturbation].set_index("feature_id")
    np.testing.assert_allclose(mine["shift"], expected[mine.index], rtol=1e-3, atol=1e-6)
    assert mine["n_cells"].tolist() == [len(moved[gene]) for gene in mine.index]
    assert mine["shift"].is_monotonic_decreasing
    assert mine["shift"].iloc[0] == pytest.approx(expected.max(), rel=1e-3)


def test_toward_the_goal(model: Trained, folder: Path) -> None:
    found = anndata.read_h5ad(folder / "b.h5ad")
    sentences = model.tokens
    assert found.obs_names.tolist() == [f"cell{n}" for n in [*range(0, 40, 2), 40]], (
        "not the goal's"
    )
    goals = [states(model, sentences[n])[1:].mean(axis=0) for n in range(1, 40, 2)
             if len(sentences[n]) > 1]  # fmt: skip
    goal = np.mean(goals, axis=0)
    signs = set()
    for gene in found.var_names[:4]:
        token = int(gene[4:]) + NUM_SPECIALS
        for cell in (n for n in range(0, 40, 2) if token in sentences[n][1:]):
            before, after = (
                states(model, tokens)[1:].mean(axis=0)
                for tokens in (sentences[cell], without(model, cell, token))
            )
            expected = apart(before, goal) - apart(after, goal)
            value = found[f"cell{cell}", gene].layers["goal_shift"][0, 0]
            np.testing.assert_allclose(value, expected, rtol=1e-3, atol=2e-7)
            signs.add(np.sign(value))
    assert signs == {-1, 1}


PLANTED, PLANTED_GENES = 33, 60


def planted_cells() -> anndata.AnnData:
    """Cells that differ from those of the goal by one gene: no other leads all the way there."""
    rng = np.random.default_rng(4)
    genes = [gene_id(number) for number in range(PLANTED_GENES)]
    goal = np.tile(rng.integers(1, 20, PLANTED_GENES), (4, 1))
    goal[:, PLANTED] = 0
    start = goal.copy()
    start[:, PLANTED] = 900
    return anndata.AnnData(
        sparse.csr_matrix(np.concatenate([goal, start]).astype(np.float32)),
        obs=pd.DataFrame({"state": ["well"] * 4 + ["ill"] * 4}, [f"c{i}" for i in range(8)]),
        var=pd.DataFrame(index=genes),
    )


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
    before = hashlib.sha256(model.h5ad.read_bytes()).hexdigest()
    start = ["--checkpoint", str(model.run), "--input", str(model.h5ad)]
    asked = (["--top", "4", "--null", "2"], ["--top", "9", "--null", "3"])
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    lines = [[*start, "--plot", str(path), *more] for path, more in zip(paths, asked, strict=True)]
    (ended,) = run_ranks(commands, 1, "perturb", lines)
    for path, more, each in zip(paths, asked, ended, strict=True):
        assert each.code == 0, each.err
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"41 cells x {more[1]} perturbations" in each.out
    assert paths[0].stat().st_size != paths[1].stat().st_size
    assert hashlib.sha256(model.h5ad.read_bytes()).hexdigest() == before


def by_python(run: str, h5ad: str, genes: list[str]) -> tuple[anndata.AnnData, list[str]]:
    """(what it gives, what it says of two mistakes)."""
    os.environ.pop("RANK")
    torch.distributed.destroy_process_group()
    return api(run, h5ad, genes), misspelt(run, h5ad)


@pytest.fixture(scope="module")
def from_python(model: Trained) -> tuple[anndata.AnnData, list[str]]:
    genes = [name(int(model.tokens[LONG][place])) for place in (1, 2)]
    (found,) = run_ranks(by_python, 1, str(model.run), str(model.h5ad), genes)
    return found


def api(run: str, h5ad: str, genes: list[str]) -> anndata.AnnData:
    import geneformer_mcore

    adata = anndata.read_h5ad(h5ad)
    adata.obs["kind"] = pd.Categorical(["x"] * 21 + ["y"] * 20)
    tempfile.tempdir = "/proc/nowhere"  # Nothing is written.
    found = geneformer_mcore.perturb(
        adata, run, genes, goal="kind=y", null=3, groups={"two": genes}
    )
    assert list(adata.obs.columns) == ["cell_type", "kind"]
    return found


def misspelt(run: str, h5ad: str) -> list[str]:
    import geneformer_mcore

    adata, told = anndata.read_h5ad(h5ad), []
    for wrong in ({"start": "cell_typ=a"}, {"start": "cell_type=a", "goal": "cell_type=z"}):
        with pytest.raises(DataError) as error:
            geneformer_mcore.perturb(adata, run, top=1, **wrong)
        told.append(str(error.value))
    return told


def test_what_is_misspelt_is_told_by_the_names_of_the_anndata(
    from_python: tuple[anndata.AnnData, list[str]],
) -> None:
    column, value = from_python[1]
    assert column.startswith("the AnnData: obs has no column cell_typ ")
    assert "It has cell_type. Remedy" in column
    assert "the AnnData: no cell of obs column cell_type is z. Values and cells: a (21)" in value


def test_cells_of_start_and_goal_count_for_the_goal(model: Trained, tmp_path: Path) -> None:
    both = anndata.read_h5ad(model.h5ad)
    both.obs["kind"] = ["x" if number < 3 else "y" for number in range(NUM_CELLS)]
    both.write_h5ad(tmp_path / "both.h5ad")
    more = (*PLAIN, "--top", "1", "--goal", "kind=x")
    words = line(model, tmp_path / "b.h5ad", *more, h5ad=tmp_path / "both.h5ad")
    lines = [[*words, "--start", "cell_type=a"], [*words, "--start", "kind=x", "--overwrite"]]
    ((ended, refused),) = run_ranks(commands, 1, "perturb", lines)
    assert ended.code == 0, ended.err
    assert "2 of 21 cells of cell_type=a are kind=x too: they count for the goal only" in ended.out
    found = anndata.read_h5ad(tmp_path / "b.h5ad").obs_names.tolist()
    assert found == [f"cell{n}" for n in range(4, NUM_CELLS, 2)]
    assert refused.code == 2
    assert "all 3 cells of kind=x are kind=x, so none is left to move toward it" in refused.err


def test_from_python(model: Trained, from_python: tuple[anndata.AnnData, list[str]]) -> None:
    genes = [name(int(model.tokens[LONG][place])) for place in (1, 2)]
    found = from_python[0]
    assert found.obs_names.tolist() == [f"cell{n}" for n in range(21)]
    assert found.obs["cell_type"].tolist()[:3] == ["a", "b", "a"]
    assert found.var_names.tolist() == [*genes, "two"]
    assert set(found.layers) == {"gene_shift", "goal_shift"}
    sentence = model.tokens[LONG]
    after = without(model, LONG, *sentence[1:3].tolist())
    close(found, LONG, "two", wanted(model, sentence, after))
    assert found.uns["geneformer"]["perturb"]["goal"] == "kind=y"


def test_wrong_input_is_answered_in_one_message(
    model: Trained, asked: Asked, tmp_path: Path
) -> None:
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "list.json").write_text('["a"]')
    (tmp_path / "strange.gmt").write_text("NOT1 NOT2\n")
    lost = anndata.read_h5ad(model.h5ad)
    lost.obs["kind"] = ["x" if number in (UNKNOWN, EMPTY) else "y" for number in range(NUM_CELLS)]
    lost.write_h5ad(tmp_path / "lost.h5ad")
    lost_cells = ["--checkpoint", str(model.run), "--input", str(tmp_path / "lost.h5ad")]
    (tmp_path / "unknown.json").write_text(json.dumps({"g": ["NOT1"]}))
    run, cells, out = str(model.run), str(model.h5ad), str(tmp_path / "b.csv")
    start = ["--checkpoint", run, "--input", cells]
    good = [*start, "--table", out, "--genes", gene_id(7)]
    every = [*start, "--table", out, "--groups"]
    store = tmp_path / "store"
    build_store([str(model.h5ad)], store, vocabulary=model.vocabulary, seq_length=toy.SEQ_LENGTH)
    cases = {
        "is a token store": ["--checkpoint", run, "--input", str(store), *good[4:]],
        "nothing is to be perturbed": good[:6],
        "nothing is to be written": [*start, "--top", "2"],
        "2 of 3 genes are not among the 695": [*good, "ENSG00000000O8", "WHAT"],
        "(near: ENSG": [*good, "ENSG000000000081"],
        "none has ENSG": [*good[:7], name(asked.absent)],
        "no cell of the goal has": [*lost_cells, *good[4:], "--goal", "kind=x"],
        "none of the 2 cells has a gene": [*lost_cells, *good[4:], "--start", "kind=x"],
        "no column kind": [*good, "--goal", "kind=b"],
        "no cell of obs column cell_type is c. Values and cells: a (21)": [
            *good,
            "--start",
            "cell_type=c",
        ],
        "cells are named by COLUMN=VALUE": [*good, "--start", "cell_type"],
        "--truncated goes with --mode delete": [*good, "--truncated", "--mode", "overexpress"],
        "--max-cells must be at least 0": [*good, "--max-cells", "-1"],
        "--null must be at least 0": [*good, "--null", "-1"],
        "--top must be at least 1": [*good, "--top", "0"],
        "the most moved genes, and --most-moved is 0": [
            *good,
            *("--gene-effects", str(tmp_path / "genes.csv"), "--most-moved", "0"),
        ],
        "must be different files": [*good, "--gene-effects", out],
        "must end in .h5ad": [*good, "--output", str(tmp_path / "b.npy")],
        "must end in .csv or .tsv": [*good[:5], str(tmp_path / "b.txt"), *good[6:]],
        "there is no group": [*every, str(tmp_path / "empty.json")],
        'must be {"group"': [*every, str(tmp_path / "list.json")],
        "line 1: there is no tab": [*every, str(tmp_path / "strange.gmt")],
        "group g: 1 of 1 genes": [*every, str(tmp_path / "unknown.json")],
        "cannot be read": [*every, str(tmp_path / "nowhere.gmt")],
        "0 (the embedding) to 4": [*good, "--layer", "5"],
        "no such file": ["--checkpoint", run, "--input", "no.h5ad", *good[4:]],
        "no folder": ["--checkpoint", "nowhere", *good[2:]],
        "the number of ranks (1)": [*good, "parallel.tensor=2"],
        "not allowed with argument": [*good, "--top", "3", "--all-genes"],
    }
    (found,) = run_ranks(commands, 1, "perturb", list(cases.values()))
    for (text, words), ended in zip(cases.items(), found, strict=True):
        assert ended.code == 2, (words, ended)
        assert text in ended.err, (text, ended.err)
        assert "Traceback" not in ended.err
        assert ended.err.count("error: ") == 1, ended.err
    assert not Path(out).exists()
