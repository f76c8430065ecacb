"""Downloads cells of the CELLxGENE Census as h5ad files, by default those of the model card."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore.exit_codes import FINISHED, INTERRUPTED, WRONG_INPUT, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geneformer_mcore.io.progress import ProgressLine
    from geneformer_mcore.io.retry import Retry
    from geneformer_mcore.store.census_download import CensusPlan, CensusUnit, Fetching, Outcome

EXAMPLE = """example:
  python data_prep/download_census.py --out census --limit-cells 100000
  python data_prep/download_census.py --out census --list           # plan alone, and print it
  python data_prep/download_census.py --out census --part 0/32      # of a SLURM array
  python data_prep/download_census.py --out census --check

plan.json in the folder lists the cells of each file: one file per data set, several for a large
one. What is whole is skipped, so the same command resumes after any end. Exit status 75 if
the network failed to the last attempt (start it again), with 2 for wrong input or damaged files.
A file of 32,768 cells takes about 1 GB of memory while it is fetched.
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="the folder for the files and plan.json")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--census-version", help="stable, latest or a date (default: stable)")
    source.add_argument("--uri", help="a SOMA Experiment of the Census' schema, path or s3://")
    add("--organism", help="(default: homo_sapiens)")
    add("--filter", help='over obs; "" for all cells (default: the model card\'s)')
    add("--cells-per-unit", type=int, help="in a file, at most (default: 32768)")
    add("--limit-cells", type=int, help="the first data sets only, so many cells in all")
    add("--part", metavar="I/N", help="part I of N of the files, I from 0")
    add("--workers", type=int, default=1, help="files fetched at once (default 1)")
    add("--attempts", type=int, default=6, help="per file, with growing waits between (default 6)")
    job = parser.add_mutually_exclusive_group()
    job.add_argument("--list", action="store_true", help="print the files of the plan, and end")
    job.add_argument("--check", action="store_true", help="verify the files, and end")
    return parser.parse_args()


def main() -> int:
    """Plans, and lists, checks or fetches what is planned."""
    arguments = _parse()
    from geneformer_mcore.errors import NetworkError
    from geneformer_mcore.io.progress import ProgressLine
    from geneformer_mcore.io.retry import Retry
    from geneformer_mcore.store.census_download import Fetching, fetch_units
    from geneformer_mcore.store.ingest.plan import Part

    folder = Path(arguments.out)
    retry = Retry(arguments.attempts)
    part = Part.parse(arguments.part or "0/1")
    with ProgressLine("cells") as progress:
        try:
            plan = _plan(arguments, retry, progress)
        except NetworkError as error:
            print(f"error: {error} Remedy: start the same command again.", file=sys.stderr)
            return INTERRUPTED
        units = plan.units[part.index :: part.number]
        if arguments.list:
            for unit in units:
                print(f"{unit.file}\t{unit.dataset_id}\t{unit.cells}\t{unit.first}\t{unit.last}")
            return FINISHED
        fetching = Fetching.of(plan, folder, retry)
        if arguments.check:
            return _check(fetching, units, progress)
        outcome = fetch_units(fetching, units, arguments.workers, arguments.part, progress.update)
    return _report(arguments.out, units, outcome)


def _plan(arguments: argparse.Namespace, retry: Retry, progress: ProgressLine) -> CensusPlan:
    from geneformer_mcore.io.census import Release, count_missing, find_release
    from geneformer_mcore.io.files import check_place
    from geneformer_mcore.store.census_download import Selection, prepare_plan
    from geneformer_mcore.store.ingest.sources import address_of

    uri = address_of(arguments.uri) if arguments.uri else None
    asked = {
        "source": uri or arguments.census_version,
        "organism": arguments.organism,
        "value_filter": arguments.filter,
        "cells_per_unit": arguments.cells_per_unit,
        "limit_cells": arguments.limit_cells,
    }
    given = {name: value for name, value in asked.items() if value is not None}

    def find(selection: Selection) -> Release:
        found = Release("", uri) if uri else find_release(selection.source, selection.organism)
        for name, cells in count_missing(found.address, selection.value_filter).items():
            print(
                f"warning: {cells:,} cell(s) have no {name}, and no comparison with it holds for "
                f"them, not even !=. To take them: --filter with ({name} == None or ...).",
                file=sys.stderr,
            )
        return found

    def seen(cells: int) -> None:
        progress.update("planning", cells, cells)

    check_place(Path(arguments.out) / "plan.json")
    return retry.call("the plan", lambda: prepare_plan(Path(arguments.out), given, find, seen))


def _check(fetching: Fetching, units: Sequence[CensusUnit], progress: ProgressLine) -> int:
    from geneformer_mcore.store.census_download import find_missing

    problems = list(find_missing(fetching, units, progress.update))
    for unit, problem in problems:
        print(f"problem: {fetching.folder / unit.file}: {problem}")
    if problems:
        print(
            f"{len(problems):,} of {len(units):,} files are missing or damaged. Remedy: start "
            "again without --check."
        )
        return WRONG_INPUT
    print(f"{fetching.folder}: {_described(units)}, all whole")
    return FINISHED


def _described(units: Sequence[CensusUnit]) -> str:
    datasets = len({unit.dataset_id for unit in units})
    cells = sum(unit.cells for unit in units)
    return f"{cells:,} cells of {datasets:,} data sets in {len(units):,} files"


def _report(out: str, units: Sequence[CensusUnit], outcome: Outcome) -> int:
    for message in (*outcome.wrong, *outcome.network):
        print(f"error: {message}", file=sys.stderr)
    print(
        f"{out}: {_described(units)}: {outcome.fetched:,} files fetched, {outcome.there:,} were "
        f"there, {len(outcome.wrong) + len(outcome.network):,} failed, {outcome.not_begun:,} not "
        "begun"
    )
    if outcome.wrong:
        return WRONG_INPUT
    if outcome.network:
        print(
            "The network failed. Remedy: start the same command again; what is there is kept.",
            file=sys.stderr,
        )
        return INTERRUPTED
    return FINISHED


if __name__ == "__main__":
    run(main, counts_layer="--layer", value_filter="--filter")
