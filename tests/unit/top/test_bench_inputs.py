"""Inputs of benchmarks: cells, formats, lengths; peers that compute the same from them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from benchmarks import cell_types, tflops
from benchmarks.harness.loader_cells import Cells, write
from benchmarks.harness.loader_turn import shuffle
from benchmarks.harness.peers.contestant import padded, sums_of_padded, tokens_dense, tokens_h5ad
from benchmarks.harness.peers.loaders import IGNORED, masked, sums_of_masked
from benchmarks.harness.peers.tokenisers import BioNeMoTokeniser, HFTokeniser, exact_tokens
from benchmarks.harness.tflops_rows import Setting
from benchmarks.tokenize import num_different
from geneformer_mcore.types import CLS, MASK, NUM_SPECIALS, PAD
from tests.support.small_cells import gene_id, plain_tokens, random_counts, vocabulary_of

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
    names = [gene_id(i) for i in range(GENES)]
    known = {names[i]: int(token) for i, token in enumerate(columns) if token}
    of_genes = {gene: float(medians[token]) for gene, token in known.items()}
    for seq_length in (5, 2048):
        exact = exact_tokens(counts, columns, medians, seq_length)
        plain = [plain_tokens(row, columns, vocabulary, seq_length) for row in dense]
        assert num_different(exact, plain) == 0
        hf = HFTokeniser(columns, medians, seq_length, stable=tied)
        bionemo = BioNeMoTokeniser(names, known, of_genes, seq_length)
        for encode in (hf.by_rows, hf.lean, *([] if tied else [bionemo.encode])):
            assert num_different(encode(counts), exact) == 0, encode
    if tied:
        for found, row in zip(HFTokeniser(columns, medians, 2048).lean(counts), dense, strict=True):
            assert np.all(np.diff(row[found[1:] - NUM_SPECIALS]) <= 0), "ranked, whatever the ties"


def test_every_format_holds_the_same_tokens(rng: np.random.Generator, tmp_path: Path) -> None:
    counts = sparse.csr_matrix(random_counts(rng, 70, 60))
    gene_ids, sets = [gene_id(i) for i in range(60)], np.sort(rng.integers(0, 3, 70))
    data = write(Cells(counts, gene_ids, sets.astype(np.int16), vocabulary_of(60)), tmp_path)
    tokens_h5ad(data)
    tokens_dense(data)
    ranks = anndata.read_h5ad(data.place("tokens_h5ad")).X
    dense = np.load(tmp_path / "tokens_dense")
    assert np.array_equal(data.count_sums_N, np.asarray(counts.sum(1)).ravel())
    assert len(np.unique(data.keys_N)) == len(data) == 70
    for row, tokens in enumerate(np.split(data.tokens_T, data.offsets[1:-1])):
        assert tokens[0] == CLS
        assert (data.token_sums_N[row], data.num_tokens_N[row]) == (tokens.sum(), len(tokens))
        assert np.array_equal(ranks[row].data, tokens[1:])
        assert np.array_equal(ranks[row].indices, np.arange(len(tokens) - 1))
        assert np.array_equal(dense[row, : len(tokens)], tokens)
        assert np.all(dense[row, len(tokens) :] == PAD)


def test_peers_pad_and_mask_as_ours() -> None:
    cells = [np.arange(70, dtype=np.uint16), np.array([0, 9], np.uint16)]
    tokens = padded(cells)
    assert tokens.tolist() == [[*range(70), *[PAD] * 58], [0, 9, *[PAD] * 126]]
    assert torch.equal(padded([cell[1:] for cell in cells], with_cls=False), tokens)
    assert sums_of_padded(tokens).tolist() == [sum(range(70)) - PAD, 9]
    torch.manual_seed(0)
    tokens = padded([np.arange(5, 2052, dtype=np.uint16)] * 64, with_cls=False)
    tokens[:, 1500:] = PAD
    seen, labels = masked(tokens)
    predicted = labels != IGNORED
    assert torch.equal(labels[predicted], tokens[predicted])
    assert torch.equal(seen[~predicted], tokens[~predicted])
    assert not predicted[:, 0].any(), "[CLS] is never predicted"
    assert not predicted[:, 1500:].any()
    for found, share in (
        (predicted[:, 1:1500], 0.15),
        (seen[predicted] == MASK, 0.8),
        (seen[predicted] == tokens[predicted], 0.18),
    ):
        assert found.double().mean() == pytest.approx(share, abs=0.01)
    assert np.array_equal(sums_of_masked((seen, labels)), sums_of_padded(tokens))


def test_a_uniform_shuffle_measures_one_and_source_order_nothing() -> None:
    size = 64 * 64
    one, other = (np.random.default_rng(seed).permutation(size) for seed in (0, 1))
    uniform = pytest.approx(1, abs=0.05)
    assert shuffle(one, other, size) == {
        "blocks": uniform,
        "each_once": True,
        "epochs_differ": True,
    }
    sorted_rows = shuffle(np.arange(size), one, size)
    assert sorted_rows["blocks"] == pytest.approx(1 / 40, abs=0.01)  # one block, where 40 are usual
    assert not shuffle(one, one, size)["epochs_differ"]
    assert not shuffle(one, np.append(one[:-1], one[0]), size)["each_once"]


def test_rows_of_tflops() -> None:
    listed = {"model": ["106m", "10m"], "packing": ["padded", "packed"], "compile": ["auto"]}
    unset = dict.fromkeys(("precision", "attention_dropout", "micro_batch"))
    wanted = argparse.Namespace(**listed, **unset, attention=["te", "flash"])
    rows = tflops.grid(wanted, on_gpu=True)
    assert len(set(rows)) == len(rows) == 8
    assert rows[0] == Setting("106m", "bf16", "padded", "te", None, 16)
    assert rows[-1] == Setting("10m", "bf16", "packed", "flash", None, 32)
    padded = Setting("10m", "fp32", "padded", "sdpa", 0.0, 2)
    reasons = tflops.impossible([padded, rows[-1]], 2048, torch.device("cpu"))
    assert list(reasons) == [rows[-1]]
    assert "needs an NVIDIA GPU and 16 bits" in reasons[rows[-1]]
    wanted.model = None
    here = tflops.grid(wanted, on_gpu=False)
    found = {(row.model, row.precision, row.attention_dropout) for row in here}
    assert found == {("10m", "fp32", dropout) for dropout in (None, 0.0)}
    assert [row.micro_batch for row in here] == [1] * 4 + [2] * 4


def test_folders_of_cell_types_change_with_all_that_changes_figures(tmp_path: Path) -> None:
    train, config = tmp_path / "a.h5ad", tmp_path / "c.yaml"
    for path in (train, config):
        path.write_text("one")
    usual = {"settings": [], "steps": None, "ranks": 2, "seed": 0, "resamples": 9, "config": config}

    def name(**more: object) -> str:
        arguments = argparse.Namespace(**usual | more)
        model = cell_types._model((train,), [], arguments)
        return cell_types._types(train, tmp_path / model, arguments)

    changes = {"steps": 3, "settings": ["a=1"], "ranks": 1, "seed": 1, "resamples": 8}
    names = [name(), *(name(**{key: value}) for key, value in changes.items())]
    assert name() == names[0]
    config.write_text("other")
    names.append(name())
    os.utime(train, ns=(1, 1))
    names.append(name())
    assert len(set(names)) == len(names) == 8
