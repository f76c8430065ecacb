#!/usr/bin/env python
"""Rate of deleting genes from cells, compared with one forward per variant padded to 2,048 tokens.

    python benchmarks/perturb.py CELLS.h5ad --medians gc30m_gene_medians.json

The job: 100 cells drawn at random and the 200 genes detected in most of them, each deleted from
every cell that has it; the shape of the 10M model, random weights, fp32 on a CPU, one thread. Cell
by cell in turns: ours on some genes through the code of launch/perturb.py; on fewer of the same a
padded forward each, with the logits of all positions, as Geneformer's own code computes them, and
without. Results are compared; times are wall-clock and CPU seconds, next to the operations.

    cells, vocabulary, settings -> model of random weights, twice: for packed and for padded cells
    packed      the job of one cell and some genes through perturbation/displacements.py
    one by one  each variant: padded to seq_length -> forward -> mean over genes -> 1 - cosine
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from geneformer_mcore.backends import ignore_known_warnings

    ignore_known_warnings()  # before what warns is imported

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from benchmarks.harness import common
from benchmarks.harness.peers.steps import our_stages
from geneformer_mcore.config import Config, load
from geneformer_mcore.config.sections import Attention, Pooling, Precision
from geneformer_mcore.data.collate import make_batch
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.exit_codes import run
from geneformer_mcore.inference import encoder
from geneformer_mcore.inference.cells import ChosenCells, CountedCell, CountedCells, drawn, ragged
from geneformer_mcore.inference.encoder import Encoder
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import no_progress
from geneformer_mcore.model import forward_only, megatron_config
from geneformer_mcore.model.flops import ModelShape, Workload, forward_flops
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.perturbation.displacements import Job, of_all_cells
from geneformer_mcore.perturbation.perturbed_cells import Editor, Mode
from geneformer_mcore.perturbation.question import Perturbation, Sets
from geneformer_mcore.perturbation.statistics import survey
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import Batch, CellViews

OURS, WHOLE = "packed, original once", "padded, a forward per variant"
STATES = "padded, a forward per variant, without the head"
BAR = 5.0
CLOCKS = {"wall clock": "variants_per_s", "CPU seconds": "variants_per_cpu_s"}
NUM_CELLS, NUM_GENES, SEED = 100, 200, 0


@dataclass
class Side:
    """Per turn: wall-clock and CPU seconds, variants, and the mean tokens of one."""

    name: str
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    variants: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def flops(self, shape: ModelShape, seq_length: int) -> float:
        """Floating-point operations per variant: of ours with a share of the original's forward, of
        the others of a forward of seq_length tokens."""
        if self.name != OURS:
            head = seq_length if self.name == WHOLE else 0
            return float(forward_flops(shape, Workload(seq_length, seq_length**2, head)))
        total = 0
        for length, variants in zip(self.tokens, self.variants, strict=True):
            original = forward_flops(shape, Workload(length + 1, (length + 1) ** 2, 0))
            total += original + variants * forward_flops(shape, Workload(length, length**2, 0))
        return total / sum(self.variants)

    def as_json(self, shape: ModelShape, seq_length: int) -> dict[str, Any]:
        """Every number; rates are over all turns."""
        return asdict(self) | {
            "variants_per_s": sum(self.variants) / sum(self.wall_s),
            "variants_per_cpu_s": sum(self.variants) / sum(self.cpu_s),
            "flops_per_variant": self.flops(shape, seq_length),
        }


def main() -> int:
    arguments = _arguments()
    problems = common.too_small(arguments, turns=1, sample=1, padded=1)
    if arguments.padded > arguments.sample:
        problems.append("--padded must not exceed --sample: they are some of the same variants.")
    common.refuse(problems, [arguments.json])
    vocabulary = Vocabulary.from_medians(json.loads(arguments.medians.read_text()))
    with prepared(arguments.cells, vocabulary) as ways:
        sides, apart = measure(ways, arguments)
        about = {
            "cells": NUM_CELLS,
            "genes": NUM_GENES,
            "variants_of_the_job": ways.job.total,
            "mean_tokens": ways.mean_tokens,
            "mean_tokens_measured": float(np.average(sides[0].tokens, weights=sides[0].variants)),
            "threads": torch.get_num_threads(),
            "sampled": {"cells": arguments.turns, "genes": arguments.sample},
            "largest_difference": apart,
            "data": arguments.cells.name,
        }
        shape = ModelShape.of(ways.config.model, vocabulary.size)
        content = in_json(sides, about, shape, ways.config.data.seq_length)
    print(*content["reading"], f"shifts differ by {apart:.1e} at most", sep="\n")
    common.save_results(arguments.json, content)
    return 0 if apart < 1e-5 else 1


def in_json(
    sides: list[Side], about: dict[str, Any], shape: ModelShape, seq_length: int
) -> dict[str, Any]:
    """The measurements, the goals by both clocks, and how to read them."""
    rows = [side.as_json(shape, seq_length) for side in sides]
    goals = [
        common.goal(f"{OURS} / {row['name']}, {clock}", rows[0][rate] / row[rate], BAR)
        for row in rows[1:]
        for clock, rate in CLOCKS.items()
    ]
    ours, *others = (row["flops_per_variant"] for row in rows)
    times = ", ".join(f"{other / ours:.2f} x" for other in others)
    mine, whole = about["mean_tokens_measured"], about["mean_tokens"]
    kind, favours = ("shorter", "ours") if mine < whole else ("longer", "the others")
    reading = [
        *map(common.goal_text, goals),
        f"operations of the measured variants, counted by model/flops.py: {times}",
        f"the measured cells are {kind} than those of the job ({mine:,.0f} against {whole:,.0f} "
        f"tokens per variant), which favours {favours}",
    ]
    return {"rows": rows, "goals": goals, "reading": reading, **about}


def measure(ways: Ways, arguments: argparse.Namespace) -> tuple[list[Side], float]:
    """All sides, ours first, and the largest difference between the shifts that they find."""
    rng = np.random.default_rng(SEED)
    apart, sides = 0.0, [Side(OURS), Side(WHOLE), Side(STATES)]
    for number, cell in enumerate(rng.permutation(len(ways.job.cells))[: arguments.turns + 1]):
        present = np.flatnonzero(ways.has_NP[cell])
        genes = np.sort(rng.choice(present, min(arguments.sample, len(present)), replace=False))
        few = genes[rng.permutation(len(genes))[: arguments.padded]]
        if number == 0:  # Not measured: the first call compiles and reserves.
            genes, few = genes[:4], genes[:1]
        given, tokens = ways.given(int(cell), few), ways.tokens_of(int(cell))
        with _timed(sides[0], len(genes), tokens):
            found = ways.packed(int(cell), genes)
        for side, with_head in zip(sides[1:], (True, False), strict=True):
            with _timed(side, len(few), tokens):
                expected = ways.one_by_one(*given, with_head)
            apart = max(apart, float(np.abs(found[np.searchsorted(genes, few)] - expected).max()))
        if number == 0:
            sides = [Side(side.name) for side in sides]
    return sides, apart


@contextmanager
def _timed(side: Side, variants: int, tokens: int) -> Iterator[None]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    side.wall_s.append(time.perf_counter() - wall_s)
    side.cpu_s.append(time.process_time() - cpu_s)
    side.variants.append(variants)
    side.tokens.append(tokens)


# Both ways


@dataclass(frozen=True)
class Ways:
    """Both ways, ready. One thread each.

    job:          the whole job, as ours does it
    stages:       of the model for padded cells
    tokens_P:     the genes to delete;  has_NP: bool, which cell has which
    mean_tokens:  of a variant of the job
    """

    config: Config
    job: Job
    stages: list[Geneformer]
    tokens_P: np.ndarray
    has_NP: np.ndarray
    mean_tokens: float

    def tokens_of(self, cell: int) -> int:
        """Of a variant of a cell that is no longer than the model takes."""
        return len(self._counted(cell).tokens_T) - 1

    def packed(self, cell: int, genes: np.ndarray) -> np.ndarray:
        """float64 [variants], 1 - cosine of each, by ours."""
        cells = self.job.cells
        alone = ChosenCells(cells.cells, cells.rows_N[[cell]])
        sets = _deletions(self.tokens_P[genes], self.job.engine.pretrained.vocabulary)
        found = of_all_cells(replace(self.job, cells=alone, sets=sets), no_progress)
        assert found is not None
        return found[0, :, 0].astype(np.float64)

    def given(self, cell: int, genes: np.ndarray) -> tuple[torch.Tensor, list[Batch]]:
        """Free input of `one_by_one`: the original's vector, and each variant's batch."""
        counted = self._counted(cell)
        made = self.job.editor.variants(counted, [self.tokens_P[[gene]] for gene in genes])
        vector_H = self._vector(self._batch(counted.tokens_T), with_head=False)
        sentences = np.split(made.tokens_T, made.offsets[1:-1])
        return vector_H, [self._batch(tokens) for tokens in sentences]

    def one_by_one(
        self, original_H: torch.Tensor, batches: list[Batch], with_head: bool
    ) -> np.ndarray:
        """The same by a forward per variant: with the logits of all positions, as a masked language
        model's forward gives them, or up to the states alone."""
        vectors = (self._vector(batch, with_head).double() for batch in batches)
        original = original_H.double()
        return np.array([1 - float(torch.cosine_similarity(each, original, 0)) for each in vectors])

    def _counted(self, cell: int) -> CountedCell:
        return next(iter(self.job.cells.counted(cell, cell + 1)))

    def _vector(self, batch: Batch, with_head: bool) -> torch.Tensor:
        def with_logits(hidden_SBH: torch.Tensor, batch: Batch, stage: Geneformer) -> torch.Tensor:
            stage.logits(hidden_SBH, torch.arange(batch.tokens_BS.numel()))
            return forward_only.pool(hidden_SBH, batch, Pooling.mean)

        if with_head:
            return forward_only.through(self.stages, [batch], with_logits)[0][0]
        return forward_only.cell_embeddings(self.stages, [batch], Pooling.mean)[0][0]

    def _batch(self, tokens_T: np.ndarray) -> Batch:
        cells = ragged([tokens_T])
        views = CellViews(cells.tokens_T, cells.offsets[:-1], cells.lengths, cells.keys_N)
        nothing, idle = encoder.no_masking(self.job.engine), np.ones(1, bool)
        return make_batch(views, np.zeros(1, np.int64), idle, nothing, self.config.data.seq_length)


@contextmanager
def prepared(path: Path, vocabulary: Vocabulary) -> Iterator[Ways]:
    """Draw the cells, take the most common genes, build both models."""
    config, _ = load(common.CONFIGS["10m"], ["train.precision=fp32", "data.packing=true"])
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.model.attention, config.model.fp32_residual = Attention.auto, True
    cells = CountedCells(str(path), vocabulary, config.data.seq_length, InputOptions())
    here = device.start()
    topology = groups.start(here, config.parallel)
    torch.set_num_threads(1)
    try:
        packed, padded = (_stages(config, vocabulary.size, here, way) for way in (True, False))
        chosen = ChosenCells(cells, drawn(np.arange(len(cells)), NUM_CELLS, SEED))
        genes = np.array(survey(chosen, vocabulary.size).most_common(NUM_GENES), np.int32)
        sets = _deletions(genes, vocabulary)
        sentences = [cell.tokens_T for cell in chosen.counted(0, len(chosen))]
        has_NP = np.stack([sets.in_sentence(tokens) for tokens in sentences])
        lengths = np.array([len(each) for each in sentences])
        editor = Editor(cells.encoder, cells.genes.token_of_column, Mode.delete, False)
        tokens = max(config.data.seq_length, encoder.TOKENS_ON_CPU)
        # As much of one as the encoder needs, with weights not trained.
        model = cast(Pretrained, SimpleNamespace(config=config, vocabulary=vocabulary))
        engine = Encoder(model, packed, topology, here, Precision.fp32, tokens)
        total = int(has_NP.sum())
        job = Job(engine, chosen, editor, sets, Pooling.mean, None, None, total)
        mean_tokens = float((has_NP.sum(axis=1) * (lengths - 1)).sum() / total)
        yield Ways(config, job, padded, genes, has_NP, mean_tokens)
    finally:
        groups.stop()
        cells.close()


def _deletions(tokens: np.ndarray, vocabulary: Vocabulary) -> Sets:
    return Sets([Perturbation("", (int(token),)) for token in tokens], vocabulary.size)


def _stages(config: Config, size: int, here: torch.device, packed: bool) -> list[Geneformer]:
    config = deepcopy(config)
    config.data.packing = packed
    core = megatron_config.transformer_config(config.model, config.parallel, Precision.fp32, here)
    return our_stages(config, core, here, size)


def _arguments() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("cells", type=Path, metavar="CELLS.h5ad")
    add("--medians", type=Path, required=True, help="{gene id: median} of the vocabulary")
    add("--turns", type=int, default=12, metavar="CELLS", help="cells measured (default: 12)")
    add("--sample", type=int, default=24, help="variants of each by ours (default: 24)")
    add("--padded", type=int, default=3, help="of these, padded ones too (default: 3)")
    add("--json", type=Path, metavar="OUT", help="keep the numbers here")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
