"""Makes the demo's cells: the 700 real PBMCs inside scanpy's package, as exact counts.

scanpy's 10x_pbmc68k_reduced.h5ad: raw.X = log1p(count * scale of the cell), three decimals
  ->  expm1  ->  / smallest value of the cell (its count is 1)  ->  round  ->  counts
  ->  Ensembl ids by symbol from GENCODE's table  ->  demo.h5ad
"""

from __future__ import annotations

import argparse
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_mcore.errors import DataError, MissingBackendError
from geneformer_mcore.exit_codes import run

if TYPE_CHECKING:
    import anndata
    from scipy.sparse import csr_matrix

EXAMPLE = """example:
  python data_prep/demo_cells.py --out build/demo.h5ad
"""
MAX_DISTANCE = 0.2
"""A recovered count further than this from a whole number means that the file is another one."""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gencode",
        type=Path,
        metavar="FILE.csv.gz|FILE.whl",
        help="another table of GENCODE's human genes than the library's own",
    )
    parser.add_argument("--out", required=True, help="the h5ad file to write")
    return parser.parse_args()


def find_cells() -> Path:
    """The h5ad file inside the installed scanpy, which is not imported."""
    spec = find_spec("scanpy")
    if spec is None or not spec.submodule_search_locations:
        raise MissingBackendError(
            "the demo's cells are in the package `scanpy`, which is not installed. Remedy: pip "
            'install "geneformer_mcore[eval]".'
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "10x_pbmc68k_reduced.h5ad"
    if not path.exists():
        raise DataError(f"{path}: missing from this version of scanpy. Remedy: scanpy 1.9 to 1.11.")
    return path


def recover_counts(logged: csr_matrix) -> tuple[csr_matrix, float]:
    """(counts float32, the largest distance from a whole number) of log1p of scaled counts.

    The smallest value of a cell is taken for its scale: in every cell some gene has count 1.
    """
    import numpy as np

    counts = logged.tocsr().astype(np.float64)
    counts.eliminate_zeros()
    counts.data = np.expm1(counts.data)
    scale = np.minimum.reduceat(counts.data, counts.indptr[:-1])
    counts.data /= np.repeat(scale, np.diff(counts.indptr))
    whole = np.rint(counts.data)
    distance = float(np.abs(counts.data - whole).max())
    if distance > MAX_DISTANCE:
        raise DataError(
            f"a recovered count is {distance:.2f} from a whole number, at most {MAX_DISTANCE} is "
            "expected: these are not the demo's cells."
        )
    counts.data = whole
    return counts.astype(np.float32), distance


def make_demo(source: Path, symbols: dict[str, str]) -> tuple[anndata.AnnData, float]:
    """The demo's cells: counts in X, `feature_id` and `feature_name` in var, cell_type in obs."""
    import anndata
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The file is of an old format; reading it warns.
        old = anndata.read_h5ad(source)
    counts, distance = recover_counts(old.raw.X)
    names = [str(name) for name in old.raw.var_names]
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(old.obs["bulk_labels"].astype(str))},
        index=pd.Index([str(name) for name in old.obs_names], name="cell_id"),
    )
    var = pd.DataFrame(
        {"feature_id": [symbols.get(name, "") for name in names], "feature_name": names},
        index=pd.Index(names, name="symbol"),
    )
    return anndata.AnnData(counts, obs=obs, var=var), distance


def main() -> None:
    """Writes the demo's h5ad and prints a summary."""
    arguments = _parse()
    from geneformer_mcore.io.files import check_output, whole_file
    from geneformer_mcore.tokenizer.gencode import TABLE, read_gencode

    check_output(arguments.out, overwrite=True)
    cells, distance = make_demo(find_cells(), read_gencode(arguments.gencode or TABLE))
    with whole_file(arguments.out) as partial:
        cells.write_h5ad(partial, compression="gzip")
    with_id = int((cells.var["feature_id"] != "").sum())
    print(
        f"{arguments.out}: {cells.n_obs} cells x {cells.n_vars} genes, counts within "
        f"{distance:.2f} of whole numbers; {with_id} of {cells.n_vars} symbols have an Ensembl id"
    )


if __name__ == "__main__":
    run(main)
