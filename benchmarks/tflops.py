#!/usr/bin/env python
"""Speed of a training step, in numbers that can be compared and checked.

    python benchmarks/tflops.py                      this machine's usual settings
    python benchmarks/tflops.py --model 106m --packing padded packed --micro-batch 16 32
        --attention te flash --steps 20 --json benchmarks/results/tflops_h200.json

Every combination of the listed values is a row; what cannot be, or finds no memory, is left out
with its reason. Made-up cells go through the real feed, model, loss and optimizer: of full length
where padded, of 1,300 tokens on average where packed. TFLOPS are padded-equivalent (cells of full
length, all predicted) and executed (real tokens, predicted positions); MFU is the share of executed
FLOPs in the fastest matrix product of this precision measured here.

Needs torch, megatron-core, numpy, numba and omegaconf, nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import itertools
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.harness import common
from benchmarks.harness.pages import TFLOPS_COLUMNS, table
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.config.sections import Attention, ParallelConfig, Precision
from geneformer_mcore.errors import ConfigError, GeneformerError
from geneformer_mcore.exit_codes import DEFECT, FINISHED, run

if TYPE_CHECKING:
    import torch

    from benchmarks.harness.tflops_rows import Setting

PACKINGS = ("padded", "packed")
FAILED = "failed: "


def main() -> int:
    arguments = _arguments()
    problems = common.too_small(arguments, steps=1, warmup=0, micro_batch=1)
    common.refuse(problems, [arguments.json])
    ignore_known_warnings()
    import torch

    from geneformer_mcore.distributed import device, groups

    on_gpu = torch.cuda.is_available()
    arguments.steps = arguments.steps or (20 if on_gpu else 3)
    arguments.warmup = (3 if on_gpu else 1) if arguments.warmup is None else arguments.warmup
    wanted = grid(arguments, on_gpu)
    reasons = impossible(wanted, arguments.seq_length, torch.device("cuda" if on_gpu else "cpu"))
    here = device.start()
    groups.start(here, ParallelConfig())
    failed = _measure_all(wanted, reasons, arguments, here)
    groups.stop()
    return DEFECT if failed else FINISHED


def grid(arguments: argparse.Namespace, on_gpu: bool) -> list[Setting]:
    """Every combination of the options, with this machine's defaults: the card's micro batches on a
    GPU, and what takes seconds on a CPU, where two cells are the least that can be packed."""
    from benchmarks.harness.tflops_rows import Setting

    models = arguments.model or (["106m", "10m"] if on_gpu else ["10m"])
    precisions = arguments.precision or (["bf16"] if on_gpu else ["fp32"])
    # torch has no fused attention with dropout on a CPU: show what the card's dropout costs there.
    dropouts = arguments.attention_dropout or ([None] if on_gpu else [None, 0.0])
    compiled = [{"auto": None, "no": False, "yes": True}[word] for word in arguments.compile]
    found = []
    for model, precision, packing in itertools.product(models, precisions, arguments.packing):
        usual = {"10m": 32, "106m": 16}[model] if on_gpu else 1 + (packing == "packed")
        sizes = arguments.micro_batch or [usual]
        others = itertools.product(arguments.attention, dropouts, sizes, compiled)
        found += [Setting(model, precision, packing, *other) for other in others]
    return found


def impossible(wanted: list[Setting], seq_length: int, here: torch.device) -> dict[Setting, str]:
    """Reasons of the settings that cannot be measured here. Raises ConfigError if none can."""
    from geneformer_mcore.model.attention import select

    reasons = {}
    for setting in wanted:
        try:
            config = setting.config(seq_length)
            select.choose(config.model, here, config.train.precision, config.data.packing)
        except GeneformerError as error:
            reasons[setting] = str(error)
    if len(reasons) == len(set(wanted)):
        raise ConfigError("\n".join(dict.fromkeys(reasons.values())))
    return reasons


def _measure_all(
    wanted: list[Setting], reasons: dict[Setting, str], known: argparse.Namespace, here: Any
) -> bool:
    """Every row in turn, kept as soon as it is there. True if one raised an error of ours."""
    import torch

    from benchmarks.harness.tflops_rows import measured_row
    from geneformer_mcore.metrics import peak_flops
    from geneformer_mcore.model.megatron_config import DTYPES

    peaks: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for setting in wanted:
        name, reason = setting.precision, reasons.get(setting, "")
        try:
            if not reason:
                peaks[name] = peaks.get(name) or peak_flops.measured_peak(
                    here, DTYPES[Precision(name)]
                )
                given = (known.seq_length, here, known.warmup, known.steps, peaks[name])
                rows.append(measured_row(setting, *given))
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except GeneformerError as error:
            reason = str(error)
        except Exception as error:  # the other rows are worth having all the same
            traceback.print_exc()
            reason = f"{FAILED}{type(error).__name__}: {error}"
        if reason:
            skipped.append(asdict(setting) | {"reason": reason})
            print(f"not measured: {setting}: {reason}", flush=True)
        sizes = {"steps": known.steps, "warmup": known.warmup}
        common.save_results(known.json, {"rows": rows, "skipped": skipped, **sizes})
        if here.type == "cuda":
            torch.cuda.empty_cache()  # the next model must find all memory
    print(table(TFLOPS_COLUMNS, rows))
    return any(each["reason"].startswith(FAILED) for each in skipped)


def _arguments() -> argparse.Namespace:
    parser = common.parser_of(__doc__)

    def listed(name: str, about: str, **known: Any) -> None:
        parser.add_argument(name, nargs="+", help=about, **known)

    add = parser.add_argument
    precisions, attentions = ([each.value for each in kind] for kind in (Precision, Attention))
    listed("--model", "default: 10m, and 106m on a GPU", choices=common.CONFIGS)
    listed("--precision", "default: bf16 on a GPU, else fp32", choices=precisions)
    listed("--packing", "default: both", choices=PACKINGS, default=PACKINGS)
    listed("--attention", "default: auto", choices=attentions, default=["auto"])
    listed("--attention-dropout", "default: the card's, on a CPU also 0", type=float, metavar="P")
    about = "packed: cells of full length that fit; default: the card's on a GPU, else 1 or 2"
    listed("--micro-batch", about, type=int, metavar="CELLS")
    about = "model.compile; default: auto, which is yes on a GPU"
    listed("--compile", about, choices=["auto", "no", "yes"], default=["auto"])
    add("--seq-length", type=int, default=common.SEQ_LENGTH)
    add("--steps", type=int, help="measured steps of a row (default: 20 on a GPU, else 3)")
    add("--warmup", type=int, help="unmeasured steps before them (default: 3 on a GPU, else 1)")
    add("--json", type=Path, metavar="OUT", help="keep the rows here")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
