"""Reads all of a store and checks every row against its manifest and checksums."""

from __future__ import annotations

import argparse
import time

from geneformer_mcore.exit_codes import WRONG_INPUT, run

EXAMPLE = """example:
  python data_prep/check_store.py stores/demo [--report DIR]

Ends with 0 if the store is sound, with 2 and a list of problems if it is not.
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help="the store's folder")
    parser.add_argument(
        "--report", metavar="DIR", help="also write build_store.py's report of it into this folder"
    )
    return parser.parse_args()


def main() -> int:
    """Prints the problems, or that there are none."""
    arguments = _parse()
    from geneformer_mcore.io.progress import ProgressLine
    from geneformer_mcore.store.check import check_store
    from geneformer_mcore.store.layout import Manifest

    if arguments.report:
        from geneformer_mcore.report.store import check_folder

        check_folder(arguments.report)
    started = time.monotonic()
    with ProgressLine("cells") as progress:
        problems = check_store(arguments.store, progress.update)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        return WRONG_INPUT
    manifest = Manifest.load(arguments.store)
    print(
        f"{arguments.store}: sound. {manifest.cells:,} cells, {manifest.tokens:,} tokens, content "
        f"{manifest.content_hash[:12]}, read in {time.monotonic() - started:.1f} s"
    )
    if arguments.report:
        from geneformer_mcore.report.store import write_report

        write_report(arguments.store, arguments.report)
        print(f"report: {arguments.report}/report.md")
    return 0


if __name__ == "__main__":
    run(main)
