#!/usr/bin/env python
"""Rate and memory of building a store from counts, and their growth with the number of cells.

    python benchmarks/ingest.py --vocabulary gc30m.json a.h5ad b.h5ad ...
    python benchmarks/ingest.py                       made-up cells

The cells of the files are drawn again and again until there are 50,000, 100,000 and 200,000, in
files compressed by gzip as those of CELLxGENE; data_prep/build_store.py makes a store of each, with
one worker per core. Memory is summed over all its processes. Takes about ten minutes on two cores
and 4 GB of disk; prints the goals, and writes results/ingest.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import json
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.common import RESULTS, ROOT, goal, goal_text, parser_of, save_results
from benchmarks.harness.loader_cells import draw, write
from benchmarks.harness.pages import INGEST_COLUMNS, table
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.store.ingest import plan
from geneformer_mcore.store.ingest.buckets import count_buckets
from geneformer_mcore.store.split.table import SPLITS

CELLS_OF_SET = 50_000
SETS = (1, 2, 4)
SAMPLE_S = 0.1
LEAST_S = 0.1
"""Rounding of build_store.py's times: a phase takes so long at least."""
CENSUS_CELLS, NODE_CORES = 23_600_000, 64
S_PER_PIECE = 50e-6
"""The merge reads one piece per unit of work and bucket: 43 to 55 us each, tried by themselves on
two cores. With 200,000 cells there are too few to be seen."""


def main() -> None:
    arguments = _arguments()
    work = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    workers = arguments.workers or psutil.cpu_count()
    made_up = [] if arguments.inputs else draw([], None, 2000, seed=0)[:1]
    sources = arguments.inputs or [write(each, work / "made_up").counts_file for each in made_up]
    sets = _resample(sources, work, max(SETS), arguments.cells)
    runs = []
    for number in SETS:
        files = [file for part in sets[:number] for file in part]
        runs.append(_measure(files, work / "store", arguments.vocabulary, workers))
        print(f"{runs[-1]['cells']:,} cells: {runs[-1]['seconds']} s", flush=True)
    result = _result(runs, workers, [path.name for path in sources])
    print(table(INGEST_COLUMNS, runs), *map(goal_text, result["goals"]), sep="\n")
    save_results(arguments.json, result)
    shutil.rmtree(work)


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="FILE.h5ad", help="default: made-up cells")
    add("--vocabulary", type=Path, metavar="FILE.json", help="default: that of the cells")
    add("--workers", type=int, help="default: one per core")
    add("--cells", type=int, default=CELLS_OF_SET, help="cells of the smallest store")
    add(
        "--work", type=Path, default=ROOT / "build" / "ingest", help="scratch folder, emptied first"
    )
    add("--json", type=Path, default=RESULTS / "ingest.json")
    return parser.parse_args()


def _resample(sources: Sequence[Path], work: Path, num_sets: int, cells: int) -> list[list[Path]]:
    """`num_sets` lists of files with `cells` cells each, a file per source in every list."""
    import anndata

    sizes = [anndata.read_h5ad(path, backed="r").n_obs for path in sources]
    shares = np.diff(np.rint(np.cumsum([0, *sizes]) / sum(sizes) * cells).astype(int))
    files = []
    for number in range(num_sets):
        files.append([work / f"{path.stem}_{number}.h5ad" for path in sources])
        for source, out, share in zip(sources, files[-1], shares, strict=True):
            _draw(source, out, int(share), number)
    return files


def _draw(source: Path, out: Path, num_cells: int, seed: int) -> None:
    import anndata
    import pandas as pd
    from scipy import sparse

    cells = anndata.read_h5ad(source)
    rows = np.random.default_rng(seed).integers(0, cells.n_obs, num_cells)
    counts = sparse.csr_matrix(cells.X, dtype=np.float32)[rows]
    obs = cells.obs.iloc[rows].set_index(pd.Index([f"{seed}_{i}" for i in range(num_cells)]))
    anndata.AnnData(counts, obs=obs, var=cells.var).write_h5ad(out, compression="gzip")


# Runs


def _measure(
    files: Sequence[Path], store: Path, vocabulary: Path | None, workers: int
) -> dict[str, Any]:
    """One build, and what it took."""
    shutil.rmtree(store, ignore_errors=True)
    script = str(ROOT / "data_prep" / "build_store.py")
    command: list[Any] = [sys.executable, script, "--out", store, "--workers", f"{workers}", *files]
    command += ["--vocabulary", vocabulary] if vocabulary else []
    started, cpu_s = time.monotonic(), _children_cpu_s()
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(SAMPLE_S)
        seconds = time.monotonic() - started
        assert process.stdout is not None
        printed = process.stdout.read()
    if process.returncode:
        raise DataError(f"build_store.py ended with {process.returncode}.")
    manifest = json.loads((store / "manifest.json").read_text())
    return {
        "cells": manifest["cells"],
        "seconds": round(seconds, 2),
        "cells_per_s": round(manifest["cells"] / seconds),
        "cpu_s": round(_children_cpu_s() - cpu_s, 2),
        "tokenising_s": _phase_s("tokenising", printed),
        "writing_s": _phase_s("writing rows", printed),
        "peak_pss_gb": round(peak / 1e9, 3),
        "input_bytes": sum(file.stat().st_size for file in files),
        "store_bytes": sum(file.stat().st_size for file in store.rglob("*") if file.is_file()),
    }


def _phase_s(what: str, printed: str) -> float:
    """Seconds of a phase, which build_store.py prints as `what 12.3`."""
    found = re.search(rf"{what} ([\d.]+)", printed)
    assert found, printed
    return max(LEAST_S, float(found.group(1)))


def _children_cpu_s() -> float:
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _memory(pid: int) -> int:
    """PSS in bytes of a process and all under it: pages that they share count once."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, too
                total += process.memory_full_info().pss
    return total


def _goals(first: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
    """Goals of the largest run, and of the growth of time and memory from the first to it."""
    per_cell = [run["seconds"] / run["cells"] for run in (first, last)]
    memory = last["peak_pss_gb"] / first["peak_pss_gb"]
    both = f"{last['cells']:,} / {first['cells']:,} cells"
    return [
        goal(f"ingest of {last['cells']:,} cells", last["cells_per_s"], 5000, "cells/s"),
        goal("memory of all processes, PSS", last["peak_pss_gb"], 2, "GB", at_most=True),
        goal(f"time per cell, {both}", per_cell[1] / per_cell[0], 1.15, at_most=True),
        goal(f"memory, {both}", memory, 1.15, at_most=True),
    ]


def _result(runs: Sequence[dict[str, Any]], workers: int, sources: Sequence[str]) -> dict[str, Any]:
    return {
        "sources": list(sources),
        "compression": "gzip",
        "workers": workers,
        "runs": list(runs),
        "extrapolation": _census(runs[-1], workers),
        "goals": _goals(runs[0], runs[-1]),
    }


def _census(last: dict[str, Any], workers: int) -> dict[str, Any]:
    """The whole Census on one node, from the largest run: cells / (cells/s and core x cores) +
    cells / (cells/s of the merge, one process) + pieces, if the disk gives read_gb_per_s."""
    per_core = last["cells"] / last["tokenising_s"] / workers
    merge = last["cells"] / last["writing_s"]
    units = -(-CENSUS_CELLS // plan.MOST_ROWS_PER_UNIT)
    pieces = units * len(SPLITS) * count_buckets(CENSUS_CELLS)
    rate = per_core * NODE_CORES
    seconds = (CENSUS_CELLS / rate, CENSUS_CELLS / merge, pieces * S_PER_PIECE)
    names = ("tokenise_s", "merge_s", "pieces_s")
    return {
        "census": CENSUS_CELLS,
        "cores": NODE_CORES,
        "per_core": round(per_core),
        "merge": round(merge),
        "pieces": pieces,
        **{name: round(each) for name, each in zip(names, seconds, strict=True)},
        "minutes": round(sum(seconds) / 60, 1),
        "read_gb_per_s": round(last["input_bytes"] / last["cells"] * rate / 1e9, 2),
    }


if __name__ == "__main__":
    run(main)
