"""Makes a vocabulary of Geneformer's dictionaries: {gene id: median}, as JSON or pickle."""

from __future__ import annotations

import argparse

from geneformer_mcore.exit_codes import run

EXAMPLE = """example:
  python data_prep/import_dictionary.py --medians gene_median_dictionary.pkl \\
      --tokens token_dictionary.pkl --out vocabulary.json

Pickles are read without running anything in them: containers, text and numbers only.
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--medians", required=True, help="{gene id: median}, JSON or pickle")
    parser.add_argument("--tokens", help="{gene id: token id}, JSON or pickle, to check the order")
    parser.add_argument(
        "--symbols", help="{symbol: gene id} JSON or GENCODE csv, to name the genes"
    )
    parser.add_argument("--out", required=True, help="the vocabulary to write (JSON)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another file that is there"
    )
    return parser.parse_args()


def main() -> None:
    """Reads the dictionaries, writes the vocabulary, prints a summary."""
    arguments = _parse()
    from geneformer_mcore.io.files import check_output
    from geneformer_mcore.tokenizer.dictionary import import_dictionary
    from geneformer_mcore.tokenizer.gencode import load_symbols

    check_output(arguments.out, overwrite=True)
    names: dict[str, str] = {}
    if arguments.symbols:
        for symbol, gene in load_symbols(arguments.symbols).items():
            names.setdefault(gene, symbol)
    vocabulary = import_dictionary(arguments.medians, arguments.tokens, names)
    if not vocabulary.is_saved(arguments.out):
        check_output(arguments.out, arguments.overwrite)
        vocabulary.save(arguments.out)
    print(
        f"{arguments.out}: {len(vocabulary.feature_ids):,} genes, {vocabulary.size:,} tokens with "
        f"the specials, checksum {vocabulary.checksum[:12]}"
    )


if __name__ == "__main__":
    run(main)
