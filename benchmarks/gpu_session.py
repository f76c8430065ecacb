#!/usr/bin/env python
"""Everything worth knowing of a GPU that is lent for a few minutes, in one unattended command.

    python benchmarks/gpu_session.py --out DIR [--cells FLAT]
    python benchmarks/gpu_session.py --out DIR --only attention tflops_106m   some of its parts
    python benchmarks/gpu_session.py --out DIR --toy         the same on a CPU, as small as can be

    attention    te, flash, sdpa in bf16 and fp32, padded and packed, forward and gradients, against
                 the formula in fp64
    tflops_*     benchmarks/tflops.py for both models
    train_step_* benchmarks/train_step.py for both models: ours and its peers, on the flat copy FLAT
                 or made-up cells

The parts are commands, run one after the other, each within a time of its own: DIR/PART.json,
PART.log, and the exit codes in session.json. What this machine lacks is left out with the reason.
Needs torch, megatron-core, numpy, numba and omegaconf.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import itertools
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

from benchmarks.harness import common, step_cells
from benchmarks.harness.made_up import MEAN_TOKENS, token_cells
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.exit_codes import DEFECT, FINISHED, run
from geneformer_mcore.store.local_cache import ensure

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
SECONDS = 470.0
"""Under eight minutes, the end included."""
ATTENTION = (("te", "flash", "sdpa"), ("bf16", "fp32"), (True, False))
_ROWS = "--attention te flash --steps 10 --micro-batch"
PARTS = (
    ("tflops", "106m", 100.0, f"{_ROWS} 16 32 64"),
    ("tflops", "10m", 80.0, f"{_ROWS} 64 128"),
    ("train_step", "106m", 130.0, "--global-batch 128 --micro-batches 32"),
    ("train_step", "10m", 110.0, "--global-batch 512 --micro-batches 64"),
)
_SMALL = "--seq-length 64 --steps 1 --warmup 0 --attention-dropout 0.1"
TOY = (
    ("tflops", "10m", 300.0, f"{_SMALL} --attention auto te --micro-batch 2"),
    ("train_step", "10m", 300.0, f"{_SMALL} --global-batch 4 --micro-batches 4 --only ours_packed"),
)
LEAST_S = 10.0
"""With less time than this left no part is begun: it would not get past its imports."""


def main() -> int:
    """Run all parts; or be the one that checks attention."""
    arguments = _arguments()
    ignore_known_warnings()
    out = arguments.out.resolve()
    if arguments.check:
        return DEFECT if check_attention(out) else FINISHED
    cells = step_cells.flat_copy(arguments.cells) if arguments.cells else out / "cells"
    parts = parts_of(out, cells, arguments.toy)
    common.refuse(common.unknown_names("--only", arguments.only, parts), [out / "session.json"])
    chosen = {name: parts[name] for name in parts if name in (arguments.only or parts)}
    if not arguments.cells:
        length = 64 if arguments.toy else common.SEQ_LENGTH
        made = token_cells(MEAN_TOKENS * length // common.SEQ_LENGTH, length, common.VOCABULARY)
        ensure(made, "made_up_cells", round(made.mean_tokens * len(made)), cells)
    ends = run_parts(chosen, out, arguments.seconds)
    return FINISHED if all(end == "0" for end in ends.values()) else DEFECT


def parts_of(out: Path, cells: Path, toy: bool) -> dict[str, tuple[float, list[str]]]:
    """{name: (seconds, command)}, the most needed first."""
    attention = ["gpu_session.py", "--check", "--out", str(out)]
    parts = {"attention": (300.0 if toy else 60.0, attention)}
    for script, model, seconds, options in TOY if toy else PARTS:
        name = f"{script}_{model}"
        words = [f"{script}.py", "--model", model, *options.split()]
        if script == "train_step":
            words += ["--cells", str(cells), "--rounds", "1", "--work", str(out / name)]
        parts[name] = (seconds, [*words, "--json", str(out / f"{name}.json")])
    return parts


def run_parts(
    parts: dict[str, tuple[float, list[str]]], out: Path, seconds: float
) -> dict[str, str]:
    """All parts in turn, within `seconds` together: {name: exit code, or why there is none}."""
    deadline, ends = time.monotonic() + seconds, {}
    for name, (budget_s, words) in parts.items():
        left = min(budget_s, deadline - time.monotonic())
        command = [sys.executable, str(HERE / words[0]), *words[1:]]
        began = time.monotonic()
        ends[name] = "not begun" if left < LEAST_S else _end_of(command, out / f"{name}.log", left)
        print(f"{name}: {ends[name]}, {time.monotonic() - began:.0f} s", flush=True)
        common.save_results(out / "session.json", {"ends": ends})
    return ends


def _end_of(command: list[str], log: Path, seconds: float) -> str:
    """Run a part, killed with all that it has started after `seconds`."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, start_new_session=True, **streams)
        try:
            return str(process.wait(seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "out of time"


def check_attention(out: Path) -> int:
    """Compare each attention with the formula; the number of those that are wrong."""
    import torch

    from geneformer_mcore.config.sections import ParallelConfig
    from geneformer_mcore.distributed import device, groups

    os.environ["NVTE_UNFUSED_ATTN"] = "0"  # an error rather than attention with every score
    here = device.start()
    groups.start(here, ParallelConfig())
    groups.seed_dropout(1, groups.topology())
    checks: list[dict[str, Any]] = []
    for name, precision, packed in itertools.product(*ATTENTION):
        known = {"attention": name, "precision": precision, "packed": packed}
        checks.append(known | compared(str(name), str(precision), bool(packed), here))
        print(checks[-1], flush=True)
        common.save_results(out / "attention.json", {"cuda": torch.version.cuda, "checks": checks})
    groups.stop()
    return sum("wrong" in each for each in checks)


def compared(name: str, precision: str, packed: bool, here: torch.device) -> dict[str, Any]:
    """The largest difference; or the reason why this machine has it not, or what is wrong."""
    from benchmarks.harness.peers.steps import our_stages
    from geneformer_mcore.config import load
    from geneformer_mcore.model import megatron_config
    from geneformer_mcore.model.attention import select, selftest

    changes = [f"model.attention={name}", f"train.precision={precision}", "model.num_layers=1"]
    config, _ = load(None, [*changes, f"data.packing={str(packed).lower()}"])
    kind = config.train.precision
    try:
        select.choose(config.model, here, kind, packed)
        core = megatron_config.transformer_config(config.model, config.parallel, kind, here)
        (stage,) = our_stages(config, core, here, common.VOCABULARY)
    except GeneformerError as error:
        return {"reason": str(error)}
    try:
        return {"difference": selftest.check(stage, here, packed)}
    except (GeneformerError, RuntimeError) as error:  # the next one may be right
        return {"wrong": str(error)}


def _arguments() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for all results")
    add("--cells", type=Path, metavar="FLAT", help="a flat copy of tokens, for made-up cells")
    add("--only", nargs="+", metavar="PART", help="these parts; default: all")
    add("--toy", action="store_true", help="as small as can be, also without a GPU")
    add("--seconds", type=float, default=SECONDS, help=f"for all parts (default: {SECONDS:g})")
    add("--check", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
