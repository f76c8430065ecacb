"""The report of a build as text: one row per input, the sum, and what was left out.

Manifest  ->  rows of cells (words)  ->  aligned for a console | Markdown
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geneformer_mcore.store.layout import Manifest

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
    return [_row(source) for source in manifest.sources]


def _row(source: dict[str, Any]) -> list[str]:
    genes = source["genes_known"] + source["genes_unknown"]
    passed_over = "".join(f" ({place} passed over)" for place in source["passed_over"])
    return [
        source["name"],
        f"{source['cells_in']:,}",
        f"{source['cells_stored']:,}",
        skipped_text(source["skipped"]),
        f"{source['genes_known']:,} of {genes:,} ({source['genes_known'] / max(1, genes):.1%})",
        f"{source['counts_covered']:.1%}",
        *(f"{source[f'tokens_{what}']:,.0f}" for what in ("mean", "p5", "median", "p95")),
        f"{source['cells_cut']:,}",
        source["counts_location"] + passed_over,
        f"var {source['gene_ids_location']}",
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
    """The whole store in a line."""
    rows = ", ".join(f"{split} {stop - start:,}" for split, (start, stop) in manifest.rows.items())
    return (
        f"{manifest.cells:,} cells ({rows}), {manifest.tokens:,} tokens, content "
        f"{manifest.content_hash[:12]}"
    )


def refused_lines(refused: Sequence[dict[str, str]], num_inputs: int) -> list[str]:
    """What to end with where inputs were left out; nothing where none was."""
    if not refused:
        return []
    head = f"error: {len(refused)} of {num_inputs} inputs are not in the store:"
    return [head, *(f"  {item['reason']}" for item in refused)]
