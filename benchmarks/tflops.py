#!/usr/bin/env python
"""Speed of a training step, in numbers that can be compared and checked.

    python benchmarks/tflops.py                      this machine's usual settings
    python benchmarks/tflops.py --model 106m --packing padded packed --micro-batch 16 32
        --attention te flash --steps 20 --json benchmarks/results

Every combination of the listed values is a row; what cannot be, or finds no memory, is left out
with its reason. Cells go through the real feed, model, loss and optimizer: made-up ones of full
length where they are padded, and of a mean of 1,300 tokens where they are packed (--lengths), or
those of a flat copy of tokens (--cells, see geneformer_mcore/store/local_cache.py). Results are
kept row by row.

Needs torch, megatron-core, numpy, numba and omegaconf, nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where a tokenize.py would hide Python's own: the project, since a GPU
    # machine may lack the install.
    sys.path.remove(sys.path[0])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from typing import TYPE_CHECKING

from benchmarks.harness.common import CONFIGS, VOCABULARY, parser_of, refuse, too_small
from benchmarks.harness.tflops.settings import (
    FULL,
    PACKINGS,
    Cells,
    Conditions,
    grid,
    of_flat_copy,
)
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.config.sections import Attention, ParallelConfig, Precision
from geneformer_mcore.exit_codes import DEFECT, FINISHED, run

if TYPE_CHECKING:
    from benchmarks.harness.tflops.run import Results


def main() -> int:
    """Measure every requested setting and print the table."""
    arguments = _arguments()
    refuse(_problems(arguments))
    ignore_known_warnings()
    import torch

    from benchmarks.harness.tflops import run as tflops_run
    from geneformer_mcore.distributed import device, groups

    on_gpu = torch.cuda.is_available()
    out = arguments.json
    if out is not None:
        out = tflops_run.file_in(out) if out.is_dir() else out
        refuse([], [out])
    conditions = Conditions(
        seq_length=arguments.seq_length,
        num_micro_batches=arguments.micro_batches_per_step,
        steps=arguments.steps or (20 if on_gpu else 3),
        warmup=(3 if on_gpu else 1) if arguments.warmup is None else arguments.warmup,
        flat=_flat(arguments),
        seconds=arguments.seconds,
        out=out,
    )
    wanted = grid(arguments, on_gpu)
    # Before anything is begun.
    tflops_run.possible(wanted, conditions, torch.device("cuda" if on_gpu else "cpu"))
    here = device.start()
    groups.start(here, ParallelConfig())
    results = tflops_run.measure_all(wanted, conditions, here)
    groups.stop()
    _show(results, conditions)
    return DEFECT if results.failed else FINISHED


def _show(results: Results, conditions: Conditions) -> None:
    import torch

    from benchmarks.harness.tflops.run import HOW, table
    from geneformer_mcore.metrics.provenance import machine

    peaks = ", ".join(f"{name} {peak / 1e12:.3g}" for name, peak in results.peaks.items())
    print(f"\n{table(results)}")
    how = {"steps": conditions.steps, "warmup": conditions.warmup, "peaks": peaks}
    print(HOW.format(seq_length=conditions.seq_length, **how))
    print(f"{machine()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")


def _problems(arguments: argparse.Namespace) -> list[str]:
    """Unusable arguments. Settings have a check of their own, row by row."""
    means = [mean for mean in arguments.lengths or () if mean != FULL]
    problems = too_small(
        ("--steps", arguments.steps, 1),
        ("--warmup", arguments.warmup, 0),
        ("--micro-batches-per-step", arguments.micro_batches_per_step, 1),
        *(("--micro-batch", size, 1) for size in arguments.micro_batch or ()),
        *(("--lengths", mean, 2) for mean in means),
    )
    problems += [
        f"--lengths ({mean}) must not exceed --seq-length ({arguments.seq_length})."
        for mean in means
        if mean > arguments.seq_length
    ]
    if arguments.cells and arguments.lengths:
        problems.append("--cells brings cells with lengths of their own: leave out --lengths.")
    return problems


def _flat(arguments: argparse.Namespace) -> Cells | None:
    if arguments.cells is None:
        return None
    from benchmarks.harness.train_step import cells as step_cells

    folder = step_cells.flat_copy(arguments.cells)
    step_cells.check(folder, VOCABULARY, global_batch=1)
    return of_flat_copy(folder, arguments.seq_length)


def _length(word: str) -> int:
    return FULL if word == "full" else int(word)


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)

    def listed(name: str, about: str, **known: object) -> None:
        parser.add_argument(name, nargs="+", help=about, **known)  # type: ignore[arg-type]

    add = parser.add_argument
    precisions, attentions = ([each.value for each in kind] for kind in (Precision, Attention))
    listed("--model", "default: 10m, and 106m on a GPU", choices=CONFIGS)
    listed("--precision", "default: bf16 on a GPU, else fp32", choices=precisions)
    listed("--packing", "default: both", choices=PACKINGS, default=PACKINGS)
    about = "full, or mean tokens of made-up cells; default: full if padded, 1300 if packed"
    listed("--lengths", about, type=_length, metavar="MEAN")
    listed("--attention", "default: auto", choices=attentions, default=["auto"])
    listed("--attention-dropout", "default: the card's, on a CPU also 0", type=float, metavar="P")
    about = "packed: cells of full length that fit; default: the card's on a GPU, else 1 or 2"
    listed("--micro-batch", about, type=int, metavar="CELLS")
    about = "model.compile; default: auto, which is yes on a GPU"
    listed("--compile", about, choices=["auto", "no", "yes"], default=["auto"])
    add("--micro-batches-per-step", type=int, default=1, metavar="N", help="default: 1")
    add("--cells", type=Path, metavar="FLAT", help="a flat copy of tokens, for made-up cells")
    add("--seq-length", type=int, default=2048)
    add("--steps", type=int, help="measured steps of a row (default: 20 on a GPU, else 3)")
    add("--warmup", type=int, help="unmeasured steps before them (default: 3 on a GPU, else 1)")
    add("--seconds", type=float, help="begin no row later than this")
    add("--json", type=Path, metavar="OUT", help="keep the rows in this file, or in this folder")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
