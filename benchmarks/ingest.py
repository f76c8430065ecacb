#!/usr/bin/env python
"""How fast counts become a store, with how much memory, and whether that grows with the cells.

    python benchmarks/ingest.py --vocabulary gc30m.json a.h5ad b.h5ad ...
    python benchmarks/ingest.py                       made-up cells

The cells of the files are drawn again and again until there are 50,000, 100,000 and 200,000, in
files compressed by gzip as those of CELLxGENE; data_prep/build_store.py makes a store of each, with
one worker per core. Memory is summed over all its processes. Takes about ten minutes on two cores
and 4 GB of disk; prints what must be reached, and writes results/ingest.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where a tokenize.py would hide Python's own: the project.
    sys.path.remove(sys.path[0])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import psutil

from benchmarks.side_by_side.goals import Goal
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.store.ingest import plan
from geneformer_mcore.store.ingest.buckets import count_buckets
from geneformer_mcore.store.split.table import SPLITS

ROOT = Path(__file__).resolve().parents[1]
CELLS_OF_SET = 50_000
SETS = (1, 2, 4)
ROWS_PER_WRITE = 4096
SAMPLE_S = 0.1
LEAST_S = 0.1
"""What build_store.py rounds its times to: a phase is said to have taken so long at least."""
CENSUS_CELLS, NODE_CORES = 23_600_000, 64
S_PER_PIECE = 50e-6
"""The merge reads one piece per unit of work and bucket: 43 to 55 us each, tried by themselves on
two cores. With 200,000 cells there are too few to be seen."""

HOW = """
cells/s      all cells over the wall time of the command, start of Python included
tokenising   reading, checking, ranking: shared by the workers, so it is divided by their number
writing      the merge: one process, whatever the cores
memory       largest sum over the command and its workers, sampled every {sample_s:g} s; PSS counts
             pages that processes share once, RSS in each
{census:,} cells on {cores} cores: cells / ({per_core:,.0f} cells/s and core x {cores}) + cells /
             ({merge:,.0f} cells/s) + {pieces:,} pieces x 50 us = {tokenise_s:,.0f} s +
             {merge_s:,.0f} s + {pieces_s:,.0f} s = {minutes:.0f} min, if the disk gives the
             {read_gb_per_s:.1f} GB/s of compressed counts that so many cores read, and the store's
             bandwidth is no less than here
"""


def main() -> None:
    """Makes the files, builds the stores, prints the table, writes the result."""
    arguments = _arguments()
    work = Path(arguments.work)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    workers = psutil.cpu_count() if arguments.workers is None else arguments.workers
    sources = [Path(name) for name in arguments.inputs] or [_made_up(work / "made_up.h5ad")]
    sets = _resample(sources, work, max(SETS), arguments.cells, workers)
    runs = []
    for number in SETS:
        files = [file for part in sets[:number] for file in part]
        runs.append(_measure(files, work / "store", arguments.vocabulary, workers))
        print(_line(runs[-1]), flush=True)
    result = _result(runs, workers, [path.name for path in sources])
    print(HOW.format(sample_s=SAMPLE_S, **result["extrapolation"]))
    goals = _goals(runs)
    print("\n".join(map(str, goals)))
    result["goals"] = [goal.as_json() for goal in goals]
    from geneformer_mcore.metrics.provenance import provenance

    text = json.dumps(result | provenance(), indent=2)
    Path(arguments.json).write_text(text + "\n")
    shutil.rmtree(work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="FILE.h5ad", help="real cells (default: made-up ones)")
    add("--vocabulary", metavar="FILE.json", help="default: that of the cells")
    add("--workers", type=int, help="default: one per core")
    add("--cells", type=int, default=CELLS_OF_SET, help="cells of the smallest store")
    add("--work", default=str(ROOT / "build" / "ingest"), help="scratch folder, made anew")
    add("--json", default=str(ROOT / "benchmarks" / "results" / "ingest.json"))
    return parser.parse_args()


# Files


def _resample(
    sources: Sequence[Path], work: Path, num_sets: int, cells: int, workers: int
) -> list[list[Path]]:
    """`num_sets` lists of files with `cells` cells each, a file per source in every list."""
    import anndata

    sizes = [anndata.read_h5ad(path, backed="r").n_obs for path in sources]
    edges = np.rint(np.cumsum([0, *sizes]) / sum(sizes) * cells).astype(int)
    jobs, files = [], []
    for number in range(num_sets):
        files.append([work / f"{path.stem}_{number}.h5ad" for path in sources])
        jobs += [
            (path, out, int(size), number)
            for path, out, size in zip(sources, files[-1], np.diff(edges), strict=True)
        ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(_draw, *zip(*jobs, strict=True)))
    return files


def _draw(source: Path, out: Path, num_cells: int, seed: int) -> None:
    """Writes `num_cells` cells drawn from `source`, rows in small steps."""
    import anndata
    import h5py
    import pandas as pd
    from anndata.io import write_elem
    from scipy import sparse

    cells = anndata.read_h5ad(source)
    counts = sparse.csr_matrix(cells.X, dtype=np.float32)
    rows = np.random.default_rng(seed).integers(0, counts.shape[0], num_cells)
    indptr = np.concatenate([[0], np.cumsum(np.diff(counts.indptr)[rows])]).astype(np.int64)
    obs = cells.obs.iloc[rows].set_index(pd.Index([f"{seed}_{i}" for i in range(num_cells)]))
    with h5py.File(out, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "obs", obs, dataset_kwargs={"compression": "gzip"})
        write_elem(file, "var", cells.var, dataset_kwargs={"compression": "gzip"})
        group = file.create_group("X")
        shape = np.array([num_cells, counts.shape[1]])
        group.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape}
        )
        group.create_dataset("indptr", data=indptr, compression="gzip")
        for name, kind in (("data", np.float32), ("indices", np.int32)):
            group.create_dataset(name, (indptr[-1],), kind, compression="gzip")
        for start in range(0, num_cells, ROWS_PER_WRITE):
            part = counts[rows[start : start + ROWS_PER_WRITE]]
            span = slice(indptr[start], indptr[start] + part.nnz)
            group["data"][span], group["indices"][span] = part.data, part.indices


def _made_up(path: Path) -> Path:
    """2,000 cells of about 1,700 expressed genes of 20,000."""
    import anndata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(0)
    rates = rng.gamma(0.15, 1.5, 20_000)
    counts = sparse.vstack(
        [sparse.csr_matrix(rng.poisson(rates, (500, 20_000)).astype(np.float32)) for _ in range(4)]
    )
    genes = pd.DataFrame(index=[f"ENSG{number:011d}" for number in range(20_000)])
    cells = pd.DataFrame(index=[f"c{number}" for number in range(2000)])
    anndata.AnnData(counts.tocsr(), obs=cells, var=genes).write_h5ad(path)
    return path


# Runs


def _measure(
    files: Sequence[Path], store: Path, vocabulary: str | None, workers: int
) -> dict[str, Any]:
    """One build, and what it took."""
    shutil.rmtree(store, ignore_errors=True)
    command = [sys.executable, str(ROOT / "data_prep" / "build_store.py"), "--out", str(store)]
    command += ["--workers", str(workers), *map(str, files)]
    if vocabulary:
        command += ["--vocabulary", vocabulary]
    started, cpu_s = time.monotonic(), _children_cpu_s()
    peaks = {"rss": 0, "pss": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for name, size in _memory(process.pid).items():
                peaks[name] = max(peaks[name], size)
            time.sleep(SAMPLE_S)
        seconds = time.monotonic() - started
        assert process.stdout is not None
        told = process.stdout.read()
    if process.returncode:
        raise DataError(f"build_store.py ended with {process.returncode}.")
    tokenising_s, writing_s = (_phase_s(what, told) for what in ("tokenising", "writing rows"))
    manifest = json.loads((store / "manifest.json").read_text())
    return {
        "cells": manifest["cells"],
        "seconds": round(seconds, 2),
        "cells_per_s": round(manifest["cells"] / seconds),
        "cpu_s": round(_children_cpu_s() - cpu_s, 2),
        "tokenising_s": tokenising_s,
        "writing_s": writing_s,
        "peak_pss_gb": round(peaks["pss"] / 1e9, 3),
        "peak_rss_gb": round(peaks["rss"] / 1e9, 3),
        "input_bytes": sum(file.stat().st_size for file in files),
        "store_bytes": sum(file.stat().st_size for file in store.rglob("*") if file.is_file()),
        "tokens": manifest["tokens"],
        "content_hash": manifest["content_hash"],
    }


def _phase_s(what: str, told: str) -> float:
    """Seconds of a phase, of which build_store.py told as `what 12.3`."""
    found = re.search(rf"{what} ([\d.]+)", told)
    assert found, told
    return max(LEAST_S, float(found.group(1)))


def _children_cpu_s() -> float:
    """CPU seconds of all processes that were waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(pid: int) -> dict[str, int]:
    """Bytes of a process and all under it."""
    total = {"rss": 0, "pss": 0}
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in family:
        try:
            found = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        total["rss"] += found.rss
        total["pss"] += found.pss
    return total


def _line(result: dict[str, Any]) -> str:
    return (
        "{cells:>9,} cells  {seconds:7.1f} s  {cells_per_s:>7,} cells/s  CPU {cpu_s:6.1f} s  "
        "tokenising {tokenising_s:6.1f} s  writing {writing_s:5.1f} s  PSS {peak_pss_gb:.2f} GB  "
        "RSS {peak_rss_gb:.2f} GB  in {input_bytes:>13,}  out {store_bytes:>13,} bytes"
    ).format(**result)


def _goals(runs: Sequence[dict[str, Any]]) -> list[Goal]:
    """What the largest run must reach, and how time and memory may grow from the first to it."""
    first, last = runs[0], runs[-1]
    per_cell = [run["seconds"] / run["cells"] for run in (first, last)]
    return [
        Goal(f"ingest of {last['cells']:,} cells", last["cells_per_s"], 5000, "cells/s"),
        Goal("memory of all processes, PSS", last["peak_pss_gb"], 2, "GB", at_most=True),
        Goal(
            f"time per cell, {last['cells']:,} / {first['cells']:,} cells",
            per_cell[1] / per_cell[0],
            1.15,
            at_most=True,
        ),
        Goal(
            f"memory, {last['cells']:,} / {first['cells']:,} cells",
            last["peak_pss_gb"] / first["peak_pss_gb"],
            1.15,
            at_most=True,
        ),
    ]


def _result(runs: Sequence[dict[str, Any]], workers: int, sources: Sequence[str]) -> dict[str, Any]:
    last = runs[-1]
    per_core = last["cells"] / last["tokenising_s"] / workers
    merge = last["cells"] / last["writing_s"]
    tokenise_s = CENSUS_CELLS / (per_core * NODE_CORES)
    merge_s = CENSUS_CELLS / merge
    units = -(-CENSUS_CELLS // plan.MOST_ROWS_PER_UNIT)
    pieces = units * len(SPLITS) * count_buckets(CENSUS_CELLS)
    pieces_s = pieces * S_PER_PIECE
    first = runs[0]
    return {
        "sources": list(sources),
        "compression": "gzip",
        "workers": workers,
        "runs": list(runs),
        "growth": {
            "cells": round(last["cells"] / first["cells"], 3),
            "seconds": round(last["seconds"] / first["seconds"], 3),
            "memory_pss": round(last["peak_pss_gb"] / first["peak_pss_gb"], 3),
            "store_bytes": round(last["store_bytes"] / first["store_bytes"], 3),
        },
        "extrapolation": {
            "census": CENSUS_CELLS,
            "cores": NODE_CORES,
            "per_core": round(per_core),
            "merge": round(merge),
            "tokenise_s": round(tokenise_s),
            "merge_s": round(merge_s),
            "pieces": pieces,
            "pieces_s": round(pieces_s),
            "minutes": round((tokenise_s + merge_s + pieces_s) / 60, 1),
            "read_gb_per_s": round(
                last["input_bytes"] / last["cells"] * per_core * NODE_CORES / 1e9, 2
            ),
        },
    }


if __name__ == "__main__":
    run(main)
