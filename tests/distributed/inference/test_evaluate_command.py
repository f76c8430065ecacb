"""launch/evaluate.py: the loss of the masked genes, computed again by other means."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from geneformer_mcore.config import load
from geneformer_mcore.data.masking import VALIDATION_EPOCH, Masking
from geneformer_mcore.metrics import baselines
from geneformer_mcore.model.forward_only import losses_and_ranks
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import RandomSplit
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import MASK, NUM_SPECIALS, RaggedCells
from tests.distributed import toy
from tests.distributed.commands import assert_refused, succeed
from tests.distributed.inference import trained
from tests.distributed.inference.trained import Trained, words
from tests.distributed.parity import PP2, SEQUENCE, TP2
from tests.distributed.ranks import run_ranks

SEED = 1234
OURS, ALL_MASKED = (0.8, 0.02, 0.18), (1.0, 0.0, 0.0)
"""Shares of the selected genes that are masked, exchanged and shown."""


@pytest.fixture(scope="module")
def store(model: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the cells are for testing, and none for validation."""
    store, rule = tmp_path_factory.mktemp("held_out") / "store", RandomSplit(0.0, 0.5)
    build_store([str(model.h5ad)], store, model.vocabulary, toy.SEQ_LENGTH, split_rule=rule)
    return store


def cells_of(store: Path, split: str = "test") -> Any:
    with TokenStore.open(store) as reader:
        return reader.read(*reader.rows(split))


def masked(cells: RaggedCells, fractions: tuple[float, ...] = OURS) -> tuple[Any, Any]:
    masking = Masking(0.15, fractions, toy.VOCABULARY, SEED)
    return masking.apply(cells, np.full(len(cells), VALIDATION_EPOCH))


def evaluations(
    model: Trained, store: Path, folder: Path, lines: dict[str, str], ranks: int = 1
) -> list[dict[str, Any]]:
    """What the commands write as JSON, each into a file by its name."""
    files = [folder / f"{name}.json" for name in lines]
    start = ("evaluate", "--checkpoint", model.run, "--store", store)
    asked = zip(files, lines.values(), strict=True)
    succeed([words(*start, "--json", file, more) for file, more in asked], ranks)
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def all_found(
    model: Trained, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    lines = {"test": "--by cell_type", "masked": "--mask-fractions 1,0,0"}
    results = evaluations(model, store, tmp_path_factory.mktemp("alone"), lines)
    return dict(zip(lines, results, strict=True))


@pytest.fixture(scope="module")
def found(all_found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return all_found["test"]


def by_reference(
    model: Trained, cells: Any, fractions: tuple[float, ...] = OURS, shown: bool = False
) -> np.ndarray:
    """[6, cells]: loss sum, selected genes, top 1, top 5, and loss and number of the masked, by
    plain PyTorch. shown: nothing is kept from the model."""
    rows = []
    seen_T, selected_T = masked(cells, fractions)
    for start, stop in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
        tokens, seen = (torch.from_numpy(each[start:stop].astype(np.int64))
                        for each in (cells.tokens_T, seen_T))  # fmt: skip
        given = tokens if shown else seen
        here = torch.from_numpy(np.flatnonzero(selected_T[start:stop]))
        with torch.no_grad():
            logits = model.reference.logits(given[None], torch.tensor([len(tokens)]))[0, here]
        best = logits.topk(5, dim=1).indices == tokens[here, None]
        loss = F.cross_entropy(logits, tokens[here], reduction="none")
        is_masked = given[here] == MASK
        tops = int(best[:, 0].sum()), int(best.sum())
        of_masked = float(loss[is_masked].sum()), int(is_masked.sum())
        rows.append([float(loss.sum()), len(here), *tops, *of_masked])
    return np.array(rows).T


def test_equals_the_plain_reference(model: Trained, store: Path, found: dict[str, Any]) -> None:
    loss, number, top1, top5, masked_loss, num_masked = by_reference(model, cells_of(store))
    total, has = number.sum(), number > 0
    assert found["num_cells"] == len(number) > 10
    assert found["num_predicted"] == total > 100
    assert found["loss"] == pytest.approx(loss.sum() / total, abs=1e-5)
    assert found["cell_mean_loss"] == pytest.approx((loss[has] / number[has]).mean(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["top1"] == pytest.approx(top1.sum() / total)
    assert found["top5"] == pytest.approx(top5.sum() / total)
    assert found["num_masked"] == num_masked.sum() < total
    assert found["masked_loss"] == pytest.approx(masked_loss.sum() / num_masked.sum(), abs=1e-5)


def test_masked_genes(model: Trained, store: Path, all_found: dict[str, dict[str, Any]]) -> None:
    found, all_masked, cells = all_found["test"], all_found["masked"], cells_of(store)
    seen_T, selected_T = masked(cells, ALL_MASKED)
    assert (seen_T[selected_T] == MASK).all()
    assert 0.1 < selected_T.sum() / (len(seen_T) - len(cells)) < 0.2
    loss, number, *_ = by_reference(model, cells, shown=True)
    assert abs(found["loss"] - loss.sum() / number.sum()) > 0.05
    loss, number, *_ = by_reference(model, cells, ALL_MASKED)
    assert all_masked["loss"] == pytest.approx(loss.sum() / number.sum(), abs=1e-5)
    assert abs(all_masked["loss"] - found["loss"]) > 1e-3


FIGURES = ("loss", "cell_mean_loss", "perplexity", "top1", "top5", "unigram", "gene_given_rank")


def test_any_layout(model: Trained, store: Path, found: dict[str, Any], tmp_path: Path) -> None:
    layouts = {"data": "", "tensor": TP2, "pipeline": PP2, "sequence": " ".join(SEQUENCE)}
    lines = {name: f"--by cell_type {layout}" for name, layout in layouts.items()}
    others = evaluations(model, store, tmp_path, lines, ranks=2)
    for layout, other in zip(layouts, others, strict=True):
        of_groups = [(other["by"]["cell_type"][n], found["by"]["cell_type"][n]) for n in "ab"]
        for figures, alone in ((other, found), *of_groups):
            assert figures["num_predicted"] == alone["num_predicted"]
            for name in FIGURES:
                assert figures[name] == pytest.approx(alone[name], rel=1e-6), (layout, name)


def test_groups_add_up(found: dict[str, Any], store: Path) -> None:
    groups = found["by"]["cell_type"]
    assert set(groups) == {"a", "b"}
    for name in ("num_cells", "num_predicted"):
        assert sum(group[name] for group in groups.values()) == found[name]
    for name in ("loss", "unigram", "gene_given_rank", "top5"):
        total = sum(group[name] * group["num_predicted"] for group in groups.values())
        assert total / found["num_predicted"] == pytest.approx(found[name])
    assert found["split"] == "test"
    assert found["seed"] == SEED
    assert found["trained_on_this_store"] is False
    assert str(store.parent) not in json.dumps(found)


def forced(run: Path, vocabulary: Path, log_p_V: np.ndarray) -> None:
    """Saves a run whose model says `log_p_V` whatever it sees."""
    made = toy.make()
    (stage,) = made.trainable.stages
    with torch.no_grad():
        # The head ends in a norm: without scale and shift nothing but the bias is left.
        for each in (*stage.lm_head.layer_norm.parameters(), stage.output_layer.bias):
            each.zero_()
        stage.output_layer.bias[: len(log_p_V)] = torch.from_numpy(log_p_V).float()
    made.trainable.optimizer.reload_model_params()
    config = load(None, list(toy.SETTINGS))[1]
    trained.commit(made, run, config, Vocabulary.load(vocabulary), trained.STEP)


def test_a_model_of_gene_frequencies(model: Trained, store: Path, tmp_path: Path) -> None:
    train = cells_of(store, "train")
    counts = np.bincount(train.tokens_T, minlength=toy.VOCABULARY)[NUM_SPECIALS:] + 0.1
    log_p_V = np.concatenate([np.full(NUM_SPECIALS, -40.0), np.log(counts / counts.sum())])
    run_ranks(forced, 1, tmp_path, model.run / "vocabulary.json", log_p_V)
    likeliest = np.argsort(-log_p_V.astype(np.float32), kind="stable")
    lines = {split: f"--split {split}" for split in ("test", "train")}
    results = evaluations(replace(model, run=tmp_path), store, tmp_path, lines)
    for split, result in zip(lines, results, strict=True):
        # Counted gene by gene, from the masks alone.
        cells = cells_of(store, split)
        genes_M = cells.tokens_T[masked(cells)[1]]
        assert result["num_predicted"] == len(genes_M)
        assert result["loss"] == pytest.approx(-np.mean(log_p_V[genes_M]), abs=1e-6)
        for name, number in (("top1", 1), ("top5", 5)):
            assert result[name] == pytest.approx(np.isin(genes_M, likeliest[:number]).mean())
        own = baselines.unigram(train, toy.VOCABULARY, result["baselines"]["alpha"])
        assert result["unigram"] == pytest.approx(-own[genes_M].mean(), abs=1e-9)
    assert result["top5"] > 0, "of the cells that were counted, some masked genes are frequent ones"


def ranks_of(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss and rank of each row, with the columns dealt to the ranks that are here."""
    import torch.distributed as dist

    columns = torch.from_numpy(logits).chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    losses, places = losses_and_ranks(columns, torch.from_numpy(labels), dist.group.WORLD)
    return losses.numpy(), places.numpy()


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_over_tensor_ranks(ranks: int, rng: np.random.Generator) -> None:
    logits = rng.integers(0, 9, (300, 16)).astype(np.float32)  # with many ties
    logits[:, 14:] = -np.inf
    labels = rng.integers(0, 14, 300)
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = np.argmax(order == labels[:, None], axis=1)
    logits_64 = torch.from_numpy(logits).double()
    loss = F.cross_entropy(logits_64, torch.from_numpy(labels), reduction="none")
    for losses, places in run_ranks(ranks_of, ranks, logits, labels):
        np.testing.assert_array_equal(places, expected)
        np.testing.assert_allclose(losses, loss.numpy(), rtol=1e-12)


def test_table_and_plot(model: Trained, store: Path, found: dict[str, Any], tmp_path: Path) -> None:
    line = ("evaluate", "--checkpoint", model.run, "--store", store, "--plot", tmp_path / "plots")
    (ended,) = succeed([words(*line)])
    for text in (
        *(f"{found['loss']:.4f}", f"{found['top5']:.2%}", "by cell_type", "by dataset_id"),
        "note: the model was trained on another store",
    ):
        assert text in ended.out
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["loss.png", "loss_by_cell_type.png", "loss_by_dataset_id.png"]
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_input(
    model: Trained, models: dict[str, Trained], store: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build_store([str(model.h5ad)], other, trained.vocabulary_of(600), toy.SEQ_LENGTH)
    cases = {
        "no gene is masked": f"--checkpoint {models['hides nothing'].run}",
        "no folder": "--checkpoint nowhere",
        "not a finished store": f"--store {tmp_path}",
        "its token ids mean other genes": f"--store {other}",
        "its validation split has no cells": "--split validation",
        "(cell_type, dataset_id), and got assay": "--by assay,cell_type",
        "three shares with commas": "--mask-fractions 0.8,x",
        "three shares that sum to 1": "--mask-fractions 0.8,0.1",
        "train.seed": "--seed -1",
        "must be at least the 96": "--tokens-per-batch 5",
        "the number of ranks (1)": "parallel.pipeline=2",
        "only the layout": "train.seed=3",
        "invalid choice: 'all'": "--split all",
    }
    good = words("--checkpoint", model.run, "--store", store)
    assert_refused("evaluate", {text: [*good, *more.split()] for text, more in cases.items()})
