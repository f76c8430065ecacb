"""What benchmarks are given: cells, formats, lengths; peers that compute the same from them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from benchmarks import cell_types, ingest, train_step
from benchmarks.peers.bionemo_tokeniser import BioNeMoTokeniser
from benchmarks.peers.exact_tokens import exact_tokens
from benchmarks.peers.hf_tokeniser import HFTokeniser, blocks
from benchmarks.peers.masking import IGNORED, masked, sums_of_masked
from benchmarks.peers.padding import padded, sums_of_padded
from benchmarks.peers.token_files import tokens_dense, tokens_h5ad
from benchmarks.side_by_side.cells import Cells, draw
from benchmarks.side_by_side.prepared import write
from benchmarks.side_by_side.shuffle_quality import quality, two_epochs
from benchmarks.side_by_side.tflops_cells import FULL, like_real, made_up
from benchmarks.side_by_side.tflops_grid import MEAN_TOKENS, Asked, Setting, grid, usual
from benchmarks.side_by_side.tflops_run import Conditions, possible
from benchmarks.tokenize import num_different
from geneformer_mcore.contracts import CLS, MASK, NUM_SPECIALS, PAD
from geneformer_mcore.errors import ConfigError
from tests.small_cells import gene_id, plain_tokens, random_counts, vocabulary_of, write_h5ad

GENES = 400


@pytest.mark.parametrize("tied", [False, True])
def test_every_tokeniser_gives_the_exact_lists(rng: np.random.Generator, tied: bool) -> None:
    """With ties, full of which small counts are, a stable sort only."""
    columns = np.arange(NUM_SPECIALS, NUM_SPECIALS + GENES, dtype=np.int32)
    if tied:
        counts = sparse.csr_matrix(rng.integers(0, 3, (30, GENES)).astype(np.float32))
        vocabulary = vocabulary_of(GENES, np.ones(GENES))
    else:
        counts = random_counts(rng, 50, GENES, density=0.4)
        vocabulary = vocabulary_of(GENES, 0.1 + rng.random(GENES))
        columns[rng.random(GENES) < 0.2] = 0
    medians, dense = vocabulary.medians_of_token, counts.toarray().astype(np.float64)
    known = {gene_id(i): int(token) for i, token in enumerate(columns) if token}
    names = [gene_id(i) for i in range(GENES)]
    of_genes = {gene: float(medians[token]) for gene, token in known.items()}
    for seq_length in (5, 2048):
        exact = exact_tokens(counts, columns, medians, seq_length)
        plain = [plain_tokens(row, columns, vocabulary, seq_length) for row in dense]
        assert num_different(exact, plain) == 0
        hf = HFTokeniser(columns, medians, seq_length, stable=tied)
        ways = [hf.by_rows, hf.lean]
        if not tied:
            ways.append(BioNeMoTokeniser(names, known, of_genes, seq_length).encode)
        assert [num_different(encode(counts), exact) for encode in ways] == [0] * len(ways)
    if tied:
        for found, row in zip(HFTokeniser(columns, medians, 2048).lean(counts), dense, strict=True):
            assert np.all(np.diff(row[found[1:] - NUM_SPECIALS]) <= 0), "ranked, whatever the ties"


def test_files_are_laid_on_the_genes_of_all(rng: np.random.Generator, tmp_path: Path) -> None:
    first, second = random_counts(rng, 30, 5, 0.9), random_counts(rng, 90, 4, 0.9)
    genes = {
        "a": [gene_id(3), gene_id(1), "", gene_id(0), gene_id(1)],
        "b": [gene_id(i) for i in (7, 1, 3, 9)],
    }
    paths = [
        write_h5ad(tmp_path / f"{name}.h5ad", counts, var={"ensembl_id": genes[name]})
        for name, counts in (("a", first), ("b", second))
    ]
    found, few = draw(paths, None, 200, seed=0)
    assert len(few) == 128
    assert found.gene_ids == [gene_id(i) for i in (0, 1, 3, 7, 9)]
    assert found.dataset_N.tolist() == [0] * 50 + [1] * 150, "as many as the files have cells"
    dense = first.toarray()
    on_genes = np.stack([dense[:, 3], dense[:, 1] + dense[:, 4], dense[:, 0]], axis=1)
    expected = {tuple(row) for row in np.pad(on_genes, ((0, 0), (0, 2)))}
    assert {tuple(row) for row in found.counts[:50].toarray()} <= expected


def test_every_format_holds_the_same_tokens(rng: np.random.Generator, tmp_path: Path) -> None:
    counts = sparse.csr_matrix(random_counts(rng, 70, 60))
    gene_ids, sets = [gene_id(i) for i in range(60)], np.sort(rng.integers(0, 3, 70))
    data = write(Cells(counts, gene_ids, sets.astype(np.int16), vocabulary_of(60)), tmp_path)
    tokens_h5ad(data)
    tokens_dense(data)
    ranks, dense = anndata.read_h5ad(data.place("tokens_h5ad")).X, np.load(tmp_path / "tokens_dense")
    truth = data.truth
    assert np.array_equal(truth.count_sums_N, np.asarray(counts.sum(1)).ravel())
    assert len(np.unique(truth.keys_N)) == len(data) == 70
    for row, tokens in enumerate(np.split(data.tokens_T, data.offsets[1:-1])):
        assert tokens[0] == CLS
        assert (truth.token_sums_N[row], truth.num_tokens_N[row]) == (tokens.sum(), len(tokens))
        assert np.array_equal(ranks[row].data, tokens[1:])
        assert np.array_equal(ranks[row].indices, np.arange(len(tokens) - 1))
        assert np.array_equal(dense[row, : len(tokens)], tokens)
        assert np.all(dense[row, len(tokens) :] == PAD)


def test_peers_pad_and_mask_as_ours() -> None:
    cells = [np.arange(70, dtype=np.uint16), np.array([0, 9], np.uint16)]
    tokens = padded(cells)
    assert tokens.shape == (2, 128)
    assert tokens[0].tolist() == [*range(70), *[PAD] * 58]
    assert tokens[1].tolist() == [0, 9, *[PAD] * 126]
    assert torch.equal(padded([cell[1:] for cell in cells], with_cls=False), tokens)
    assert sums_of_padded(tokens).tolist() == [sum(range(70)) - PAD, 9]
    torch.manual_seed(0)
    tokens = padded([np.arange(5, 2052, dtype=np.uint16)] * 64, with_cls=False)
    tokens[:, 1500:] = PAD
    seen, labels = masked(tokens)
    asked = labels != IGNORED
    assert torch.equal(labels[asked], tokens[asked])
    assert torch.equal(seen[~asked], tokens[~asked])
    assert not asked[:, 0].any(), "[CLS] is never asked for"
    assert not asked[:, 1500:].any()
    assert asked[:, 1:1500].double().mean() == pytest.approx(0.15, abs=0.01)
    assert (seen[asked] == MASK).double().mean() == pytest.approx(0.8, abs=0.01)
    assert (seen[asked] == tokens[asked]).double().mean() == pytest.approx(0.18, abs=0.01)
    assert np.array_equal(sums_of_masked((seen, labels)), sums_of_padded(tokens))


def test_a_uniform_shuffle_measures_one_and_source_order_nothing() -> None:
    size = 64 * 64
    one, other = (np.random.default_rng(seed).permutation(size) for seed in (0, 1))
    sets = np.repeat(np.arange(4), size // 4)
    found = quality(one, sets, 64)
    assert found == {name: pytest.approx(1, abs=0.05) for name in found}
    found = quality(np.arange(size), sets, 64)
    assert found["blocks"] == pytest.approx(1 / 40, abs=0.01)  # one block, where 40 are usual
    assert found["datasets"] == 0
    assert found["distance"] == pytest.approx(1 / (0.293 * size), rel=0.1)
    by_chance = pytest.approx(1, abs=0.1)
    expected = {"each_once": True, "epochs_differ": True, "mates_again": by_chance}
    assert two_epochs(one, other, size, 64) == expected
    same = two_epochs(one, one, size, 64)
    assert (same["epochs_differ"], same["mates_again"]) == (False, pytest.approx((size - 1) / 63))
    assert not two_epochs(one, np.append(one[:-1], one[0]), size, 64)["each_once"]


def test_drawn_cells_are_those_of_the_source(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "ROWS_PER_WRITE", 13)
    counts = random_counts(rng, 30, 40)
    source = write_h5ad(tmp_path / "a.h5ad", counts, obs={"age": range(30)})
    ingest._draw(source, tmp_path / "b.h5ad", 100, 7)
    drawn = anndata.read_h5ad(tmp_path / "b.h5ad")
    rows = drawn.obs["age"].to_numpy()
    assert (drawn.obs_names.is_unique, len(set(rows)) > 20) == (True, True)
    np.testing.assert_array_equal(drawn.X.toarray(), counts[rows].toarray())


def test_made_up_cells_of_tflops_have_the_lengths_asked_for() -> None:
    for mean in (200, 1900):
        lengths_N = like_real(mean, 2048)
        assert lengths_N.mean() == pytest.approx(mean, rel=2e-3)
        assert lengths_N.min() >= 2
    cells = made_up(900, 2048, 25_429).source
    some, ragged = cells.read(5, 8), cells.views(np.array([7, 5])).ragged()
    seventh = some.tokens_T[some.offsets[2] :]
    assert np.array_equal(ragged.tokens_T[: len(seventh)], seventh)
    assert (seventh[0], len(np.unique(seventh))) == (CLS, len(seventh))
    assert (made_up(FULL, 64, 100).source.views(np.arange(9)).lengths_N == 64).all()


def test_rows_of_tflops() -> None:
    asked = Asked(["106m", "10m"], ["bf16"], ["padded", "packed"], [], ["te", "flash"], [None], [])
    rows = grid(asked, on_gpu=True)
    assert len(set(rows)) == len(rows) == 8
    assert rows[0] == Setting("106m", "bf16", "padded", FULL, "te", None, 16)
    assert rows[-1] == Setting("10m", "bf16", "packed", MEAN_TOKENS, "flash", None, 32)
    assert [usual(on_gpu)["models"] for on_gpu in (True, False)] == [["106m", "10m"], ["10m"]]
    conditions = Conditions(seq_length=2048, num_micro_batches=1, steps=3, warmup=1)
    packed = conditions.config(Setting("10m", "fp32", "packed", MEAN_TOKENS, "sdpa", 0.0, 16))
    assert 0.9 * 16 * 2048 < packed.train.global_batch_size * MEAN_TOKENS < 16 * 2048
    padded = Setting("10m", "fp32", "padded", FULL, "sdpa", 0.0, 2)
    flash = Setting("10m", "bf16", "padded", FULL, "flash", None, 2)
    configs, reasons = possible([padded, flash], conditions, torch.device("cpu"))
    assert list(configs) == [padded]
    assert "needs an NVIDIA GPU and 16 bits" in reasons[flash]
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        possible([flash], conditions, torch.device("cpu"))


def test_micro_batches_must_fit_the_global_batch() -> None:
    given = {"precision": None, "attention_dropout": None, "steps": None}
    arguments = argparse.Namespace(global_batch=12, micro_batches=[8, 4, 1, 4], **given)
    train_step.fill_in(arguments, train_step._ON_CPU)
    assert arguments.micro_batches == [1, 4]
    assert (arguments.precision, arguments.attention_dropout, arguments.steps) == ("fp32", 0, 1)
    arguments.micro_batches = [8]
    with pytest.raises(ConfigError, match=r"\(12\) must be a multiple of one of .* \[8\]"):
        train_step.fill_in(arguments, train_step._ON_CPU)


def test_folders_of_cell_types_change_with_all_that_changes_figures(tmp_path: Path) -> None:
    train, config, vocabulary = (tmp_path / name for name in ("a.h5ad", "c.yaml", "v.json"))
    for path in (train, config, vocabulary):
        path.write_text("one")
    usual = {"settings": [], "steps": None, "ranks": 2, "seed": 0, "resamples": 9, "config": config}

    def name(options: tuple[str, ...] = (), **more: object) -> str:
        arguments = argparse.Namespace(**usual | more)
        model = cell_types._model((train,), list(options), arguments)
        return cell_types._types(train, tmp_path / model, arguments)

    changes = {"steps": 3, "settings": ["a=1"], "ranks": 1, "seed": 1, "resamples": 8}
    names = [name(), name(("--vocabulary", str(vocabulary)))]
    names += [name(**{key: value}) for key, value in changes.items()]
    assert name() == names[0]
    config.write_text("other")
    names.append(name())
    os.utime(train, ns=(1, 1))
    names.append(name())
    assert len(set(names)) == len(names) == 9
    assert sum(part.shape[0] for part in blocks(sparse.csr_matrix((1100, 3)))) == 1100
