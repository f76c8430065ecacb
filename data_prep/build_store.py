"""Builds a store of tokenised cells from h5ad files of counts."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from geneformer_mcore.commands import run

if TYPE_CHECKING:
    from geneformer_mcore.store.layout import Manifest

EXAMPLE = """example:
  python data_prep/build_store.py --out stores/mine --vocabulary vocabulary.json a.h5ad b.h5ad

Without --vocabulary, the genes and their medians are those of the input files. Counts are looked
for in layers["counts"], raw.X and X; gene ids in var's feature_id, ensembl_id, gene_ids and index.
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE.h5ad", help="files of counts")
    add("--out", required=True, metavar="STORE", help="the store's folder, which must not exist")
    add(
        "--vocabulary",
        metavar="FILE.json",
        help="genes and medians (import_dictionary.py makes one)",
    )
    add("--seq-length", type=int, default=2048, help="tokens per cell at most, [CLS] included")
    add("--layer", help="layer of the counts (default: counts, raw.X, X)")
    add("--symbols", metavar="FILE", help="{symbol: gene id} JSON or GENCODE csv(.gz)")
    add("--validation-fraction", type=float, default=0.05, help="of the cells, at random")
    add("--test-fraction", type=float, default=0.05, help="of the cells, at random")
    add("--overwrite", action="store_true", help="replace a store that is there")
    add(
        "--allow-normalised",
        action="store_true",
        help="values may be counts scaled per cell (not logarithms)",
    )
    add(
        "--allow-low-overlap",
        action="store_true",
        help="take files with under 10%% of their genes in the vocabulary",
    )
    return parser.parse_args()


def main() -> None:
    """Builds the store and prints what became of each file."""
    arguments = _parse()
    from geneformer_mcore.cells.corpus import InputOptions, build_vocabulary, describe_other_ids
    from geneformer_mcore.cells.genes import load_symbols
    from geneformer_mcore.cells.vocabulary import Vocabulary
    from geneformer_mcore.store.ingest import build_store
    from geneformer_mcore.store.progress import ProgressLine
    from geneformer_mcore.store.split import RandomSplit
    from geneformer_mcore.store.staging import check_target

    check_target(arguments.out, arguments.overwrite)
    started = time.monotonic()
    symbols = load_symbols(arguments.symbols) if arguments.symbols else {}
    options = InputOptions(
        arguments.layer, symbols, arguments.allow_normalised, arguments.allow_low_overlap
    )
    split = RandomSplit(arguments.validation_fraction, arguments.test_fraction)
    if arguments.vocabulary:
        vocabulary = Vocabulary.load(arguments.vocabulary)
    else:
        vocabulary = build_vocabulary(arguments.inputs, options)
        options = options.with_own_vocabulary()
        warning = describe_other_ids(vocabulary)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    with ProgressLine("cells") as progress:
        manifest = build_store(
            arguments.inputs,
            arguments.out,
            vocabulary,
            arguments.seq_length,
            options,
            split,
            arguments.overwrite,
            progress.update,
        )
    _print_report(arguments.out, manifest, time.monotonic() - started)


def _print_report(out: str, manifest: Manifest, seconds: float) -> None:
    for source in manifest.sources:
        skipped = ", ".join(f"{number:,} {why}" for why, number in source["skipped"].items())
        genes = source["genes_known"] + source["genes_unknown"]
        passed_over = "".join(f" ({place} passed over)" for place in source["passed_over"])
        print(
            f"{source['name']}: {source['cells_in']:,} cells, {source['cells_stored']:,} stored"
            f"{f', skipped: {skipped}' if skipped else ''}\n"
            f"  counts in {source['counts_location']}{passed_over}, gene ids in var "
            f"{source['gene_ids_location']}\n"
            f"  vocabulary covers {source['genes_known']:,} of {genes:,} genes "
            f"({source['genes_known'] / genes:.1%}), {source['counts_covered']:.1%} of counts; "
            f"{source['genes_blank']:,} without id, {source['genes_repeated']:,} repeated\n"
            f"  tokens per cell: mean {source['tokens_mean']:,.0f}, median "
            f"{source['tokens_median']:,.0f}; {source['cells_cut']:,} cells cut to "
            f"{manifest.seq_length}"
        )
    rows = ", ".join(f"{split} {stop - start:,}" for split, (start, stop) in manifest.rows.items())
    print(
        f"{out}: {manifest.cells:,} cells ({rows}), {manifest.tokens:,} tokens, content "
        f"{manifest.content_hash[:12]}, {seconds:.1f} s"
    )


if __name__ == "__main__":
    run(main)
