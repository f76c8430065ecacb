"""launch/evaluate.py: the loss of the genes that were hidden, computed again by other means."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import state
from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.config import load
from geneformer_mcore.data.masking import VALIDATION_EPOCH, Masking
from geneformer_mcore.metrics import baselines
from geneformer_mcore.model.forward_only import losses_and_ranks
from geneformer_mcore.store.ingest.build import build_store
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import RandomSplit
from geneformer_mcore.types import MASK, NUM_SPECIALS
from tests.distributed import toy, trained
from tests.distributed.commands import commands
from tests.distributed.parity import PP2, SEQUENCE, TP2
from tests.distributed.ranks import run_ranks
from tests.distributed.trained import STEP, Trained

SEED = 1234


@dataclass(frozen=True)
class Held:
    """A trained run, and a store with held-out cells."""

    model: Trained
    store: Path

    def tokens(self, split: str = "test") -> Any:
        """Its cells, read as they are."""
        with TokenStore.open(self.store) as store:
            return store.read(*store.rows(split))


@pytest.fixture(scope="module")
def held(model: Trained, tmp_path_factory: pytest.TempPathFactory) -> Held:
    """Half of the cells are for testing, and none for validation."""
    store = tmp_path_factory.mktemp("held_out") / "store"
    build_store(
        [str(model.h5ad)],
        store,
        vocabulary=model.vocabulary,
        seq_length=toy.SEQ_LENGTH,
        split_rule=RandomSplit(0.0, 0.5),
    )
    return Held(model, store)


def line(held: Held, output: Path, *more: str) -> list[str]:
    """A command line."""
    start = ["--checkpoint", str(held.model.run), "--store", str(held.store)]
    return [*start, "--json", str(output), *more]


def evaluations(lines: list[list[str]], ranks: int = 1) -> list[dict[str, Any]]:
    """What the commands write as JSON."""
    first, *others = run_ranks(commands, ranks, "evaluate", lines)
    for words, ended in zip(lines, first, strict=True):
        assert ended.code == 0, (words, ended.err)
    assert all(each.code == 0 and not each.out for other in others for each in other)
    return [json.loads(Path(words[words.index("--json") + 1]).read_text()) for words in lines]


@pytest.fixture(scope="module")
def both(held: Held, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The evaluations of one rank: by groups, and with all hidden genes shown as [MASK]."""
    folder = tmp_path_factory.mktemp("alone")
    lines = [
        line(held, folder / "out.json", "--by", "cell_type"),
        line(held, folder / "masked.json", "--mask-fractions", "1,0,0"),
    ]
    return evaluations(lines)


@pytest.fixture(scope="module")
def found(both: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of them."""
    return both[0]


def by_reference(held: Held, fractions: tuple[float, float, float], shown: bool) -> np.ndarray:
    """[cells, 6]: loss sum, hidden genes, top 1, top 5, and loss and number of those shown as
    [MASK], by plain PyTorch. shown: nothing is hidden
    from the model."""
    reference, cells = held.model.reference, held.tokens()
    masking = Masking(0.15, fractions, toy.VOCABULARY, SEED)
    seen_T, selected_T = masking.apply(cells, np.full(len(cells), VALIDATION_EPOCH))
    rows = []
    for start, stop in zip(cells.offsets[:-1], cells.offsets[1:], strict=True):
        tokens = torch.from_numpy(cells.tokens_T[start:stop].astype(np.int64))
        given = tokens if shown else torch.from_numpy(seen_T[start:stop].astype(np.int64))
        here = torch.from_numpy(np.flatnonzero(selected_T[start:stop]))
        with torch.no_grad():
            logits = reference.logits(given[None], torch.tensor([len(tokens)]))[0, here]
        labels = tokens[here]
        best = logits.topk(5, dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="none")
        masked = given[here] == MASK
        tops = int(best[:, :1].sum()), int(best.sum())
        hidden = float(loss[masked].sum()), int(masked.sum())
        rows.append([float(loss.sum()), len(labels), *tops, *hidden])
    return np.array(rows)


def test_equals_the_plain_reference(held: Held, found: dict[str, Any]) -> None:
    loss, hidden, top1, top5, masked_loss, masked = by_reference(
        held, (0.8, 0.02, 0.18), shown=False
    ).T
    assert found["num_cells"] == len(hidden) > 10
    assert found["num_predicted"] == hidden.sum() > 100
    assert found["loss"] == pytest.approx(loss.sum() / hidden.sum(), abs=1e-5)
    has = hidden > 0
    assert found["cell_mean_loss"] == pytest.approx((loss[has] / hidden[has]).mean(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["top1"] == pytest.approx(top1.sum() / hidden.sum())
    assert found["top5"] == pytest.approx(top5.sum() / hidden.sum())
    assert found["num_masked"] == masked.sum() < hidden.sum()
    assert found["masked_loss"] == pytest.approx(masked_loss.sum() / masked.sum(), abs=1e-5)


def test_genes_are_hidden(held: Held, both: list[dict[str, Any]]) -> None:
    found, all_masked = both
    cells = held.tokens()
    masking = Masking(0.15, (1.0, 0.0, 0.0), toy.VOCABULARY, SEED)
    seen_T, selected_T = masking.apply(cells, np.full(len(cells), VALIDATION_EPOCH))
    assert (seen_T[selected_T] == MASK).all()
    share = selected_T.sum() / (len(seen_T) - len(cells))
    assert 0.1 < share < 0.2
    shown = by_reference(held, (0.8, 0.02, 0.18), shown=True)
    assert abs(found["loss"] - shown[:, 0].sum() / shown[:, 1].sum()) > 0.05
    expected = by_reference(held, (1.0, 0.0, 0.0), shown=False)
    assert all_masked["loss"] == pytest.approx(
        expected[:, 0].sum() / expected[:, 1].sum(), abs=1e-5
    )
    assert abs(all_masked["loss"] - found["loss"]) > 1e-3


FIGURES = ("loss", "cell_mean_loss", "perplexity", "top1", "top5", "unigram", "gene_given_rank")


LAYOUTS: dict[str, tuple[str, ...]] = {
    "data": (),
    "tensor": (TP2,),
    "pipeline": (PP2,),
    "sequence": SEQUENCE,
}


def test_any_layout_gives_the_same(held: Held, found: dict[str, Any], tmp_path: Path) -> None:
    lines = [
        line(held, tmp_path / f"{name}.json", "--by", "cell_type", *layout)
        for name, layout in LAYOUTS.items()
    ]
    for layout, other in zip(LAYOUTS, evaluations(lines, ranks=2), strict=True):
        for figures, alone in [
            (other, found),
            *((other["by"]["cell_type"][name], found["by"]["cell_type"][name]) for name in "ab"),
        ]:
            assert figures["num_predicted"] == alone["num_predicted"]
            for name in FIGURES:
                assert figures[name] == pytest.approx(alone[name], rel=1e-6), (layout, name)


def test_groups_add_up(found: dict[str, Any], held: Held) -> None:
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
    assert str(held.store.parent) not in json.dumps(found)


def forced(run: Path, vocabulary: str, log_p_V: np.ndarray) -> None:
    """Saves a run whose model says `log_p_V` whatever it sees."""
    made = toy.make()
    (stage,) = made.trainable.stages
    with torch.no_grad():
        # The head ends in a norm: without scale and shift nothing but the bias is left.
        stage.lm_head.layer_norm.weight.zero_()
        stage.lm_head.layer_norm.bias.zero_()
        stage.output_layer.bias.zero_()
        stage.output_layer.bias[: len(log_p_V)] = torch.from_numpy(log_p_V).float()
    made.trainable.optimizer.reload_model_params()
    root = run / "checkpoints"
    staging = checkpoints.make_staging(root, STEP)
    state.save(made.trainable, staging, 0)
    identity = Identity(load(None, list(toy.SETTINGS))[1], {}, vocabulary, "content")
    Record(STEP, 32, {}, identity, {}, {}, {}).save(staging)
    checkpoints.commit(staging, root, STEP)


def test_a_model_of_gene_frequencies_has_their_cross_entropy(held: Held, tmp_path: Path) -> None:
    run, train = tmp_path / "run", held.tokens("train")
    run.mkdir()
    held.model.vocabulary.save(run / "vocabulary.json")
    counts = np.bincount(train.tokens_T, minlength=toy.VOCABULARY)[NUM_SPECIALS:] + 0.1
    log_p_V = np.concatenate([np.full(NUM_SPECIALS, -40.0), np.log(counts / counts.sum())])
    run_ranks(forced, 1, run, held.model.vocabulary.checksum, log_p_V)
    forced_run = Held(Trained(run, {}, held.model.h5ad), held.store)
    likeliest = np.argsort(-log_p_V.astype(np.float32), kind="stable")
    splits = ("test", "train")
    lines = [line(forced_run, tmp_path / f"{split}.json", "--split", split) for split in splits]
    for split, result in zip(splits, evaluations(lines), strict=True):
        # Counted gene by gene, from the masks alone.
        cells = held.tokens(split)
        masking = Masking(0.15, (0.8, 0.02, 0.18), toy.VOCABULARY, SEED)
        _, selected_T = masking.apply(cells, np.full(len(cells), VALIDATION_EPOCH))
        hidden_M = cells.tokens_T[selected_T]
        assert result["num_predicted"] == len(hidden_M)
        assert result["loss"] == pytest.approx(-np.mean(log_p_V[hidden_M]), abs=1e-6)
        for name, number in (("top1", 1), ("top5", 5)):
            assert result[name] == pytest.approx(np.isin(hidden_M, likeliest[:number]).mean())
        own = baselines.unigram(train, toy.VOCABULARY, result["baselines"]["alpha"])
        assert result["unigram"] == pytest.approx(-own[hidden_M].mean(), abs=1e-9)
    assert result["top5"] > 0, "of the cells that were counted, some hidden genes are frequent ones"


def ranks_of(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss and rank of each row, with the columns dealt to the ranks that are here."""
    import torch.distributed as dist

    columns = torch.from_numpy(logits).chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
    found = losses_and_ranks(columns, torch.from_numpy(labels), dist.group.WORLD)
    return tuple(each.numpy() for each in found)  # type: ignore[return-value]


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_over_tensor_ranks(ranks: int, rng: np.random.Generator) -> None:
    logits = rng.integers(0, 9, (300, 16)).astype(np.float32)  # with many ties
    logits[:, 14:] = -np.inf
    labels = rng.integers(0, 14, 300)
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = np.argmax(order == labels[:, None], axis=1)
    loss = F.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(labels), reduction="none"
    )
    for losses, places in run_ranks(ranks_of, ranks, logits, labels):
        np.testing.assert_array_equal(places, expected)
        np.testing.assert_allclose(losses, loss.numpy(), rtol=1e-12)


def test_table_and_plots(held: Held, found: dict[str, Any], tmp_path: Path) -> None:
    words = ["--checkpoint", str(held.model.run), "--store", str(held.store), "--plot"]
    ((ended,),) = run_ranks(commands, 1, "evaluate", [[*words, str(tmp_path / "plots")]])
    assert ended.code == 0, ended.err
    assert f"{found['loss']:.4f}" in ended.out
    assert f"{found['top5']:.2%}" in ended.out
    assert "by cell_type" in ended.out
    assert "by dataset_id" in ended.out
    assert "note: the model was trained on another store" in ended.out
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["loss.png", "loss_by_cell_type.png", "loss_by_dataset_id.png"]
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_input_is_answered_in_one_message(
    held: Held, models: dict[str, Trained], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build_store([str(held.model.h5ad)], other, trained.vocabulary_of(600), toy.SEQ_LENGTH)
    good = ["--checkpoint", str(held.model.run), "--store", str(held.store)]
    cases = {
        "no gene is hidden": ["--checkpoint", str(models["hides nothing"].run), *good[2:]],
        "no folder": ["--checkpoint", "nowhere", *good[2:]],
        "not a finished store": [*good[:3], str(tmp_path)],
        "its token ids mean other genes": [*good[:3], str(other)],
        "its validation split has no cells": [*good, "--split", "validation"],
        "(cell_type, dataset_id), and got assay": [*good, "--by", "assay,cell_type"],
        "three shares with commas": [*good, "--mask-fractions", "0.8,x"],
        "three shares that sum to 1": [*good, "--mask-fractions", "0.8,0.1"],
        "train.seed": [*good, "--seed", "-1"],
        "must be at least the 96": [*good, "--tokens-per-batch", "5"],
        "the number of ranks (1)": [*good, "parallel.pipeline=2"],
        "only the layout": [*good, "train.seed=3"],
        "invalid choice: 'all'": [*good, "--split", "all"],
    }
    (found,) = run_ranks(commands, 1, "evaluate", list(cases.values()))
    for (text, words), ended in zip(cases.items(), found, strict=True):
        assert ended.code == 2, (words, ended)
        assert text in ended.err, (text, ended.err)
        assert ended.err.count("error: ") == 1, ended.err
        assert not ended.out
