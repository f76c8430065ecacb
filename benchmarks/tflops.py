#!/usr/bin/env python
"""How fast a training step is, in numbers that can be compared and checked.

    python benchmarks/tflops.py                      this machine's usual settings
    python benchmarks/tflops.py --model 106m --packing padded packed --micro-batch 16 32
        --attention te flash --steps 20 --json benchmarks/results

Every combination of what is listed is a row; what cannot be, or finds no memory, is left out with
its reason. Cells go through the real feed, model, loss and optimizer: made-up ones of full length
where they are padded, and of a mean of 1,300 tokens where they are packed (--lengths), or those of
a flat copy of tokens (--cells, see geneformer_mcore/store/local_cache.py). Results are kept row by row.

Needs torch, megatron-core, numpy and omegaconf, nothing else.
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

from benchmarks.side_by_side.sizes import CONFIGS, VOCABULARY
from benchmarks.side_by_side.tflops_cells import FULL, Cells, of_flat_copy
from benchmarks.side_by_side.tflops_grid import PACKINGS, Asked, grid, usual
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.config.sections import Attention, ParallelConfig, Precision
from geneformer_mcore.errors import ConfigError, DataError
from geneformer_mcore.exit_codes import DEFECT, FINISHED, run
from geneformer_mcore.io.files import check_output

if TYPE_CHECKING:
    from benchmarks.side_by_side.tflops_run import Conditions, Results


def main() -> int:
    """Measures every asked-for setting and prints the table."""
    arguments = _arguments()
    check(arguments)
    ignore_known_warnings()
    import torch

    from benchmarks.side_by_side import tflops_run
    from geneformer_mcore.distributed import device, groups

    on_gpu = torch.cuda.is_available()
    out = arguments.json
    if out is not None:
        out = tflops_run.file_in(out) if out.is_dir() else out
        check_output(out, overwrite=True)
    conditions = tflops_run.Conditions(
        seq_length=arguments.seq_length,
        num_micro_batches=arguments.micro_batches_per_step,
        steps=arguments.steps or (20 if on_gpu else 3),
        warmup=(3 if on_gpu else 1) if arguments.warmup is None else arguments.warmup,
        flat=_flat(arguments),
        seconds=arguments.seconds,
        out=out,
    )
    asked = grid(_asked(arguments, on_gpu), on_gpu)
    # Before anything is begun.
    tflops_run.possible(asked, conditions, torch.device("cuda" if on_gpu else "cpu"))
    here = device.start()
    groups.start(here, ParallelConfig())
    results = tflops_run.measure_all(asked, conditions, here)
    groups.stop()
    _show(results, conditions)
    return DEFECT if results.failed else FINISHED


def _show(results: Results, conditions: Conditions) -> None:
    import torch

    from benchmarks.side_by_side.tflops_rows import HOW, table
    from geneformer_mcore.metrics.provenance import machine

    peaks = ", ".join(f"{name} {peak / 1e12:.3g}" for name, peak in results.peaks.items())
    print(f"\n{table(results.rows, results.skipped)}")
    how = {"steps": conditions.steps, "warmup": conditions.warmup, "peaks": peaks}
    print(HOW.format(seq_length=conditions.seq_length, **how))
    print(f"{machine()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError that names every argument by which nothing can be measured. Settings have
    a check of their own, row by row."""
    ranges = (
        ("--steps", arguments.steps, 1),
        ("--warmup", arguments.warmup, 0),
        ("--micro-batches-per-step", arguments.micro_batches_per_step, 1),
        *(("--micro-batch", size, 1) for size in arguments.micro_batch or ()),
        *(("--lengths", mean, 2) for mean in arguments.lengths or () if mean != FULL),
    )
    problems = [
        f"{name} must be at least {low}, and is {value}."
        for name, value, low in ranges
        if value is not None and value < low
    ]
    problems += [
        f"--lengths ({mean}) must not exceed --seq-length ({arguments.seq_length})."
        for mean in arguments.lengths or ()
        if mean > arguments.seq_length
    ]
    if arguments.cells and arguments.lengths:
        problems.append("--cells brings cells with lengths of their own: leave out --lengths.")
    if problems:
        raise ConfigError("\n".join(problems))


def _flat(arguments: argparse.Namespace) -> Cells | None:
    if arguments.cells is None:
        return None
    from benchmarks.side_by_side import step_cells

    folder = step_cells.find([arguments.cells])
    if folder is None:
        raise DataError(f"{arguments.cells} holds no flat copy of tokens, or more than one.")
    step_cells.check(folder, VOCABULARY, global_batch=1)
    return of_flat_copy(folder, arguments.seq_length)


def _asked(arguments: argparse.Namespace, on_gpu: bool) -> Asked:
    """What was said, and where nothing was, what is usual here."""
    usually = usual(on_gpu)
    return Asked(
        models=arguments.model or usually["models"],
        precisions=arguments.precision or usually["precisions"],
        packings=arguments.packing,
        lengths=[FULL] if arguments.cells else arguments.lengths or [],
        attentions=arguments.attention,
        dropouts=arguments.attention_dropout or usually["dropouts"],
        micro_batches=arguments.micro_batch or [],
        compiled=[_COMPILED[word] for word in arguments.compile],
    )


_COMPILED = {"auto": None, "no": False, "yes": True}


def _length(word: str) -> int:
    return FULL if word == "full" else int(word)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def listed(name: str, about: str, **known: object) -> None:
        parser.add_argument(name, nargs="+", help=about, **known)  # type: ignore[arg-type]

    add = parser.add_argument
    listed("--model", "default: 10m, and 106m on a GPU", choices=CONFIGS)
    listed("--precision", "default: bf16 on a GPU, else fp32", choices=_values(Precision))
    listed("--packing", "default: both", choices=PACKINGS, default=PACKINGS)
    about = "full, or mean tokens of made-up cells; default: full if padded, 1300 if packed"
    listed("--lengths", about, type=_length, metavar="MEAN")
    listed("--attention", "default: auto", choices=_values(Attention), default=["auto"])
    listed("--attention-dropout", "default: the card's, on a CPU also 0", type=float, metavar="P")
    about = "packed: cells of full length that fit; default: the card's on a GPU, else 1 or 2"
    listed("--micro-batch", about, type=int, metavar="CELLS")
    about = "model.compile; default: auto, which is yes on a GPU"
    listed("--compile", about, choices=_COMPILED, default=["auto"])
    add("--micro-batches-per-step", type=int, default=1, metavar="N", help="default: 1")
    add("--cells", type=Path, metavar="FLAT", help="a flat copy of tokens, for made-up cells")
    add("--seq-length", type=int, default=2048)
    add("--steps", type=int, help="measured steps of a row (default: 20 on a GPU, else 3)")
    add("--warmup", type=int, help="unmeasured steps before them (default: 3 on a GPU, else 1)")
    add("--seconds", type=float, help="begin no row later than this")
    add("--json", type=Path, metavar="OUT", help="keep the rows in this file, or in this folder")
    return parser.parse_args()


def _values(choices: type[Attention] | type[Precision]) -> list[str]:
    return [each.value for each in choices]


if __name__ == "__main__":
    run(main)
