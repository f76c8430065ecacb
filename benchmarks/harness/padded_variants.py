"""The two ways of benchmarks/perturb.py: packed as launch/perturb.py does, and padded one by one.

cells, vocabulary, settings  ->  model of random weights, twice: for packed and for padded cells
packed       the job of one cell and some genes through perturbation/displacements.py
one by one   each variant: padded to seq_length -> forward -> mean over genes -> 1 - cosine
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch

from benchmarks.harness.peers.steps import our_stages
from geneformer_mcore.config import Config, load
from geneformer_mcore.config.sections import Attention, Pooling, Precision
from geneformer_mcore.data.collate import make_batch
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.inference import encoder
from geneformer_mcore.inference.cells import ChosenCells, CountedCell, CountedCells, drawn, ragged
from geneformer_mcore.inference.encoder import Encoder
from geneformer_mcore.inference.pretrained import Pretrained
from geneformer_mcore.io.progress import no_progress
from geneformer_mcore.model import forward_only, megatron_config
from geneformer_mcore.model.flops import ModelShape
from geneformer_mcore.model.geneformer import Geneformer
from geneformer_mcore.perturbation.displacements import Job, of_all_cells
from geneformer_mcore.perturbation.perturbed_cells import Editor, Mode
from geneformer_mcore.perturbation.question import Perturbation, Sets
from geneformer_mcore.perturbation.statistics import survey
from geneformer_mcore.tokenizer.genes import InputOptions
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import NUM_SPECIALS, Batch, CellViews


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

    @property
    def shape(self) -> ModelShape:
        """Size of the model."""
        model, size = self.config.model, self.job.engine.pretrained.vocabulary.size
        return ModelShape(model.num_layers, model.hidden_size, model.ffn_hidden_size, size)

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
        nothing, one = Masking(0.0, (1.0, 0.0, 0.0), NUM_SPECIALS + 1, 0), np.ones(1)
        length = self.config.data.seq_length
        return make_batch(views, one.astype(np.int64), one > 0, nothing, length)


@contextmanager
def prepared(
    path: Path, vocabulary: Vocabulary, settings_of: Path, num_cells: int, num_genes: int, seed: int
) -> Iterator[Ways]:
    """Draw the cells, take the most common genes, build both models."""
    config, _ = load(settings_of, ["train.precision=fp32", "data.packing=true"])
    config.model.hidden_dropout = config.model.attention_dropout = 0.0
    config.model.attention, config.model.fp32_residual = Attention.auto, True
    cells = CountedCells(str(path), vocabulary, config.data.seq_length, InputOptions())
    here = device.start()
    topology = groups.start(here, config.parallel)
    torch.set_num_threads(1)
    try:
        packed, padded = (_stages(config, vocabulary.size, here, way) for way in (True, False))
        chosen = ChosenCells(cells, drawn(np.arange(len(cells)), num_cells, seed))
        genes = np.array(survey(chosen, vocabulary.size).most_common(num_genes), np.int32)
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
