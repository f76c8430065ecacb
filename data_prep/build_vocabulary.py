"""Makes a vocabulary of a corpus: the genes its cells express, with their exact medians."""

from __future__ import annotations

import argparse
import sys

from geneformer_mcore.commands import run

EXAMPLE = """example:
  python data_prep/build_vocabulary.py --out vocabulary.json heart.h5ad lung.h5ad
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="FILE.h5ad", help="files of counts")
    parser.add_argument("--out", required=True, help="the vocabulary to write (JSON), a new file")
    parser.add_argument("--layer", help="layer of the counts (default: counts, raw.X, X)")
    parser.add_argument("--symbols", help="{symbol: gene id} JSON or GENCODE csv(.gz)")
    parser.add_argument(
        "--allow-normalised",
        action="store_true",
        help="values may be counts scaled per cell (not logarithms)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser.parse_args()


def main() -> None:
    """Reads all files, writes the vocabulary, says what it holds."""
    arguments = _parse()
    from geneformer_mcore.cells.corpus import InputOptions, build_vocabulary, describe_other_ids
    from geneformer_mcore.cells.genes import load_symbols
    from geneformer_mcore.cells.output import check_output

    check_output(arguments.out, arguments.overwrite)
    symbols = load_symbols(arguments.symbols) if arguments.symbols else {}
    options = InputOptions(arguments.layer, symbols, arguments.allow_normalised)
    vocabulary = build_vocabulary(arguments.inputs, options)
    warning = describe_other_ids(vocabulary)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    vocabulary.save(arguments.out)
    print(
        f"{arguments.out}: {len(vocabulary.feature_ids):,} genes, {vocabulary.size:,} tokens with "
        f"the specials, checksum {vocabulary.checksum[:12]}"
    )


if __name__ == "__main__":
    run(main)
