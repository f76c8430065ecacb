"""What cells become without a gene, or with it above all others: what launch/perturb.py does.

checkpoint + h5ad  ->  chosen cells -> survey -> perturbations, and controls to compare them with
                   ->  original and variants through the encoder -> shifts per cell
                   ->  mean over cells, p, q  ->  table | AnnData | plot
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from geneformer_mcore.config.sections import Pooling
from geneformer_mcore.distributed import collectives
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.inference import embed, encoder
from geneformer_mcore.inference.cells import ChosenCells, CountedCells, drawn, open_cells, rows_with
from geneformer_mcore.inference.embed import Choices
from geneformer_mcore.inference.encoder import Encoder
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import Progress, ProgressLine, no_progress
from geneformer_mcore.model.forward_only import DISPLACEMENT_COLUMNS
from geneformer_mcore.perturb import statistics
from geneformer_mcore.perturb.displacements import Job, of_all_cells
from geneformer_mcore.perturb.moved_genes import MovedGenes
from geneformer_mcore.perturb.perturbed_cells import Editor, Mode
from geneformer_mcore.perturb.question import (
    ALL_GENES,
    GeneNames,
    Perturbation,
    Question,
    Sets,
    distinct,
)
from geneformer_mcore.perturb.statistics import Controls, Survey, Tested, table
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.types import NUM_SPECIALS

MOST_BYTES = 16 << 30
"""Of the shifts of all cells and perturbations, on the first rank."""
COPIES = 2
"""Of them there: first of its own cells and of all, then of all and what is given out of them."""


@dataclass(frozen=True)
class Answer:
    """What was found, for files and notebooks.

    rows_N:       int64, the perturbed cells' rows in the input;  obs: these rows of its obs
    table:        a row per perturbation, see shift_table
    layers:       name -> float32 [cells, perturbations], NaN where a cell has none of the genes
    moved_genes:  see moved_genes; None unless asked for
    facts:        for uns;  lines: what a user should know
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
    """All that is known before the first cell is embedded.

    tested:   the perturbations asked for, and what of them is in the cells
    controls: those, and what they are compared with
    goal:     the cells of the goal, None without one
    total:    variants to come
    """

    cells: ChosenCells
    goal: ChosenCells | None
    names: GeneNames
    found: Survey
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
    """The answer, on the first of the ranks that are here; None on the others.

    Raises a GeneformerError for all that the user can mend.
    """
    pooling, precision = embed.checked(choices)
    layers = encoder.number_of_layer(choices.layer, model.config.model.num_layers)
    question.check()
    with ExitStack() as stack:
        cells = _counted(source, model, options)
        stack.callback(cells.close)
        prepared = _prepare(model, cells, cells.counts.name, question, options)
        engine = stack.enter_context(
            encoder.started(model, precision, choices.tokens_per_batch, layers)
        )
        line = stack.enter_context(ProgressLine("variants")) if shows_progress else None
        progress = line.update if line else no_progress
        moved = _moved(question, prepared, model)
        job = _job(engine, prepared, pooling, moved, progress)
        values_NPC = of_all_cells(job, progress)
        if moved is not None:
            moved.gather(engine.device)
        if values_NPC is None:
            return None
        facts = embed.facts_of_states(engine, choices, layers) | {"perturb": question.facts()}
        return _answer(question, prepared, values_NPC, moved, facts)


def _counted(source: Any, model: Pretrained, options: InputOptions) -> CountedCells:
    cells = open_cells(source, model.vocabulary, model.config.data.seq_length, options)
    if not isinstance(cells, CountedCells):
        cells.close()
        raise DataError(
            f"{source} is a token store, and a cell without a gene is ranked anew from its counts. "
            "Remedy: give the h5ad file of the cells."
        )
    return cells


def _prepare(
    model: Pretrained, cells: CountedCells, source: str, question: Question, options: InputOptions
) -> Prepared:
    mode = Mode(question.mode)
    here, goal, shared = _chosen(cells, source, question)
    names = GeneNames.of(cells, model.vocabulary, options.symbols)
    # First what costs nothing, and may be wrong.
    asked, lines = question.perturbations(names)
    found = statistics.survey(here, model.vocabulary.size)
    if found.num_cells == 0:
        raise DataError(
            f"{source}: none of the {len(here):,} cells has a gene that the model knows."
        )
    if question.top is not None:
        number = len(found.genes) if question.top == ALL_GENES else question.top
        asked += [names.single(token) for token in found.most_common(number)]
    asked, merged = distinct(asked, mode)
    tested = _tested(asked, here, found, model.vocabulary.size)
    _refuse_absent(tested, mode, found, source)
    everywhere = mode is Mode.overexpress
    drawn_controls = statistics.draw(
        asked, found, names, question.null, question.seed, NUM_SPECIALS, mode
    )
    _check_room(len(here), len(drawn_controls.all))
    editor = Editor(cells.encoder, cells.genes.token_of_column, mode, question.truncated)
    in_cells = _tested(drawn_controls.all, here, found, model.vocabulary.size).in_sentence_P
    total = found.num_cells * len(in_cells) if everywhere else int(in_cells.sum())
    lines = [*model.messages, *shared, *lines, *merged]
    return Prepared(here, goal, names, found, tested, drawn_controls, editor, total, lines)


def _chosen(
    cells: CountedCells, source: str, question: Question
) -> tuple[ChosenCells, ChosenCells | None, list[str]]:
    """(cells to perturb, those of the goal, what to say of them)."""
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
            raise DataError(
                f"{source}: all {len(rows):,} cells {_of(question.start)}are {question.goal}, so "
                "none is left to move toward it. Remedy: a file with other cells too, or another "
                "`start=` or `goal=`."
            )
        if question.start and len(others) < len(rows):
            lines.append(
                f"{len(rows) - len(others):,} of {len(rows):,} cells of {question.start} are "
                f"{question.goal} too: they count for the goal only"
            )
        rows = others
    return ChosenCells(cells, drawn(rows, question.max_cells, question.seed)), goal, lines


def _of(label: str) -> str:
    return f"of {label} " if label else ""


def _tested(
    asked: list[Perturbation], cells: ChosenCells, found: Survey, vocabulary_size: int
) -> Tested:
    first = np.array([perturbation.tokens[0] for perturbation in asked], np.int64)
    detected, in_sentence = found.detected_V[first], found.in_sentence_V[first]
    several = [n for n, perturbation in enumerate(asked) if len(perturbation.tokens) > 1]
    if several:
        sets = Sets([asked[number] for number in several], vocabulary_size)
        detected[several], in_sentence[several] = statistics.presence(cells, sets)
    return Tested(asked, detected, in_sentence)


def _refuse_absent(tested: Tested, mode: Mode, found: Survey, source: str) -> None:
    if mode is Mode.overexpress or tested.in_sentence_P.any():
        return
    named = ", ".join(each.name for each in tested.asked[:8])
    cut = int((tested.detected_P > 0).sum())
    more = f" ({cut} of them are detected, below the place where sentences are cut)" if cut else ""
    raise DataError(
        f"{source}: of the {found.num_cells:,} chosen cells none has {named} in its sentence"
        f'{more}, so nothing can be deleted. Remedy: other cells or genes, or `mode="overexpress"`.'
    )


def _check_room(num_cells: int, num_perturbations: int) -> None:
    needed = COPIES * 4 * len(DISPLACEMENT_COLUMNS) * num_cells * num_perturbations
    if needed > MOST_BYTES:
        raise ConfigError(
            f"{num_cells:,} cells x {num_perturbations:,} perturbations (controls included) need "
            f"{needed / 2**30:.1f} GiB of memory, and at most {MOST_BYTES / 2**30:.0f} GiB are "
            "taken. Remedy: a smaller `max_cells=`, or fewer genes at a time."
        )


def _moved(question: Question, prepared: Prepared, model: Pretrained) -> MovedGenes | None:
    if not question.moved:
        return None
    number = len(prepared.tested.asked)
    return MovedGenes(number, prepared.found.genes, model.vocabulary.size)


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
        vectors = encoder.per_cell(engine, prepared.goal, work, np.float32, progress)
        goal_H = collectives.from_first_rank(None if vectors is None else _mean(vectors))
        if goal_H is None:
            raise DataError("no cell of the goal has a gene that the model knows.")
    sets = Sets(prepared.controls.all, engine.pretrained.vocabulary.size)
    return Job(
        engine,
        prepared.cells,
        prepared.editor,
        sets,
        pooling,
        goal_H,
        moved,
        prepared.total,
    )


def _mean(vectors_NH: np.ndarray) -> np.ndarray | None:
    """float64 [H], of the cells that could be embedded; None if there is none."""
    known_NH = vectors_NH[~np.isnan(vectors_NH).any(axis=1)]
    return known_NH.mean(axis=0, dtype=np.float64) if len(known_NH) else None


def _answer(
    question: Question,
    prepared: Prepared,
    values_NPC: np.ndarray,
    moved: MovedGenes | None,
    facts: dict[str, Any],
) -> Answer:
    tested, names = prepared.tested, prepared.names
    columns = DISPLACEMENT_COLUMNS if question.goal else DISPLACEMENT_COLUMNS[:2]
    num_tested = len(tested.asked)
    layers = {
        name: np.ascontiguousarray(values_NPC[:, :num_tested, number])
        for number, name in enumerate(columns)
    }
    rows = table(tested, names, prepared.controls, values_NPC, bool(question.goal))
    most_moved = None if moved is None else moved.table(tested.asked, names, question.moved)
    facts["perturb"]["num_controls"] = len(prepared.controls.all) - num_tested
    cells = prepared.cells
    return Answer(cells.rows_N, cells.obs(), rows, layers, most_moved, facts, prepared.lines)
