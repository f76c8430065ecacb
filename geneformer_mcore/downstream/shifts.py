"""Every variant of every chosen cell through the encoder, many to a batch, on all ranks.

chosen cells, dealt to data-parallel ranks
  -> as many as fit a batch: embedded once, their states kept
  -> their variants, one after the other -> some batches' worth -> packed -> shifts
  -> [cells, perturbations, COLUMNS], on the rank that had the cell
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from geneformer_mcore.contracts import CellViews, RaggedCells
from geneformer_mcore.downstream import encoder
from geneformer_mcore.downstream.chosen_cells import ChosenCells, CountedCell, ragged
from geneformer_mcore.downstream.encoder import Encoder
from geneformer_mcore.downstream.moved_genes import MovedGenes
from geneformer_mcore.downstream.perturbations import Sets
from geneformer_mcore.downstream.variants import Editor, Mode
from geneformer_mcore.errors import DataError, GeneformerError
from geneformer_mcore.model import shifts
from geneformer_mcore.model.shifts import COLUMNS, Originals, Variants
from geneformer_mcore.model.states import Pooling
from geneformer_mcore.parallel import collectives
from geneformer_mcore.store.progress import Progress

BLOCK_CELLS = 32
"""Neighbouring cells that are dealt to one rank together, at most."""
CHUNK_BATCHES = 8
"""Batches that are made and sent through the encoder together: enough to pack well."""
GATHERED_VALUES = 1 << 24
"""Numbers that ranks send to the first one at once, about."""


@dataclass(frozen=True)
class Job:
    """What is asked of the encoder.

    sets:     the genes of every perturbation
    goal_H:   the vector that cells may move toward, or None
    moved:    where the shifts of single genes are added up, or None
    total:    variants there are of all cells, for the progress line
    """

    engine: Encoder
    cells: ChosenCells
    editor: Editor
    sets: Sets
    pooling: Pooling
    goal_H: np.ndarray | None
    moved: MovedGenes | None
    total: int


def of_all_cells(job: Job, progress: Progress) -> np.ndarray | None:
    """On rank 0 float32 [cells, perturbations, COLUMNS], NaN where a cell has none of the genes;
    None on the other ranks. Every rank raises what any rank met."""
    places: list[int] = []
    values: list[np.ndarray] = []
    problem = ""
    try:
        for cell, found_PC in _of_this_rank(job, progress):
            places.append(cell)
            values.append(found_PC)
    except GeneformerError as error:
        problem = str(error)
    problem = collectives.first_problem(problem)
    if problem:
        raise DataError(problem)
    shape = (len(values), len(job.sets) * len(COLUMNS))
    values_NW = np.stack(values).reshape(shape) if values else np.empty(shape, np.float32)
    if not job.engine.holds_states:
        places, values_NW = [], values_NW[:0]
    gathered = _gathered(np.array(places, np.int64), values_NW, job)
    return None if gathered is None else gathered.reshape(len(job.cells), len(job.sets), -1)


def _gathered(places_N: np.ndarray, values_NW: np.ndarray, job: Job) -> np.ndarray | None:
    rows, parts = max(1, GATHERED_VALUES // values_NW.shape[1]), []
    for start in range(0, len(job.cells), rows):
        stop = min(start + rows, len(job.cells))
        here = slice(*np.searchsorted(places_N, (start, stop)))
        parts.append(
            collectives.rows_on_first_rank(
                places_N[here] - start, values_NW[here], stop - start, job.engine.device
            )
        )
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


def _of_this_rank(job: Job, progress: Progress) -> Iterator[tuple[int, np.ndarray]]:
    """(place, float32 [perturbations, COLUMNS]) of the cells of this rank, in their order."""
    topology, total = job.engine.topology, len(job.cells)
    size = max(1, min(BLOCK_CELLS, -(-total // topology.data_size)))
    done = 0
    for start in range(topology.data_rank * size, total, topology.data_size * size):
        counted = job.cells.counted(start, min(start + size, total))
        for cells in _fitting(counted, job.engine.tokens_per_batch):
            shape = (len(cells), len(job.sets), len(COLUMNS))
            values_NPC = np.full(shape, np.nan, np.float32)
            for number in _block(job, cells, values_NPC):
                done += number
                # Of all ranks: each has done about as much as this one.
                progress("perturbing", min(job.total, done * topology.data_size), job.total)
            yield from zip((cell.place for cell in cells), values_NPC, strict=True)


def _fitting(cells: Iterator[CountedCell], budget: int) -> Iterator[list[CountedCell]]:
    """Cells by as many as fit a batch."""
    here: list[CountedCell] = []
    used = 0
    for cell in cells:
        if here and used + len(cell.tokens_T) > budget:
            yield here
            here, used = [], 0
        here.append(cell)
        used += len(cell.tokens_T)
    if here:
        yield here


def _block(job: Job, cells: list[CountedCell], values_NPC: np.ndarray) -> Iterator[int]:
    """Fills in the values of cells whose originals fit one batch; gives how many are new."""
    known = [number for number, cell in enumerate(cells) if len(cell.tokens_T) > 1]
    if not known:
        return
    sentences = ragged([cells[number].tokens_T for number in known])
    engine = job.engine
    _, (batch,) = encoder.batches(engine, _views(sentences), encoder.nothing_hidden(engine))
    goal_H = None if job.goal_H is None else torch.from_numpy(job.goal_H).to(engine.device)
    before = shifts.originals(engine.stages, batch, job.pooling, goal_H)
    chunk = _Chunk()
    for number, start in zip(known, sentences.offsets.tolist(), strict=False):
        for part in _variants(job, cells[number], known.index(number), int(start)):
            chunk.add(part, number)
            if chunk.num_tokens >= CHUNK_BATCHES * engine.tokens_per_batch:
                yield _encode(job, chunk, before, values_NPC)
                chunk = _Chunk()
    if chunk.parts:
        yield _encode(job, chunk, before, values_NPC)


@dataclass(frozen=True)
class _Part:
    """Some variants of one cell.

    original:   the cell's number among those of its batch
    which_N:    the perturbation of each variant
    places_T:   see model.shifts.Variants
    """

    original: int
    which_N: np.ndarray
    sentences: RaggedCells
    places_T: np.ndarray


@dataclass
class _Chunk:
    """Parts that are encoded together, and the row of the values that each belongs to."""

    parts: list[_Part] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, part: _Part, row: int) -> None:
        self.parts.append(part)
        self.rows.append(row)
        self.num_tokens += len(part.sentences.tokens_T)


def _variants(job: Job, cell: CountedCell, original: int, start: int) -> Iterator[_Part]:
    """The variants of one cell, some at a time; start: where its states begin."""
    everything = job.editor.mode is Mode.overexpress
    which = np.arange(len(job.sets))
    which = which if everything else which[job.sets.in_sentence(cell.tokens_T)]
    place_of = np.full(job.engine.pretrained.vocabulary.size, -1, np.int64)
    place_of[cell.tokens_T] = start + np.arange(len(cell.tokens_T))
    longest = max(len(cell.counts_E), len(cell.tokens_T))
    step = max(1, CHUNK_BATCHES * job.engine.tokens_per_batch // longest)
    for first in range(0, len(which), step):
        some = which[first : first + step]
        made = job.editor.variants(cell, [job.sets.tokens[number] for number in some])
        # Of a cell that lost all its genes nothing is left to embed.
        kept = np.flatnonzero(made.lengths > 1)
        if len(kept):
            sentences = _views(made).part(kept).ragged()
            places_T = place_of[sentences.tokens_T]
            places_T[sentences.offsets[:-1]] = -1  # [CLS] is no gene.
            yield _Part(original, some[kept], sentences, places_T)


def _encode(job: Job, chunk: _Chunk, before: Originals | None, values_NPC: np.ndarray) -> int:
    """Sends a chunk through the encoder; gives its number of variants."""
    device = job.engine.device
    which_N = np.concatenate([part.which_N for part in chunk.parts])
    sizes = [len(part.which_N) for part in chunk.parts]
    rows_N = np.repeat(chunk.rows, sizes)
    originals_N = np.repeat([part.original for part in chunk.parts], sizes)
    lengths_N = np.concatenate([part.sentences.lengths for part in chunk.parts])
    starts_N = np.cumsum(lengths_N) - lengths_N
    tokens_T = np.concatenate([part.sentences.tokens_T for part in chunk.parts])
    places_T = np.concatenate([part.places_T for part in chunk.parts])
    views = CellViews(tokens_T, starts_N, lengths_N, np.arange(len(which_N), dtype=np.uint64))
    bins, batches = encoder.batches(job.engine, views, encoder.nothing_hidden(job.engine))
    inside = [np.concatenate([np.arange(starts_N[v], starts_N[v] + lengths_N[v]) for v in members])
              for members in bins]  # fmt: skip
    variants = [
        Variants(
            batch,
            torch.from_numpy(originals_N[members]).to(device),
            torch.from_numpy(places_T[tokens]).to(device),
        )
        for batch, members, tokens in zip(batches, bins, inside, strict=True)
    ]
    found = shifts.of_variants(job.engine.stages, variants, before, job.pooling)
    for members, tokens, (values_NC, moved_T) in zip(bins, inside, found, strict=False):
        values_NPC[rows_N[members], which_N[members]] = values_NC.cpu().numpy()
        if job.moved is not None and job.engine.holds_states:
            owners_T = np.repeat(which_N[members], lengths_N[members])
            job.moved.add(owners_T, tokens_T[tokens], moved_T.cpu().numpy())
    return len(which_N)


def _views(cells: RaggedCells) -> CellViews:
    return CellViews(cells.tokens_T, cells.offsets[:-1], cells.lengths, cells.keys_N)
