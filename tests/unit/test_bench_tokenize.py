"""benchmarks/tokenize.py: the other ways are what they are said to be, exact lists are exact."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from benchmarks import tokenize
from benchmarks.peers.bionemo_tokeniser import BioNeMoTokeniser
from benchmarks.peers.exact_tokens import exact_tokens
from benchmarks.peers.hf_tokeniser import HFTokeniser, blocks
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.contracts import CLS, NUM_SPECIALS
from tests.small_cells import gene_id, plain_tokens, random_counts, vocabulary_of

NUM_GENES = 400


@pytest.fixture
def untied(rng: np.random.Generator) -> tuple[sparse.csr_matrix, np.ndarray, Vocabulary]:
    """Cells without a tie, some of their genes without a token."""
    vocabulary = vocabulary_of(NUM_GENES, 0.1 + rng.random(NUM_GENES))
    columns = np.arange(NUM_SPECIALS, NUM_SPECIALS + NUM_GENES, dtype=np.int32)
    columns[rng.random(NUM_GENES) < 0.2] = 0
    return random_counts(rng, 50, NUM_GENES, density=0.4), columns, vocabulary


@pytest.fixture
def tied(rng: np.random.Generator) -> tuple[sparse.csr_matrix, np.ndarray, Vocabulary]:
    """Cells full of ties: small counts, all medians 1."""
    counts = sparse.csr_matrix(rng.integers(0, 3, (30, NUM_GENES)).astype(np.float32))
    columns = np.arange(NUM_SPECIALS, NUM_SPECIALS + NUM_GENES, dtype=np.int32)
    return counts, columns, vocabulary_of(NUM_GENES, np.ones(NUM_GENES))


@pytest.mark.parametrize("seq_length", [5, 2048])
@pytest.mark.parametrize("cells", ["untied", "tied"])
def test_the_exact_lists_are_those_of_the_reference(
    request: pytest.FixtureRequest, cells: str, seq_length: int
) -> None:
    counts, columns, vocabulary = request.getfixturevalue(cells)
    lists = exact_tokens(counts, columns, vocabulary.medians_of_token, seq_length)
    for found, row in zip(lists, counts.toarray().astype(np.float64), strict=True):
        assert np.array_equal(found, plain_tokens(row, columns, vocabulary, seq_length))


@pytest.mark.parametrize("seq_length", [5, 2048])
def test_without_ties_every_way_gives_the_exact_lists(
    untied: tuple[sparse.csr_matrix, np.ndarray, Vocabulary], seq_length: int
) -> None:
    counts, columns, vocabulary = untied
    medians = vocabulary.medians_of_token
    exact = exact_tokens(counts, columns, medians, seq_length)
    known = {gene_id(i): int(token) for i, token in enumerate(columns) if token}
    bionemo = BioNeMoTokeniser(
        [gene_id(i) for i in range(NUM_GENES)],
        known,
        {gene: float(medians[token]) for gene, token in known.items()},
        seq_length,
    )
    hf = HFTokeniser(columns, medians, seq_length)
    for encode in (hf.by_rows, hf.lean, bionemo.encode):
        assert tokenize.num_different(encode(counts), exact) == 0


def test_a_stable_sort_gives_the_exact_lists_with_ties(
    tied: tuple[sparse.csr_matrix, np.ndarray, Vocabulary],
) -> None:
    counts, columns, vocabulary = tied
    medians = vocabulary.medians_of_token
    exact = exact_tokens(counts, columns, medians, 2048)
    stable = HFTokeniser(columns, medians, 2048, stable=True)
    assert tokenize.num_different(stable.lean(counts), exact) == 0
    assert tokenize.num_different(stable.by_rows(counts), exact) == 0
    for ranked, row in zip(
        HFTokeniser(columns, medians, 2048).lean(counts), counts.toarray(), strict=True
    ):
        assert ranked[0] == CLS
        assert np.all(np.diff(row[ranked[1:] - NUM_SPECIALS]) <= 0), "ranked, whatever the ties"


def test_blocks_hold_every_row_once() -> None:
    counts = sparse.csr_matrix(np.eye(1100, dtype=np.float32))
    parts = blocks(counts)
    assert [part.shape[0] for part in parts] == [512, 512, 76]
    assert (sparse.vstack(parts) != counts).nnz == 0


def test_different_cells_are_counted() -> None:
    exact = [np.array([0, 5, 6]), np.array([0, 7])]
    assert tokenize.num_different(exact, exact) == 0
    assert tokenize.num_different([np.array([0, 6, 5]), np.array([0])], exact) == 2


def test_goals_are_our_rate_over_theirs() -> None:
    rates = {tokenize.OURS: 80.0, tokenize.BY_ROWS: 8.0, tokenize.LEAN: 16.0}
    goals = tokenize.goals_of([tokenize.Row(name, rate, 0, 0, []) for name, rate in rates.items()])
    assert [(goal.value, goal.met) for goal in goals] == [(10.0, True), (5.0, False)]


def test_a_list_of_ours_that_is_not_exact_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        tokenize.Row(name, 1.0, 1.0, 1 if name == tokenize.OURS else 0, [])
        for name in (tokenize.OURS, tokenize.BY_ROWS, tokenize.LEAN)
    ]
    arguments = argparse.Namespace(files=[], medians=None, cells=1, runs=1, json=None, png=None)
    monkeypatch.setattr(tokenize, "_arguments", lambda: arguments)
    monkeypatch.setattr(tokenize, "draw", lambda *_, **__: (None, None))
    monkeypatch.setattr(tokenize, "measure", lambda *_: rows)
    monkeypatch.setattr(tokenize, "about", lambda *_: "")
    assert tokenize.main() == 1


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "benchmarks" / "tokenize.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_it_measures_as_typed(repository: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "new" / "out.json", tmp_path / "out.png"
    small = ("--cells", "96", "--runs", "2", "--json", str(out), "--png", str(picture))
    ended = start(repository, *small)
    assert ended.returncode == 0, ended.stderr
    kept = json.loads(out.read_text())
    ours, *others = kept["rows"]
    assert (ours["name"], ours["cells_that_differ"]) == (tokenize.OURS, 0)
    assert [len(row["runs"]) for row in kept["rows"]] == [2] * 5
    assert kept["goals"][0]["value"] == ours["cells_per_s"] / others[0]["cells_per_s"]
    assert {"machine", "versions", "commit"} <= set(kept)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(bar >= 7 x)" in ended.stdout


def test_what_cannot_be_measured_is_refused(repository: Path) -> None:
    ended = start(repository, "--cells", "0", "--runs", "0")
    assert ended.returncode == 2
    assert "--cells must be at least 1, and is 0." in ended.stderr
    assert "--runs must be at least 1, and is 0." in ended.stderr
    assert "Traceback" not in ended.stderr
