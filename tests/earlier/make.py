"""Makes what an earlier version of the project leaves behind, by the commands that users type.

    python tests/earlier/make.py PROJECT OUT.tar.xz

PROJECT is a clone at that version, with its environment in .venv. Into the archive go cells, the
store, run directories (pretrained, fine-tuned), the model in Hugging Face's format and the run
directory made of that again; and, in expected/, what that version went on to compute from them.
The commands and their options are fixed, so one script serves every version.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

NUM_CELLS, NUM_GENES = 90, 60
SETTINGS = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.ffn_hidden_size=32",
    "model.num_attention_heads=2",
    "data.seq_length=40",
    "data.span_cells=16",
    "train.precision=fp32",
    "train.micro_batch_size=8",
    "train.global_batch_size=16",
    "metrics.log_every_steps=1",
)
FIRST, LAST = "train.steps=3", "train.steps=6"
ARTEFACTS = ("cells.h5ad", "store", "run", "tuned", "hf", "converted")


def main() -> int:
    """Makes the archive."""
    project, archive = (Path(word).resolve() for word in sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(project, folder)
        with tarfile.open(archive, "w:xz", preset=9) as packed:
            packed.add(folder, ".", filter=_plain)
    print(f"{archive}: {archive.stat().st_size:,} bytes")
    return 0


def make(project: Path, folder: Path) -> None:
    """Leaves everything in `folder`."""

    def run(script: str, *words: object) -> None:
        command = [project / ".venv/bin/python", project / script, *words]
        # On one core, so by one thread as in tests: the order of a sum depends on their number.
        subprocess.run(["taskset", "-c", "0", *map(str, command)], cwd=folder, check=True)

    def pretrain(*words: object) -> None:
        run("launch/pretrain.py", "data.store=store", *words, *SETTINGS)

    cells().write_h5ad(folder / "cells.h5ad")
    run("data_prep/build_store.py", "--out", "store", "--validation-fraction", "0.2", "cells.h5ad")
    pretrain("run.dir=run", FIRST, "checkpoint.save_every_steps=3")
    tune = ("--checkpoint", "run", "--label", "cell_type", "--store", "store", "run.dir=tuned")
    run("launch/finetune.py", *tune, FIRST, *SETTINGS[4:])
    vocabulary = ("--vocabulary", "store/vocabulary.json")
    run("launch/convert.py", "to-hf", "run", "--out", "hf")
    run("launch/convert.py", "from-hf", "hf", "--out", "converted", *vocabulary)
    expected = folder / "expected"
    expected.mkdir()
    for model in ("run", "converted"):
        words = ("--checkpoint", model, "--input", "cells.h5ad", "--output")
        run("launch/embed.py", *words, expected / f"{model}.npy")
    words = ("--checkpoint", "run", "--store", "store", "--split", "validation")
    run("launch/evaluate.py", *words, "--json", expected / "evaluation.json")
    shutil.copytree(folder / "run", folder / "resumed")
    pretrain("run.dir=resumed", LAST, "checkpoint.save_every_steps=3")
    shutil.move(folder / "resumed/metrics.jsonl", expected / "metrics.jsonl")
    shutil.rmtree(folder / "resumed")
    (expected / "machine.json").write_text(json.dumps({"processor": processor()}))


def cells() -> anndata.AnnData:
    """Cells of two types, whose counts differ in half of the genes."""
    rng = np.random.default_rng(13)
    kind_N = np.arange(NUM_CELLS) % 2
    mean_NG = np.where((np.arange(NUM_GENES) % 2)[None, :] == kind_N[:, None], 3.0, 0.6)
    counts = sparse.csr_matrix(rng.poisson(mean_NG).astype(np.float32))
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical.from_codes(kind_N, ["a", "b"])},
        index=[f"cell{number}" for number in range(NUM_CELLS)],
    )
    genes = [f"ENSG{number:011d}" for number in range(NUM_GENES)]
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def processor() -> str:
    """Its model: the last bits of floating-point sums depend on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Without its owner, and without what no later version reads."""
    if Path(entry.name).name == "tensorboard":
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    sys.exit(main())
