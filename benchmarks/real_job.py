#!/usr/bin/env python
"""The real job on real cells: store, the 10M model with the card's settings, a model that learns.

    python benchmarks/real_job.py DATA

DATA is a folder with *.h5ad files of human cells (those named in FILES are taken) and
dicts/gc30m_gene_medians.json, the medians of Geneformer's first corpus. Writes
results/runs/real_job_*.json in about 20 minutes on two CPU cores. The data are not part of the
project.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import shutil

from benchmarks.harness.common import RESULTS, ROOT, parser_of, step
from geneformer_mcore.exit_codes import run

WORK = ROOT / "build" / "real_job"
FILES = (
    *("pbmc3k_raw.h5ad", "heart_san_1k.h5ad", "lca_lung_1k.h5ad"),
    "marrow_cd34_palantir.h5ad",
)
CARD = (
    *("--config", "configs/geneformer_10m.yaml"),
    *("train.steps=5", "train.micro_batch_size=2", "train.global_batch_size=8"),
    *("train.validate_every_steps=5", "train.validate_batches=1", "metrics.log_every_steps=1"),
)
"""A few steps of the card's model: seq 2048, bf16, 32-bit residuals, its dropouts. Only the batch
is smaller, and the learning rate is that of its first five steps."""
NARROW = ("--config", "configs/real_cells.yaml")


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, metavar="DATA")
    data = parser.parse_args().data.resolve()
    medians = data / "dicts" / "gc30m_gene_medians.json"
    sources = [data / name for name in FILES]
    missing = [str(path) for path in [medians, *sources] if not path.is_file()]
    if missing:
        print(f"skipped: the real cells are not here ({', '.join(missing)})")
        return 0
    shutil.rmtree(WORK, ignore_errors=True)
    vocabulary, store = WORK / "gc30m.json", WORK / "store"
    WORK.mkdir(parents=True)
    step("data_prep/import_dictionary.py", "--medians", medians, "--out", vocabulary)
    step("data_prep/build_store.py", "--out", store, "--vocabulary", vocabulary, *sources)
    step("data_prep/check_store.py", store)
    for name, settings in (("10m", CARD), ("narrow", NARROW)):
        folder = WORK / name
        step("launch/pretrain.py", *settings, f"data.store={store}", f"run.dir={folder}")
        step("launch/report.py", folder, "--json", RESULTS / "runs" / f"real_job_{name}.json")
    return 0


if __name__ == "__main__":
    run(main)
