"""Decides which data sets are held out of training, as a split.json for build_store.py."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from geneformer_mcore.exit_codes import run

if TYPE_CHECKING:
    from geneformer_mcore.store.split.dataset_table import DatasetTable
    from geneformer_mcore.store.split.table import SplitTable

EXAMPLE = """example:
  python data_prep/make_split.py census/ --policy card --out split.json \\
      --test-dataset 8e47ed12-c658-4252-b126-381df8d52a3d
  python data_prep/build_store.py --split split.json --out stores/census census/*.h5ad

A table (CSV, TSV or Parquet) has the columns dataset_id, assay, tissue_general and a row per cell,
or n_cells of each row. Whatever is held out, every assay and every tissue_general stays in
training; --policy card ends with 2 if that cannot be seen to, or no data set is left for test. A
store keeps the split that it was built with: build it again to change it.
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="STORE_OR_TABLE",
        help="token store, table, folder of download_census.py, h5ad, zarr or SOMA Experiment",
    )
    add("--out", required=True, metavar="split.json", help="the file to write, a new one")
    add("--policy", default="card", choices=("card", "smallest-first"), help="(default: card)")
    add("--held-out-fraction", type=float, default=0.01, help="of the cells, at most (0.01)")
    add("--validation-share", type=float, default=0.5, help="of held-out cells; rest: test (0.5)")
    add("--seed", type=int, default=0, help="of the choice of data sets by --policy card (0)")
    add(
        "--test-dataset",
        nargs="+",
        default=[],
        metavar="ID",
        help="whole data sets for test alone, besides the held-out fraction",
    )
    add(
        "--unlisted",
        default="refuse",
        choices=("refuse", "train"),
        help="a data set of a store that is not among these (default: refuse)",
    )
    add(
        "--allow-incomplete",
        action="store_true",
        help="let --policy card split what lacks assay or tissue_general, or has no data set to "
        "spare for test alone",
    )
    add("--allow-external", action="store_true", help="sources may have parts in other files")
    add("--overwrite", action="store_true", help="replace a file that is there")
    return parser.parse_args()


def main() -> None:
    """Counts the data sets, chooses, writes the file, prints a summary."""
    arguments = _parse()
    from geneformer_mcore.io.files import check_output
    from geneformer_mcore.store.split.dataset_table import read_dataset_table
    from geneformer_mcore.store.split.policy import make_split
    from geneformer_mcore.tokenizer.genes import InputOptions

    check_output(arguments.out, arguments.overwrite)
    options = InputOptions(allow_external=arguments.allow_external)
    table = read_dataset_table(arguments.sources, options)
    split = make_split(
        table,
        arguments.policy,
        arguments.held_out_fraction,
        arguments.seed,
        arguments.test_dataset,
        arguments.validation_share,
        arguments.unlisted,
        arguments.allow_incomplete,
    )
    for column, source in table.missing.items():
        print(
            f"warning: {source} has no column {column}: that its cells' values of it stay in "
            "training is not seen to.",
            file=sys.stderr,
        )
    split.save(arguments.out)
    _print_report(arguments.out, table, split)


def _print_report(out: str, table: DatasetTable, split: SplitTable) -> None:
    cells, datasets = split.count_cells(), split.count_datasets()
    for role, number in datasets.items():
        named = sorted(name for name, found in split.roles.items() if found == role)
        listed = f": {', '.join(named[:5])}{', ...' if len(named) > 5 else ''}" if named else ""
        print(
            f"{role}: {number:,} data sets, {cells[role]:,} cells ({cells[role] / table.cells:.2%})"
            f"{'' if role == 'train' else listed}"
        )
    labels = " and ".join(f"{number} {column}" for column, number in split.labels.items())
    print(
        f"{out}: {table.cells:,} cells of {len(table.datasets):,} data sets, checksum "
        f"{split.checksum[:12]}; all {labels} in training"
    )


if __name__ == "__main__":
    run(main, counts_layer="--layer", test_datasets="--test-dataset")
