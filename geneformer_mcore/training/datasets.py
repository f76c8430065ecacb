"""From settings to cells and feeds.

data.source=tokens: token store  [-> flat copy in data.cache_dir]  ->  Cells  ->  feeds
data.source=counts: h5ad files, SOMA Experiments + data.vocabulary ->  Cells  ->  feeds
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from geneformer_mcore.backends import require
from geneformer_mcore.config import Config
from geneformer_mcore.config.sections import Loader, Source
from geneformer_mcore.data.collate import Collator, PermutedGenes, make_batch
from geneformer_mcore.data.loader import Feed, Share, budget
from geneformer_mcore.data.masking import Masking
from geneformer_mcore.data.sampler import Sampler
from geneformer_mcore.distributed.groups import Topology
from geneformer_mcore.errors import DataError
from geneformer_mcore.io.progress import ProgressLine
from geneformer_mcore.store import local_cache
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.store.split.table import SPLITS, RandomSplit, SplitRule, SplitTable
from geneformer_mcore.tokenizer.vocabulary import Vocabulary
from geneformer_mcore.types import TokenSource


@dataclass(frozen=True)
class RunCells:
    """All cells of a run, numbered, and the source to read them from.

    rows:        {split: (start, stop)}
    seq_length:  tokens to which the source truncates cells
    span_cells, window_spans:  of the Sampler
    names:       the cell ids of rows (int64 [N])
    mean_tokens: of a cell cut to data.seq_length, at least
    labels:      `cell_key` and a label column of all cells, by name; None if there are none
    """

    name: str
    vocabulary: Vocabulary
    content_hash: str
    rows: dict[str, tuple[int, int]]
    seq_length: int
    source: TokenSource
    span_cells: int
    window_spans: int
    names: Callable[[np.ndarray], list[str]]
    labels: Callable[[str], pa.Table] | None = None
    mean_tokens: float = 2.0

    def count(self, split: str) -> int:
        start, stop = self.rows[split]
        return stop - start


def open_cells(config: Config) -> RunCells:
    """The cells of a run. Writes the flat copy; DataError if they do not suit the settings."""
    cells = _counts(config) if config.data.source is Source.counts else _store(config)
    check_splits(config, cells)
    return cells


def check_splits(config: Config, cells: RunCells) -> None:
    """Raise DataError if there is nothing to train on, or to validate on where that is set."""
    if cells.count("train") == 0:
        raise DataError(f"{cells.name} has no training cells, so there is nothing to train on.")
    if config.train.validate_every_steps and cells.count("validation") == 0:
        raise DataError(
            f"{cells.name} has no validation cells, and train.validate_every_steps is "
            f"{config.train.validate_every_steps}. Set it to 0, or build the store with a "
            "share of its cells for validation."
        )


def _store(config: Config) -> RunCells:
    data = config.data
    store = TokenStore.open(data.store)
    manifest = store.manifest
    if data.seq_length > manifest.seq_length:
        raise DataError(
            f"data.seq_length ({data.seq_length}) exceeds the {manifest.seq_length} tokens to "
            f"which {store.path} cut its cells. Lower it, or build the store again with longer "
            "cells."
        )
    source: TokenSource = store
    if data.cache_dir:
        with ProgressLine("cells") as progress:
            source = local_cache.ensure(
                store, manifest.content_hash, manifest.tokens, data.cache_dir, progress.update
            )
    return RunCells(
        name=data.store,
        vocabulary=store.vocabulary,
        content_hash=manifest.content_hash,
        rows={split: store.rows(split) for split in manifest.rows},
        seq_length=manifest.seq_length,
        source=source,
        span_cells=data.span_cells,
        window_spans=data.window_spans,
        names=store.cell_ids,
        labels=store.labels,
        mean_tokens=_mean_tokens(manifest, data.seq_length),
    )


def _mean_tokens(manifest: Manifest, seq_length: int) -> float:
    """Tokens of a cell cut to `seq_length`, at least: min(n, s) >= n s / S for all n <= S."""
    return manifest.tokens / max(1, manifest.cells) * seq_length / manifest.seq_length


def _counts(config: Config) -> RunCells:
    from geneformer_mcore.data.counts_source import MIN_SPAN_CELLS, CountsSource, find_inputs

    data = config.data
    vocabulary = Vocabulary.load(data.vocabulary)
    rule: SplitRule = SplitTable.load(data.split) if data.split else RandomSplit()
    source = CountsSource(find_inputs(data.store), vocabulary, data.seq_length, rule)
    span_cells = max(data.span_cells, MIN_SPAN_CELLS)
    return RunCells(
        name=source.name,
        vocabulary=vocabulary,
        content_hash=source.content_hash,
        rows={split: source.rows(split) for split in SPLITS},
        seq_length=data.seq_length,
        source=source,
        span_cells=span_cells,
        # As many cells as with shorter spans, so memory is the same.
        window_spans=max(1, data.window_spans * data.span_cells // span_cells),
        names=source.cell_ids,
    )


def feed(config: Config, cells: RunCells, topology: Topology, device: torch.device) -> Feed:
    return split_feed(config, cells, "train", cells.source, topology, maker(config, device))


def validation_feeds(
    config: Config, cells: RunCells, topology: Topology, device: torch.device
) -> tuple[Feed, Feed]:
    """This rank's held-out cells, and the same with permuted genes, as a control."""
    shuffled = PermutedGenes(cells.source, config.train.seed, config.data.seq_length)
    make = maker(config, device)
    return (
        split_feed(config, cells, "validation", cells.source, topology, make),
        split_feed(config, cells, "validation", shuffled, topology, make),
    )


def split_feed(
    config: Config,
    cells: RunCells,
    split: str,
    source: TokenSource,
    topology: Topology,
    maker: Collator,
) -> Feed:
    """This rank's cells of a split, read from `source`."""
    data, train = config.data, config.train
    start, stop = cells.rows[split]
    # Validation reads few cells repeatedly: span by span, not a window of many.
    window_spans = cells.window_spans if split == "train" else 1
    masked, random, kept = data.mask_fractions
    return Feed(
        source,
        Sampler(start, stop - start, cells.span_cells, window_spans, train.seed),
        Masking(data.mask_probability, (masked, random, kept), cells.vocabulary.size, train.seed),
        Share(
            train.global_batch_size, train.micro_batch_size, topology.data_rank, topology.data_size
        ),
        data.seq_length,
        # Under sequence parallel, tensor ranks share the positions equally.
        int(np.lcm(data.pad_multiple, config.parallel.tensor)),
        maker,
        budget(config),
    )


def maker(config: Config, device: torch.device) -> Collator:
    """The collator of data.loader."""
    if config.data.loader is Loader.thread:
        return make_batch
    require("nvidia.dali")
    from geneformer_mcore.data.dali import DaliBatches

    return DaliBatches(device)
