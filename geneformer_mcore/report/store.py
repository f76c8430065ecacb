"""Report of a token store: its inputs, skipped cells and cell lengths.

STORE/manifest.json  ->  report.json, report.md, lengths_NAME.png per input
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from geneformer_mcore.io.files import check_place, together, whole_file
from geneformer_mcore.report import figures
from geneformer_mcore.store.layout import Manifest
from geneformer_mcore.store.report import markdown_lines, skipped_text, sources_of, summary


def check_folder(folder: str | Path) -> None:
    """Raise DataError if no report can be written into `folder`."""
    check_place(Path(folder) / "report.json")


def write_report(store: str | Path, folder: str | Path) -> None:
    """Write the report of `store` into `folder`, over an existing one. Raises DataError if the
    store is none, or a file cannot be written."""
    manifest, folder = Manifest.load(store), Path(folder)
    sources = sources_of(manifest)
    plots = _plot_names([source.name for source in sources])
    content = {name: value for name, value in asdict(manifest).items() if name != "files"}
    with together():
        with whole_file(folder / "report.json") as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for source, name in zip(sources, plots, strict=True):
            figures.save_lengths(source, manifest.seq_length, folder / name)
        with whole_file(folder / "report.md") as partial:
            partial.write_text("\n".join(_markdown(manifest, plots)) + "\n", encoding="utf-8")


def _plot_names(names: list[str]) -> list[str]:
    """A distinct file name per input, as inputs in different folders may share a name."""
    found: list[str] = []
    for number, name in enumerate(names):
        plain = re.sub(r"[^\w.-]+", "_", name.removesuffix(".h5ad")).strip("_")
        plot = f"lengths_{plain}.png"
        found.append(f"lengths_{plain}_{number}.png" if plot in found else plot)
    return found


def _markdown(manifest: Manifest, plots: list[str]) -> list[str]:
    lines = ["# What became of the inputs", "", f"{summary(manifest)}.", ""]
    lines += [*markdown_lines(manifest), ""]
    lines += [f"Skipped over all inputs: {skipped_text(manifest.skipped)}.", ""]
    if manifest.refused:
        lines += ["## Left out altogether", ""]
        lines += [
            f"- `{item.get('name', '?')}`: {item.get('reason', '?')}" for item in manifest.refused
        ]
        lines += [""]
    lines += ["## Tokens per cell", ""]
    for source, plot in zip(sources_of(manifest), plots, strict=True):
        left_out = ", ".join(source.obs_columns_left_out) or "none"
        lines += [
            *(f"### {source.name}", ""),
            f"{source.datasets:,} data sets; genes: {source.genes_blank:,} without id, "
            f"{source.genes_repeated:,} repeated (summed), {source.symbols_mapped:,} mapped "
            f"from symbols; obs columns left out: {left_out}.",
            *("", f"![{source.name}]({plot})", ""),
        ]
    return lines
