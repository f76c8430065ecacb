"""Displacements of all perturbed cells: many to a batch, on all ranks.

chosen cells, assigned to data-parallel ranks
  -> as many as fit a batch: embedded once, their states kept
  -> their perturbed cells, some batches at a time -> packed -> shifts
  -> [cells, perturbations, COLUMNS], on the rank of the cell, then on rank 0
shift of every gene  ->  sums [perturbations, genes]  ->  over ranks  ->  table of most moved genes
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from geneformer_mcore.config.sections import Pooling
from geneformer_mcore.distributed import collectives
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.inference import encoder
from geneformer_mcore.inference.cells import ChosenCells, CountedCell, ragged
from geneformer_mcore.inference.encoder import Encoder
from geneformer_mcore.io.progress import Progress
from geneformer_mcore.model import forward_only
from geneformer_mcore.model.forward_only import DISPLACEMENT_COLUMNS, Originals, Variants
from geneformer_mcore.perturbation.perturbed_cells import Editor, Mode
from geneformer_mcore.perturbation.question import GeneNames, Perturbation, Sets
from geneformer_mcore.types import CellViews, RaggedCells

BLOCK_CELLS = 32
"""Most neighbouring cells that are assigned to one rank together."""
CHUNK_BATCHES = 8
"""Batches that are sent through the encoder together: enough to pack well."""
GATHERED_VALUES = 1 << 24
"""Numbers sent to the first rank at once, about."""
MOST_BYTES = 4 << 30
"""Limit of MovedGenes."""


@dataclass(frozen=True)
class Job:
    """Work of `of_all_cells`.

    sets:    the genes of every perturbation
    goal_H:  the vector of the goal, or None
    moved:   sums of the shifts of single genes, or None
    total:   number of perturbed cells, for the progress line
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
    """float32 [cells, perturbations, COLUMNS] on rank 0, NaN where a cell has none of the genes;
    None on other ranks. Every rank raises the error of any.

    Each rank holds the values of its own cells, and rank 0 those of all cells, too.
    """
    places_N = np.concatenate([np.empty(0, np.int64), *_of_this_rank(job)])
    shape = (len(job.sets), len(DISPLACEMENT_COLUMNS))
    values_NPC = np.full((len(places_N), *shape), np.nan, np.float32)
    with encoder.all_ranks_raise():
        _fill(job, values_NPC, progress)
        is_finite_N = np.array([not np.isinf(each_PC).any() for each_PC in values_NPC], bool)
        encoder.check_finite(job.engine, is_finite_N, job.cells.rows_N[places_N])
    if not job.engine.holds_states:
        places_N, values_NPC = places_N[:0], np.empty((0, *shape), np.float32)
    gathered_NW = _gathered(places_N, values_NPC.reshape(len(places_N), np.prod(shape)), job)
    return None if gathered_NW is None else gathered_NW.reshape(len(job.cells), *shape)


def _gathered(places_N: np.ndarray, values_NW: np.ndarray, job: Job) -> np.ndarray | None:
    """[cells, W] on rank 0, some rows at a time; None on other ranks."""
    total, width = len(job.cells), values_NW.shape[1]
    rows = max(1, GATHERED_VALUES // width)
    found_NW = None
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        here = slice(*np.searchsorted(places_N, (start, stop)))
        part_NW = collectives.rows_on_first_rank(
            places_N[here] - start, values_NW[here], stop - start, job.engine.device
        )
        if part_NW is not None:
            if found_NW is None:
                found_NW = np.empty((total, width), np.float32)
            found_NW[start:stop] = part_NW
    return found_NW


def _of_this_rank(job: Job) -> Iterator[np.ndarray]:
    """int64, ascending: the cells of this rank, in blocks of neighbours."""
    topology, total = job.engine.topology, len(job.cells)
    size = max(1, min(BLOCK_CELLS, -(-total // topology.data_size)))
    for start in range(topology.data_rank * size, total, topology.data_size * size):
        yield np.arange(start, min(start + size, total), dtype=np.int64)


def _fill(job: Job, values_NPC: np.ndarray, progress: Progress) -> None:
    """Fill `values_NPC` with the values of this rank's cells, in their order."""
    ranks, filled, done = job.engine.topology.data_size, 0, 0
    for block in _of_this_rank(job):
        counted = job.cells.counted(int(block[0]), int(block[-1]) + 1)
        for cells in _fitting(counted, job.engine.tokens_per_batch):
            here_NPC = values_NPC[filled : filled + len(cells)]
            for number in _block(job, cells, here_NPC):
                done += number
                # Of all ranks: each has done about as much as this one.
                progress("perturbing", min(job.total, done * ranks), job.total)
            filled += len(cells)


def _fitting(cells: Iterator[CountedCell], budget: int) -> Iterator[list[CountedCell]]:
    """Cells in groups that fit a batch."""
    group: list[CountedCell] = []
    used = 0
    for cell in cells:
        if group and used + len(cell.tokens_T) > budget:
            yield group
            group, used = [], 0
        group.append(cell)
        used += len(cell.tokens_T)
    if group:
        yield group


def _block(job: Job, cells: list[CountedCell], values_NPC: np.ndarray) -> Iterator[int]:
    """Fill in the values of cells whose originals fit one batch. Yields how many are new."""
    known = [number for number, cell in enumerate(cells) if len(cell.tokens_T) > 1]
    if not known:
        return
    sentences = ragged([cells[number].tokens_T for number in known])
    engine = job.engine
    _, (batch,) = encoder.batches(engine, _views(sentences), encoder.no_masking(engine))
    goal_H = None if job.goal_H is None else torch.from_numpy(job.goal_H).to(engine.device)
    before = forward_only.originals(engine.stages, batch, job.pooling, goal_H)
    chunk, num_tokens = [], 0
    starts = sentences.offsets[:-1].tolist()
    for original, (row, start) in enumerate(zip(known, starts, strict=True)):
        for part in _variants(job, cells[row], row, original, start):
            chunk.append(part)
            num_tokens += len(part.tokens_T)
            if num_tokens >= CHUNK_BATCHES * engine.tokens_per_batch:
                yield _encode(job, chunk, before, values_NPC)
                chunk, num_tokens = [], 0
    if chunk:
        yield _encode(job, chunk, before, values_NPC)


class _Part(NamedTuple):
    """Some perturbed cells.

    rows_N, which_N, originals_N:  row and perturbation of their values, number of the original
    lengths_N, tokens_T:           their tokens, end to end
    places_T:                      see forward_only.Variants
    """

    rows_N: np.ndarray
    which_N: np.ndarray
    originals_N: np.ndarray
    lengths_N: np.ndarray
    tokens_T: np.ndarray
    places_T: np.ndarray


def _variants(job: Job, cell: CountedCell, row: int, original: int, start: int) -> Iterator[_Part]:
    """The perturbed versions of one cell, some at a time. start: of its states."""
    which = np.arange(len(job.sets))
    if job.editor.mode is not Mode.overexpress:
        which = which[job.sets.in_sentence(cell.tokens_T)]
    place_of = np.full(job.engine.pretrained.vocabulary.size, -1, np.int64)
    place_of[cell.tokens_T] = start + np.arange(len(cell.tokens_T))
    longest = max(len(cell.counts_E), len(cell.tokens_T))
    step = max(1, CHUNK_BATCHES * job.engine.tokens_per_batch // longest)
    for first in range(0, len(which), step):
        some = which[first : first + step]
        made = job.editor.variants(cell, [job.sets.tokens[number] for number in some])
        # A cell that lost all its genes cannot be embedded.
        kept = np.flatnonzero(made.lengths > 1)
        if len(kept):
            perturbed = _views(made).part(kept).ragged()
            places_T = place_of[perturbed.tokens_T]
            places_T[perturbed.offsets[:-1]] = -1  # [CLS] is no gene.
            rows_N, originals_N = (np.full(len(kept), number) for number in (row, original))
            of_cells = (rows_N, some[kept], originals_N, perturbed.lengths)
            yield _Part(*of_cells, perturbed.tokens_T, places_T)


def _encode(job: Job, chunk: list[_Part], before: Originals | None, values_NPC: np.ndarray) -> int:
    """Send a chunk through the encoder. Returns its number of perturbed cells."""
    device = job.engine.device
    part = _Part(*map(np.concatenate, zip(*chunk, strict=True)))
    starts_N = np.cumsum(part.lengths_N) - part.lengths_N
    keys_N = np.arange(len(starts_N), dtype=np.uint64)
    views = CellViews(part.tokens_T, starts_N, part.lengths_N, keys_N)
    bins, batches = encoder.batches(job.engine, views, encoder.no_masking(job.engine))
    ranges = [
        np.arange(start, start + n) for start, n in zip(starts_N, part.lengths_N, strict=True)
    ]
    inside = [np.concatenate([ranges[number] for number in members]) for members in bins]
    variants = [
        Variants(
            batch,
            torch.from_numpy(part.originals_N[members]).to(device),
            torch.from_numpy(part.places_T[tokens]).to(device),
        )
        for batch, members, tokens in zip(batches, bins, inside, strict=True)
    ]
    found = forward_only.of_variants(job.engine.stages, variants, before, job.pooling)
    for members, tokens, (values_NC, moved_T) in zip(bins, inside, found, strict=False):
        # A shift of NaN is that of a cell without the gene; this one cannot be computed.
        values_NC[:, 0].nan_to_num_(nan=torch.inf)
        values_NPC[part.rows_N[members], part.which_N[members]] = values_NC.cpu().numpy()
        if job.moved is not None and job.engine.holds_states:
            owners_T = np.repeat(part.which_N[members], part.lengths_N[members])
            job.moved.add(owners_T, part.tokens_T[tokens], moved_T.cpu().numpy())
    return len(starts_N)


def _views(cells: RaggedCells) -> CellViews:
    return CellViews(cells.tokens_T, cells.offsets[:-1], cells.lengths, cells.keys_N)


class MovedGenes:
    """Shifts of single genes, summed over cells: of perturbations 0..number-1."""

    def __init__(self, number: int, genes_G: np.ndarray, vocabulary_size: int) -> None:
        """genes_G: int64, tokens of all genes of the cells. Raises ConfigError where the sums do
        not fit memory."""
        self.number, self.genes_G = number, genes_G
        needed = 2 * 8 * number * len(genes_G)
        if needed > MOST_BYTES:
            raise ConfigError(
                f"the shifts of {len(genes_G):,} genes under {number:,} perturbations need "
                f"{needed / 2**30:.1f} GiB of memory, and at most {MOST_BYTES / 2**30:.0f} GiB are "
                "taken for them. Remedy: fewer genes at a time, or no `gene_effects=`."
            )
        self._column_of = np.full(vocabulary_size, -1, np.int64)
        self._column_of[genes_G] = np.arange(len(genes_G))
        self._sums, self._cells = (np.zeros((number, len(genes_G))) for _ in range(2))

    def add(self, which_T: np.ndarray, tokens_T: np.ndarray, moved_T: np.ndarray) -> None:
        """Add the shifts (float32, NaN for none) of tokens under the perturbations `which_T`,
        ignoring those from `number` on."""
        counts = ~np.isnan(moved_T) & (which_T < self.number)
        at = (which_T[counts], self._column_of[tokens_T[counts]])
        np.add.at(self._sums, at, moved_T[counts])
        np.add.at(self._cells, at, 1)

    def gather(self, device: torch.device) -> None:
        """Sum over ranks, on the first one."""
        for values in (self._sums, self._cells):
            collectives.add_up_on_first_rank(values, device)

    def table(self, perturbations: list[Perturbation], names: GeneNames, most: int) -> pd.DataFrame:
        """The `most` moved genes of each perturbation, most moved first."""
        with np.errstate(invalid="ignore"):
            means = self._sums / self._cells
        frames = []
        for number, perturbation in enumerate(perturbations):
            order = np.argsort(-np.nan_to_num(means[number], nan=-1), kind="stable")[:most]
            order = order[self._cells[number, order] > 0]
            tokens = self.genes_G[order].tolist()
            columns = {
                "perturbation": perturbation.name,
                "feature_id": [names.id_of(token) for token in tokens],
                "gene": [names.symbol(token) for token in tokens],
                "n_cells": self._cells[number, order].astype(np.int64),
                "shift": means[number, order],
            }
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)
