"""In silico perturbation: genes deleted or overexpressed, the displacement of the cells measured.

checkpoint + h5ad  ->  chosen cells -> survey -> perturbations, and random controls
                   ->  original and perturbed cells through the encoder -> shifts per cell
                   ->  mean over cells, p, q  ->  table | AnnData | plot
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from geneformer_mcore.config.sections import Pooling
from geneformer_mcore.distributed import collectives
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.inference import encoder
from geneformer_mcore.inference.cells import (
    ChosenCells,
    CountedCells,
    coverage_lines,
    drawn,
    facts_of_cells,
    open_cells,
    rows_with,
)
from geneformer_mcore.inference.embed import Choices, facts_of_states, has_values
from geneformer_mcore.inference.encoder import Encoder
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import Progress
from geneformer_mcore.model.forward_only import DISPLACEMENT_COLUMNS
from geneformer_mcore.perturbation import statistics
from geneformer_mcore.perturbation.displacements import Job, MovedGenes, of_all_cells
from geneformer_mcore.perturbation.perturbed_cells import Editor, Mode
from geneformer_mcore.perturbation.question import (
    ALL_GENES,
    GeneNames,
    Perturbation,
    Question,
    Sets,
    distinct,
)
from geneformer_mcore.perturbation.statistics import Controls, Survey, Tested, table
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.types import NUM_SPECIALS

MOST_BYTES = 16 << 30
"""Limit of the shifts of all cells and perturbations, on the first rank."""
COPIES = 2
"""Of them there: of its own and all cells, then of all cells and the layers of the result."""


@dataclass(frozen=True)
class Answer:
    """Result of a Question.

    rows_N:       int64, the perturbed cells' rows in the input;  obs: these rows of its obs
    table:        a row per perturbation, see statistics.table
    layers:       name -> float32 [cells, perturbations], NaN where a cell has none of the genes
    moved_genes:  see displacements.MovedGenes; None unless requested
    facts:        for uns;  lines: notes for the user
    """

    rows_N: np.ndarray
    obs: pd.DataFrame
    table: pd.DataFrame
    layers: dict[str, np.ndarray]
    moved_genes: pd.DataFrame | None
    facts: dict[str, Any]
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """State before the first cell is embedded. total: number of perturbed cells to come."""

    cells: ChosenCells
    goal: ChosenCells | None
    names: GeneNames
    survey: Survey
    tested: Tested
    controls: Controls
    editor: Editor
    total: int
    lines: list[str]


def perturb(
    model: Pretrained,
    source: Any,
    question: Question,
    choices: Choices,
    options: InputOptions,
    shows_progress: bool,
) -> Answer | None:
    """The answer on the first rank, None on others. Raises a GeneformerError for the user's
    mistakes."""
    pooling, precision = choices.check()
    layers = encoder.number_of_layer(choices.layer, model.config.model.num_layers)
    question.check()
    with closing(_open(source, model, options)) as cells:
        prepared = _prepare(model, cells, cells.counts.name, question, options)
        with (
            encoder.started(model, precision, choices.tokens_per_batch, layers) as engine,
            encoder.progress_line("variants", shows_progress) as progress,
        ):
            moved = None
            if question.moved:
                number, genes_G = len(prepared.tested.asked), prepared.survey.genes
                moved = MovedGenes(number, genes_G, model.vocabulary.size)
            job = _job(engine, prepared, pooling, moved, progress)
            values_NPC = of_all_cells(job, progress)
            if moved is not None:
                moved.gather(engine.device)
            if values_NPC is None:
                return None
            facts = facts_of_states(engine, choices, layers) | {"perturb": question.facts()}
            prepared.lines.extend(coverage_lines(cells))
            return _answer(question, prepared, values_NPC, moved, facts | facts_of_cells(cells))


def _open(source: Any, model: Pretrained, options: InputOptions) -> CountedCells:
    cells = open_cells(source, model.vocabulary, model.config.data.seq_length, options)
    if not isinstance(cells, CountedCells):
        cells.close()
        raise DataError(
            f"{source} is a token store, and a cell without a gene is ranked again from its "
            "counts. Remedy: give the h5ad file of the cells."
        )
    return cells


def _prepare(
    model: Pretrained, cells: CountedCells, source: str, question: Question, options: InputOptions
) -> Prepared:
    mode, size = Mode(question.mode), model.vocabulary.size
    chosen, goal, shared = _chosen(cells, source, question)
    names = GeneNames.of(cells, model.vocabulary, options.symbols)
    # Wrong names are refused before all cells are read.
    asked, lines = question.perturbations(names)
    survey = statistics.survey(chosen, size)
    if survey.num_cells == 0:
        raise DataError(
            f"{source}: none of the {len(chosen):,} cells has a gene that the model knows."
        )
    if question.top is not None:
        number = len(survey.genes) if question.top == ALL_GENES else question.top
        asked += [names.single(token) for token in survey.most_common(number)]
    asked, merged = distinct(asked, mode)
    tested = _tested(asked, chosen, survey, size)
    _refuse_absent(tested, mode, survey, source)
    controls = statistics.draw(
        asked, survey, names, question.null, question.seed, NUM_SPECIALS, mode
    )
    _check_room(len(chosen), len(controls.all))
    editor = Editor(cells.encoder, cells.genes.token_of_column, mode, question.truncated)
    if mode is Mode.overexpress:
        total = survey.num_cells * len(controls.all)
    else:
        total = int(_tested(controls.all, chosen, survey, size).in_sentence_P.sum())
    lines = [*model.messages, *shared, *lines, *merged]
    return Prepared(chosen, goal, names, survey, tested, controls, editor, total, lines)


def _chosen(
    cells: CountedCells, source: str, question: Question
) -> tuple[ChosenCells, ChosenCells | None, list[str]]:
    """(cells to perturb, those of the goal, notes)."""
    rows = np.arange(len(cells), dtype=np.int64)
    obs = cells.obs() if question.start or question.goal else pd.DataFrame()
    if question.start:
        rows = rows_with(obs, question.start, source)
    goal, lines = None, []
    if question.goal:
        goal_rows = rows_with(obs, question.goal, source)
        goal = ChosenCells(cells, drawn(goal_rows, question.max_cells, question.seed))
        others = np.setdiff1d(rows, goal_rows)
        if not len(others):
            of_start = f"of {question.start} " if question.start else ""
            raise DataError(
                f"{source}: all {len(rows):,} cells {of_start}are {question.goal}, so none is left "
                "to move toward it. Remedy: a file with other cells too, or another `start=` or "
                "`goal=`."
            )
        if question.start and len(others) < len(rows):
            lines.append(
                f"{len(rows) - len(others):,} of {len(rows):,} cells of {question.start} are "
                f"{question.goal} too: they count for the goal only"
            )
        rows = others
    return ChosenCells(cells, drawn(rows, question.max_cells, question.seed)), goal, lines


def _tested(
    asked: list[Perturbation], cells: ChosenCells, survey: Survey, vocabulary_size: int
) -> Tested:
    first = np.array([perturbation.tokens[0] for perturbation in asked], np.int64)
    detected, in_sentence = survey.detected_V[first], survey.in_sentence_V[first]
    several = [n for n, perturbation in enumerate(asked) if len(perturbation.tokens) > 1]
    if several:
        sets = Sets([asked[number] for number in several], vocabulary_size)
        detected[several], in_sentence[several] = statistics.presence(cells, sets)
    return Tested(asked, detected, in_sentence)


def _refuse_absent(tested: Tested, mode: Mode, survey: Survey, source: str) -> None:
    if mode is Mode.overexpress or tested.in_sentence_P.any():
        return
    named = ", ".join(each.name for each in tested.asked[:8])
    cut = int((tested.detected_P > 0).sum())
    more = f" ({cut} of them are detected, below the place where sentences are cut)" if cut else ""
    raise DataError(
        f"{source}: of the {survey.num_cells:,} chosen cells none has {named} in its sentence"
        f"{more}, so nothing can be deleted. Remedy: other cells or genes, or "
        '`mode="overexpress"`.'
    )


def _check_room(num_cells: int, num_perturbations: int) -> None:
    needed = COPIES * 4 * len(DISPLACEMENT_COLUMNS) * num_cells * num_perturbations
    if needed > MOST_BYTES:
        raise ConfigError(
            f"{num_cells:,} cells x {num_perturbations:,} perturbations (controls included) need "
            f"{needed / 2**30:.1f} GiB of memory, and at most {MOST_BYTES / 2**30:.0f} GiB are "
            "taken. Remedy: a smaller `max_cells=`, or fewer genes at a time."
        )


def _job(
    engine: Encoder,
    prepared: Prepared,
    pooling: Pooling,
    moved: MovedGenes | None,
    progress: Progress,
) -> Job:
    goal_H = None
    if prepared.goal is not None:
        work = encoder.embedding(engine, pooling)
        values_NH = encoder.per_cell(engine, prepared.goal, work, np.float32, progress)
        known_NH = None if values_NH is None else values_NH[has_values(values_NH)]
        if known_NH is not None and len(known_NH):
            goal_H = known_NH.mean(axis=0, dtype=np.float64)
        goal_H = collectives.from_first_rank(goal_H)
        if goal_H is None:
            raise DataError("no cell of the goal has a gene that the model knows.")
    sets, total = Sets(prepared.controls.all, engine.pretrained.vocabulary.size), prepared.total
    return Job(engine, prepared.cells, prepared.editor, sets, pooling, goal_H, moved, total)


def _answer(
    question: Question,
    prepared: Prepared,
    values_NPC: np.ndarray,
    moved: MovedGenes | None,
    facts: dict[str, Any],
) -> Answer:
    tested, names, cells = prepared.tested, prepared.names, prepared.cells
    columns = DISPLACEMENT_COLUMNS if question.goal else DISPLACEMENT_COLUMNS[:2]
    num_tested = len(tested.asked)
    layers = {
        name: np.ascontiguousarray(values_NPC[:, :num_tested, number])
        for number, name in enumerate(columns)
    }
    rows = table(tested, names, prepared.controls, values_NPC, bool(question.goal))
    most_moved = None if moved is None else moved.table(tested.asked, names, question.moved)
    facts["perturb"]["num_controls"] = len(prepared.controls.all) - num_tested
    return Answer(cells.rows_N, cells.obs(), rows, layers, most_moved, facts, prepared.lines)
