"""From files of counts to a store.

    every file: opened, counts and genes found, names checked   (all problems before any work)
    then block by block:  counts  ->  rank tokens  ->  cells with a known gene  ->  StoreWriter

A report per source says what went in, what was left out and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_mcore.cells.corpus import InputOptions, find_genes
from geneformer_mcore.cells.counts import CountsFile
from geneformer_mcore.cells.genes import GeneMap, map_genes
from geneformer_mcore.cells.ranks import RankedCells, RankEncoder
from geneformer_mcore.cells.vocabulary import Vocabulary
from geneformer_mcore.errors import DataError
from geneformer_mcore.store.buckets import duplicate_error
from geneformer_mcore.store.keys import cell_keys
from geneformer_mcore.store.labels import label_columns, label_kinds, unify_kinds
from geneformer_mcore.store.layout import TOKENS, Manifest
from geneformer_mcore.store.split import RandomSplit, SplitRule
from geneformer_mcore.store.staging import check_target
from geneformer_mcore.store.writer import Progress, StoreWriter, no_progress

EMPTY = "no counts"
NO_KNOWN_GENE = "no gene of the vocabulary"


@dataclass(frozen=True)
class SourceReport:
    """What became of one input file; the manifest keeps it.

    cells_in, cells_stored, skipped:  skipped is {reason: cells}
    genes_*:                          see genes.GeneMap; genes_known are in the vocabulary
    counts_covered:                   share of all counts that known genes hold
    cells_cut:                        cells with more known genes than seq_length has room for
    tokens_mean, tokens_median:       tokens per stored cell, [CLS] included
    """

    name: str
    datasets: int
    counts_location: str
    passed_over: list[str]
    gene_ids_location: str
    genes_known: int
    genes_unknown: int
    genes_blank: int
    genes_repeated: int
    symbols_mapped: int
    obs_columns_left_out: list[str]
    cells_in: int
    cells_stored: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    counts_covered: float = 0.0
    cells_cut: int = 0
    tokens_mean: float = 0.0
    tokens_median: float = 0.0


@dataclass(frozen=True)
class Source:
    """An input file that was opened, and found fit to be stored."""

    path: Path
    num_cells: int
    kinds: Mapping[str, pa.DataType]
    gene_map: GeneMap


def build_store(
    paths: Sequence[str | Path],
    out: str | Path,
    vocabulary: Vocabulary,
    seq_length: int = 2048,
    options: InputOptions | None = None,
    split_rule: SplitRule | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Manifest:
    """Builds the store `out` from h5ad files; its rows do not depend on the order of `paths`.

    seq_length:  tokens per cell at most, [CLS] included
    Raises DataError, before any work, with every file that cannot be used; nothing is at `out`
    unless it returns.
    """
    options = options or InputOptions()
    encoder = RankEncoder(vocabulary, seq_length)
    # Refused early if the path is taken, before hours of reading.
    check_target(out, overwrite)
    sources = inspect_sources(paths, vocabulary, options)
    kinds = unify_kinds(source.kinds for source in sources)
    num_cells = sum(source.num_cells for source in sources)
    split_rule = split_rule or RandomSplit()
    with StoreWriter(
        out, vocabulary, seq_length, split_rule, kinds, num_cells, overwrite
    ) as writer:
        reports, done = [], 0
        for source in sources:
            ingest = _SourceIngest(source, encoder, options, writer.schema)
            for cells in ingest.tables():
                writer.add(cells)
                progress("tokenising", done + ingest.cells_read, num_cells)
            done += source.num_cells
            reports.append(ingest.report())
        reports.sort(key=lambda report: report.name)
        return writer.finish(
            [asdict(report) for report in reports], _sum_skipped(reports), progress
        )


def inspect_sources(
    paths: Sequence[str | Path], vocabulary: Vocabulary, options: InputOptions
) -> list[Source]:
    """Opens every file once. Raises one DataError that names every file at fault."""
    if not paths:
        raise DataError("no input file given. Remedy: name one h5ad file or more.")
    sources, problems = [], []
    for path in map(Path, paths):
        try:
            sources.append(_inspect(path, vocabulary, options))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return sources


def _inspect(path: Path, vocabulary: Vocabulary, options: InputOptions) -> Source:
    with options.open(path) as counts:
        genes = find_genes(counts, options, known=vocabulary.token_ids)
        allowed = options.allow_low_overlap, options.allow_no_overlap
        gene_map = map_genes(genes, vocabulary, str(path), *allowed)
        _check_names(counts)
        return Source(path, counts.num_cells, label_kinds(counts.obs), gene_map)


def dataset_ids(counts: CountsFile) -> list[str]:
    """The dataset of each cell: obs' `dataset_id`, where there is one, else the file's name."""
    stem = counts.path.name.removesuffix(".h5ad")
    if "dataset_id" not in counts.obs:
        return [stem] * counts.num_cells
    column = counts.obs["dataset_id"]
    missing = column.isna()
    return [stem if absent else str(name) for name, absent in zip(column, missing, strict=True)]


def _check_names(counts: CountsFile) -> None:
    names = list(zip(dataset_ids(counts), counts.cell_ids, strict=True))
    if len(set(names)) == len(names):
        return
    seen: set[tuple[str, str]] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{counts.path}: {duplicate_error(*name)}")
        seen.add(name)


class _SourceIngest:
    """One file on its way into a store, and the numbers of its report."""

    def __init__(
        self, source: Source, encoder: RankEncoder, options: InputOptions, schema: pa.Schema
    ) -> None:
        self._source, self._encoder, self._options = source, encoder, options
        self._schema = schema
        self.cells_read = 0
        self._lengths: list[np.ndarray] = []
        self._skipped: dict[str, int] = {}
        self._counts = self._known_counts = 0.0
        self._cells_cut = 0

    def tables(self) -> Iterator[pa.Table]:
        """The cells to store, a table per block."""
        with self._options.open(self._source.path) as counts:
            self._describe(counts)
            datasets = dataset_ids(counts)
            for block in counts.blocks():
                rows = slice(block.start, block.start + len(block))
                ranked = self._encoder.encode(block, self._source.gene_map.token_of_column)
                kept_N = self._count(ranked)
                table = self._table(counts, rows, ranked, datasets[rows])
                self.cells_read += len(block)
                yield table if kept_N.all() else table.filter(pa.array(kept_N))

    def _describe(self, counts: CountsFile) -> None:
        kept = set(self._source.kinds)
        genes = self._source.gene_map
        self._report = SourceReport(
            name=counts.path.name,
            datasets=len(set(dataset_ids(counts))),
            counts_location=counts.location,
            passed_over=list(counts.passed_over),
            gene_ids_location=genes.location,
            genes_known=genes.num_known,
            genes_unknown=genes.num_unknown,
            genes_blank=genes.num_blank,
            genes_repeated=genes.num_repeated,
            symbols_mapped=genes.num_mapped_symbols,
            obs_columns_left_out=[str(name) for name in counts.obs if name not in kept],
            cells_in=counts.num_cells,
        )

    def _count(self, ranked: RankedCells) -> np.ndarray:
        """bool [N], the cells to keep; adds the block to the report's numbers."""
        is_empty_N = ranked.n_genes_N == 0
        kept_N = ranked.n_known_N > 0
        for reason, number in (
            (EMPTY, int(is_empty_N.sum())),
            (NO_KNOWN_GENE, int((~kept_N & ~is_empty_N).sum())),
        ):
            if number:
                self._skipped[reason] = self._skipped.get(reason, 0) + number
        self._counts += float(ranked.n_counts_N.sum())
        self._known_counts += float(ranked.known_counts_N.sum())
        self._cells_cut += int((ranked.n_known_N > self._encoder.seq_length - 1).sum())
        self._lengths.append(np.diff(ranked.offsets)[kept_N])
        return kept_N

    def _table(
        self, counts: CountsFile, rows: slice, ranked: RankedCells, datasets: list[str]
    ) -> pa.Table:
        cell_ids = counts.cell_ids[rows]
        columns = {
            TOKENS: _token_column(ranked),
            "cell_id": pa.array(cell_ids, pa.large_string()),
            "dataset_id": pa.array(datasets, pa.large_string()),
            "cell_key": pa.array(cell_keys(datasets, cell_ids)),
            "n_counts": pa.array(ranked.n_counts_N),
            "n_genes": pa.array(ranked.n_genes_N),
            "n_tokens": pa.array(np.diff(ranked.offsets).astype(np.int32)),
        }
        labels = {name: self._schema.field(name).type for name in self._schema.names}
        labels = {name: kind for name, kind in labels.items() if name not in columns}
        return pa.table({**columns, **label_columns(counts.obs.iloc[rows], labels)})

    def report(self) -> SourceReport:
        """The report, once all tables were taken."""
        lengths = np.concatenate(self._lengths)
        return replace(
            self._report,
            cells_stored=len(lengths),
            skipped=self._skipped,
            counts_covered=self._known_counts / self._counts if self._counts else 0.0,
            cells_cut=self._cells_cut,
            tokens_mean=float(lengths.mean()) if len(lengths) else 0.0,
            tokens_median=float(np.median(lengths)) if len(lengths) else 0.0,
        )


def _token_column(ranked: RankedCells) -> pa.LargeBinaryArray:
    tokens = ranked.tokens_T.astype("<u2", copy=False)
    buffers = [None, pa.py_buffer(ranked.offsets * 2), pa.py_buffer(tokens)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ranked), buffers)


def _sum_skipped(reports: Sequence[SourceReport]) -> dict[str, int]:
    total: dict[str, int] = {}
    for report in reports:
        for reason, number in report.skipped.items():
            total[reason] = total.get(reason, 0) + number
    return total
