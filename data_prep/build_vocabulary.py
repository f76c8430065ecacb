"""Makes a vocabulary of a corpus: the genes its cells express, with their medians."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from geneformer_mcore.exit_codes import run

if TYPE_CHECKING:
    from geneformer_mcore.tokenizer.tally import Tally

EXAMPLE = """example:
  python data_prep/build_vocabulary.py --out vocabulary.json heart.h5ad lung.h5ad

A corpus in parts, on as many machines:
  python data_prep/build_vocabulary.py --partial part1.npz heart.h5ad
  python data_prep/build_vocabulary.py --partial part2.npz lung.h5ad
  python data_prep/build_vocabulary.py --out vocabulary.json --merge part1.npz part2.npz

Medians are exact as long as all values fit into --memory-gb (24 bytes for each expressed gene of
each cell), and within 0.1 % of exact beyond. Neither parts nor --workers change the result.
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="h5ad or zarr of counts, or SOMA Experiment")
    out = parser.add_mutually_exclusive_group(required=True)
    out.add_argument("--out", metavar="FILE.json", help="the vocabulary to write, a new file")
    out.add_argument("--partial", metavar="PART.npz", help="write what was counted, to be merged")
    add("--merge", nargs="+", metavar="PART.npz", help="partial files, in place of inputs")
    add("--layer", help="layer of the counts (default: counts, raw.X, X)")
    add("--symbols", metavar="FILE", help="{symbol: gene id} JSON or GENCODE csv(.gz)")
    add(
        "--allow-normalised",
        action="store_true",
        help="values may be counts scaled per cell (not logarithms)",
    )
    add("--allow-external", action="store_true", help="inputs may have parts in other files")
    add("--memory-gb", type=float, default=4.0, help="for values, in 10^9 bytes (default 4)")
    add("--workers", type=int, default=1, help="processes that read (default 1)")
    add("--overwrite", action="store_true", help="replace a file that is there")
    arguments = parser.parse_args()
    allowed = arguments.allow_normalised or arguments.allow_external
    reading = (arguments.layer, arguments.symbols, allowed)
    if arguments.merge and (arguments.inputs or any(reading)):
        parser.error("--merge takes partial files alone: no inputs, and no options of reading them")
    if not arguments.merge and not arguments.inputs:
        parser.error("name one h5ad or zarr input or more, or --merge partial files")
    return arguments


def _tally(arguments: argparse.Namespace) -> Tally:
    from geneformer_mcore.io.progress import ProgressLine
    from geneformer_mcore.tokenizer.build import gather, merge_parts
    from geneformer_mcore.tokenizer.gencode import load_symbols
    from geneformer_mcore.tokenizer.genes import InputOptions

    if arguments.merge:
        return merge_parts(arguments.merge, arguments.memory_gb)
    symbols = load_symbols(arguments.symbols) if arguments.symbols else {}
    options = InputOptions(
        arguments.layer,
        symbols,
        arguments.allow_normalised,
        allow_external=arguments.allow_external,
    )
    with ProgressLine("cells") as progress:
        return gather(
            arguments.inputs, options, arguments.memory_gb, arguments.workers, progress.update
        )


def main() -> None:
    """Reads all files, writes the vocabulary or the partial file, prints a summary."""
    arguments = _parse()
    from geneformer_mcore.io.files import check_output
    from geneformer_mcore.tokenizer.genes import describe_other_ids
    from geneformer_mcore.tokenizer.tally import save_tally

    check_output(arguments.out or arguments.partial, arguments.overwrite)
    tally = _tally(arguments)
    error = tally.collector.relative_error
    how = f"within {error:.2%} of exact" if error else "exact"
    read = f"{tally.cells:,} cells, {tally.collector.num_values:,} values"
    if arguments.partial:
        save_tally(tally, arguments.partial)
        print(f"{arguments.partial}: {read}, {len(tally.genes):,} genes; medians would be {how}")
        return
    vocabulary = tally.vocabulary()
    warning = describe_other_ids(vocabulary)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    vocabulary.save(arguments.out)
    print(
        f"{arguments.out}: {len(vocabulary.feature_ids):,} genes, {vocabulary.size:,} tokens with "
        f"the specials, checksum {vocabulary.checksum[:12]}; medians of {read}, {how}"
    )


if __name__ == "__main__":
    run(main, counts_layer="--layer", paths="--merge")
