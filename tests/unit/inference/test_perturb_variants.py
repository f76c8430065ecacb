"""Sentences without genes, or with genes in front: as if the cell had been so from the start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.inference.cells import CountedCell
from geneformer_mcore.perturbation.perturbed_cells import Editor, Mode
from geneformer_mcore.perturbation.question import GeneNames, Perturbation, Sets, distinct
from geneformer_mcore.tokenizer.rank_encoder import RankEncoder
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import CLS, NUM_SPECIALS
from tests.support.small_cells import gene_id, plain_tokens, vocabulary_of

NUM_GENES, SEQ_LENGTH = 300, 40
VOCABULARY = vocabulary_of(NUM_GENES)
COLUMNS = np.arange(NUM_GENES, dtype=np.int32) + NUM_SPECIALS


def ranked(
    counts: np.ndarray, columns: np.ndarray = COLUMNS, vocabulary: Vocabulary = VOCABULARY
) -> list[int]:
    return plain_tokens(counts, columns, vocabulary, SEQ_LENGTH).tolist()


def counted(counts: np.ndarray, *parts: Any) -> CountedCell:
    """A cell as ChosenCells gives it; parts are those of `ranked`."""
    entries = np.flatnonzero(counts).astype(np.int32)
    tokens = np.array(ranked(counts, *parts), np.uint16)
    return CountedCell(0, entries, counts[entries], tokens)


def editor(
    mode: Mode = Mode.delete,
    truncated: bool = False,
    columns: np.ndarray = COLUMNS,
    vocabulary: Vocabulary = VOCABULARY,
) -> Editor:
    return Editor(RankEncoder(vocabulary, SEQ_LENGTH), columns, mode, truncated)


def sentences(made: Editor, cell: CountedCell, *sets: tuple[int, ...]) -> list[list[int]]:
    found = made.variants(cell, [np.array(each, np.int32) for each in sets])
    assert found.offsets[0] == 0
    return [part.tolist() for part in np.split(found.tokens_T, found.offsets[1:-1])]


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_deleting_any_gene_is_ranking_without_it(density: float, rng: np.random.Generator) -> None:
    counts = rng.integers(1, 9, NUM_GENES) * (rng.random(NUM_GENES) < density).astype(np.float64)
    cell = counted(counts)
    assert (np.count_nonzero(counts) >= SEQ_LENGTH) == (density == 0.5)
    genes = [(int(token),) for token in cell.tokens_T[1:]]
    for (token,), found in zip(genes, sentences(editor(), cell, *genes), strict=True):
        less = counts.copy()
        less[token - NUM_SPECIALS] = 0
        assert found == ranked(less)


def test_equal_values_stand_as_rounding_has_them_without_the_gene() -> None:
    """Values equal on paper: 1 / 1.1 = 3 / 3.3. Which is larger in float64 depends on the total,
    so that to take a gene out of the ranking is not always to rank the cell without it."""
    medians = np.full(NUM_GENES, 50.0)
    medians[:20:2], medians[1:20:2] = 1.1, 3.3
    vocabulary = vocabulary_of(NUM_GENES, medians)
    counts = np.zeros(NUM_GENES)
    counts[:20:2], counts[1:20:2] = 1, 3
    made, gene, num_changed = editor(vocabulary=vocabulary), 100 + NUM_SPECIALS, 0
    for third in range(1, 60):
        counts[100] = third
        cell = counted(counts, COLUMNS, vocabulary)
        (found,) = sentences(made, cell, (gene,))
        less = np.where(np.arange(NUM_GENES) == 100, 0, counts)
        assert found == ranked(less, COLUMNS, vocabulary)
        num_changed += found != [token for token in cell.tokens_T.tolist() if token != gene]
    assert num_changed > 0


def test_a_gene_of_two_columns_loses_both(rng: np.random.Generator) -> None:
    columns = COLUMNS.copy()
    columns[7], columns[9] = columns[5], 0
    counts = np.ones(NUM_GENES) * (np.arange(NUM_GENES) < 20)
    (found,) = sentences(editor(columns=columns), counted(counts, columns), (5 + NUM_SPECIALS,))
    counts[[5, 7]] = 0
    assert found == ranked(counts, columns)


def test_truncated_takes_out_and_overexpressed_goes_in_front(rng: np.random.Generator) -> None:
    counts = rng.integers(1, 9, NUM_GENES).astype(np.float64)
    cell = counted(counts)
    whole = cell.tokens_T.tolist()
    assert len(whole) == SEQ_LENGTH
    first, last, outside = whole[1], whole[-1], max(set(COLUMNS.tolist()) - set(whole))
    found = sentences(editor(truncated=True), cell, (first,), (last, first), (outside,))
    assert found == [[CLS, *whole[2:]], [CLS, *whole[2:-1]], whole]
    found = sentences(editor(Mode.overexpress), cell, (last,), (outside,), (outside, last))
    fronts = ([last], [outside], [outside, last])
    assert found == [[CLS, *front, *whole[1 : -len(front)]] for front in fronts]


@pytest.mark.parametrize("truncated", [False, True])
def test_all_genes_deleted_leave_cls(truncated: bool) -> None:
    counts = 2.0 * np.isin(np.arange(NUM_GENES), [3, 4])
    genes = (3 + NUM_SPECIALS, 4 + NUM_SPECIALS)
    assert sentences(editor(truncated=truncated), counted(counts), genes) == [[CLS]]


def test_which_sets_a_sentence_has() -> None:
    sets = Sets([Perturbation("a", (5,)), Perturbation("b", (6, 7)), Perturbation("c", (8,))], 20)
    assert sets.in_sentence(np.array([0, 7, 5])).tolist() == [True, True, False]
    assert sets.in_sentence(np.array([0])).tolist() == [False, False, False]


def test_genes_go_by_many_names() -> None:
    vocabulary = VOCABULARY.from_medians(
        {gene_id(n): 1.0 for n in range(5)}, {gene_id(0): "AAA", gene_id(1): "BBB"}
    )
    names = GeneNames(vocabulary, {"CCC": 7, "BBB": 8}, {"DDD": gene_id(4), "EEE": "ENSG09"})
    by = {name: names.token(name) for name in ("AAA", "BBB", "CCC", "DDD", "EEE", gene_id(1))}
    assert by == {"AAA": 5, "BBB": 8, "CCC": 7, "DDD": 9, "EEE": 0, gene_id(1): 6}
    assert names.token(f"{gene_id(2)}.17") == 7
    assert [names.symbol(token) for token in (5, 7, 9)] == ["AAA", "CCC", gene_id(4)]
    with pytest.raises(DataError, match=r"1 of 2 genes .*: aaa \(near: AAA\)"):
        names.singles(["CCC", "aaa"])
    with pytest.raises(DataError, match=r"12 of 12 genes .* and 2 more"):
        names.singles([f"X{n}" for n in range(12)])
    found, lines = names.singles(["CCC", "AAA", gene_id(0), "CCC"])
    assert found == [Perturbation("CCC", (7,)), Perturbation("AAA", (5,))]
    assert lines == [f"{gene_id(0)}: the same gene as AAA, perturbed once"]
    found, lines = names.groups({"g": ["AAA", "NO", "AAA"]})
    assert found == [Perturbation("g", (5,))]
    assert lines == ["group g: 1 of 3 genes are not known: left out"]


@pytest.mark.parametrize("mode", list(Mode))
def test_equal_perturbations_are_made_once_and_reported(mode: Mode) -> None:
    asked = [("AAA", (5,)), ("up", (6, 7)), ("down", (7, 6)), ("again", (6, 7)), ("AAA", (5,)),
             ("AAA", (8,))]  # fmt: skip
    found, lines = distinct([Perturbation(*each) for each in asked], mode)
    # The order of genes counts where they are put in front.
    kept, skipped = (["down"], []) if mode is Mode.overexpress else ([], ["down"])
    assert [each.name for each in found] == ["AAA", "up", *kept, "AAA (2)"]
    assert found[1].tokens == (6, 7)
    assert lines == [f"{name}: the same genes as up: left out" for name in [*skipped, "again"]]
