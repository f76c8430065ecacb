"""Report of a build: per input, kept in the manifest, and as text.

InputSource, reports of its units  ->  report_source: SourceReport (kept in the manifest)
Manifest  ->  a row per input  ->  aligned for a console | Markdown
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from geneformer_mcore.io.schema import Count, Finite, Positive, Share, as_type
from geneformer_mcore.store.ingest.plan import UnitReport
from geneformer_mcore.store.ingest.sources import InputSource
from geneformer_mcore.store.layout import Manifest

_MOST_BINS = 128


@dataclass(frozen=True)
class Lengths:
    """cells: those with 0 to bin_tokens - 1 tokens, with bin_tokens to 2 bin_tokens - 1, ..."""

    bin_tokens: Positive
    cells: list[Count]


@dataclass(frozen=True)
class SourceReport:
    """Cells, genes and tokens of one input.

    skipped:                          {reason: cells}
    genes_*:                          see genes.GeneMap; genes_known are in the vocabulary
    counts_covered:                   share of all counts that known genes hold
    cells_cut:                        cells with more known genes than seq_length has room for
    tokens_mean, _median, _p5, _p95:  tokens per stored cell, [CLS] included: 5 % have at most p5
    lengths:                          stored cells by tokens
    """

    name: str
    datasets: Count
    counts_location: str
    passed_over: list[str]
    gene_ids_location: str
    genes_known: Count
    genes_unknown: Count
    genes_blank: Count
    genes_repeated: Count
    symbols_mapped: Count
    obs_columns_left_out: list[str]
    cells_in: Count
    cells_stored: Count
    skipped: dict[str, Count]
    counts_covered: Share
    cells_cut: Count
    tokens_mean: Finite
    tokens_median: Finite
    tokens_p5: Finite
    tokens_p95: Finite
    lengths: Lengths


def report_source(source: InputSource, units: Sequence[UnitReport]) -> SourceReport:
    """The report of one source from those of all its units, in their order."""
    lengths = np.sum([unit.lengths for unit in units], axis=0)
    counts = sum(unit.counts for unit in units)
    cells, tokens = int(lengths.sum()), sum(unit.tokens for unit in units)
    genes = source.gene_map
    return SourceReport(
        name=source.short_name,
        datasets=len(set().union(*(unit.datasets for unit in units))),
        counts_location=source.location,
        passed_over=list(source.passed_over),
        gene_ids_location=genes.location,
        genes_known=genes.num_known,
        genes_unknown=genes.num_unknown,
        genes_blank=genes.num_blank,
        genes_repeated=genes.num_repeated,
        symbols_mapped=genes.num_mapped_symbols,
        obs_columns_left_out=list(source.left_out),
        cells_in=source.num_cells,
        cells_stored=cells,
        skipped=sum_skipped(unit.skipped for unit in units),
        # Sums of scaled counts are rounded.
        counts_covered=min(1.0, sum(u.known_counts for u in units) / counts) if counts else 0.0,
        cells_cut=sum(unit.cells_cut for unit in units),
        tokens_mean=tokens / cells if cells else 0.0,
        tokens_median=_median(lengths),
        tokens_p5=_reached(lengths, 0.05),
        tokens_p95=_reached(lengths, 0.95),
        lengths=_binned(lengths),
    )


def sum_skipped(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """{reason: cells} over all parts, the reasons sorted."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(sorted(total.items()))


def _median(cells_of_length: np.ndarray) -> float:
    """The exact median of integers given by how often each occurs; 0 where there is none."""
    reached = np.cumsum(cells_of_length)
    number = int(reached[-1])
    if not number:
        return 0.0
    # The places of the middle one, or of the middle two.
    middle = np.searchsorted(reached, [(number - 1) // 2 + 1, number // 2 + 1])
    return float(middle.mean())


def _reached(cells_of_length: np.ndarray, share: float) -> float:
    """The least length that `share` of the cells do not exceed; 0 without cells."""
    reached = np.cumsum(cells_of_length)
    return float(np.searchsorted(reached, share * reached[-1])) if reached[-1] else 0.0


def _binned(cells_of_length: np.ndarray) -> Lengths:
    width = -(-len(cells_of_length) // _MOST_BINS)
    padded = np.pad(cells_of_length, (0, -len(cells_of_length) % width))
    return Lengths(width, padded.reshape(-1, width).sum(axis=1).tolist())


HEADINGS = (
    "input",
    "cells",
    "stored",
    "skipped",
    "genes known",
    "counts covered",
    "tokens mean",
    "5 %",
    "median",
    "95 %",
    "cut",
    "counts in",
    "gene ids in",
)
_TEXT = ("input", "skipped", "counts in", "gene ids in")


def source_rows(manifest: Manifest) -> list[list[str]]:
    """One row per stored input, with a value for each of HEADINGS."""
    return [_row(source) for source in sources_of(manifest)]


def sources_of(manifest: Manifest) -> list[SourceReport]:
    """The reports in a manifest, of any store. DataError for those of another version."""
    remedy = "build the store again; it can be trained on as it is"
    return [
        as_type(source, SourceReport, f"sources[{number}] of the store's manifest", remedy)
        for number, source in enumerate(manifest.sources)
    ]


def _row(source: SourceReport) -> list[str]:
    genes = source.genes_known + source.genes_unknown
    passed_over = "".join(f" ({place} passed over)" for place in source.passed_over)
    tokens = (source.tokens_mean, source.tokens_p5, source.tokens_median, source.tokens_p95)
    return [
        source.name,
        f"{source.cells_in:,}",
        f"{source.cells_stored:,}",
        skipped_text(source.skipped),
        f"{source.genes_known:,} of {genes:,} ({source.genes_known / max(1, genes):.1%})",
        f"{source.counts_covered:.1%}",
        *(f"{number:,.0f}" for number in tokens),
        f"{source.cells_cut:,}",
        source.counts_location + passed_over,
        f"var {source.gene_ids_location}",
    ]


def skipped_text(skipped: dict[str, int]) -> str:
    """ "2 no counts, 1 no gene of the vocabulary", or "0"."""
    return ", ".join(f"{number:,} {why}" for why, number in skipped.items()) or "0"


def source_lines(manifest: Manifest) -> list[str]:
    """The table for a console, headings first."""
    rows = [list(HEADINGS), *source_rows(manifest)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        columns = zip(HEADINGS, row, widths, strict=True)
        return "  ".join(
            text.ljust(width) if name in _TEXT else text.rjust(width)
            for name, text, width in columns
        ).rstrip()

    return [line(row) for row in rows]


def markdown_lines(manifest: Manifest) -> list[str]:
    """The same table in Markdown."""
    rules = [":--" if name in _TEXT else "--:" for name in HEADINGS]
    rows = [list(HEADINGS), rules, *source_rows(manifest)]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]


def summary(manifest: Manifest) -> str:
    """One line about the whole store."""
    rows = ", ".join(f"{split} {stop - start:,}" for split, (start, stop) in manifest.rows.items())
    return (
        f"{manifest.cells:,} cells ({rows}), {manifest.tokens:,} tokens, content "
        f"{manifest.content_hash[:12]}"
    )


def refused_lines(refused: Sequence[dict[str, str]], num_inputs: int) -> list[str]:
    """The last lines of a command: inputs that were left out; [] if none was."""
    if not refused:
        return []
    head = f"error: {len(refused)} of {num_inputs} inputs are not in the store:"
    return [head, *(f"  {item['reason']}" for item in refused)]
