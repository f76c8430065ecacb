#!/usr/bin/env python
"""Everything worth knowing of a GPU that is lent for a few minutes, in one unattended command.

    python benchmarks/gpu_session.py --out DIR [--cells FLAT]
    python benchmarks/gpu_session.py --out DIR --only machine tflops_106m     some of its parts
    python benchmarks/gpu_session.py --out DIR --toy         the same on a CPU, as small as can be

    machine      what there is, its fastest matrix products
    check_*      each attention: the kernels that run, our model against plain arithmetic in fp64
                 (forward and gradients, bf16 and fp32, padded and packed), statistics of dropout
    tflops_*     benchmarks/tflops.py for both models, padded and packed at a mean of 1,300 tokens
    train_step_* benchmarks/train_step.py: ours and its peers on the same cells

Each part is a process with a time of its own, and what it has found is written at once: one that
crashes or hangs costs no other. What needs Transformer Engine is left out, with that reason, where
it is not installed, and FlashAttention-2 inside torch does its work. DIR/summary.json holds the
bars; DIR/tflops_GPU.json is for benchmarks/results.

Needs torch, megatron-core, numpy, numba and omegaconf. Cells: a flat copy, or made-up tokens.
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
import os
import tempfile

from benchmarks.harness.common import VOCABULARY, parser_of, refuse
from benchmarks.harness.session.parts import ENDED, Part, run_all, summarise
from benchmarks.harness.tflops.settings import MEAN_TOKENS, made_up
from benchmarks.harness.train_step import cells as step_cells
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import DEFECT, FINISHED, run
from geneformer_mcore.store.local_cache import ensure

HERE = Path(__file__).resolve().parent
SECONDS = 470.0
"""Under eight minutes, the end included."""
CHECKED, CHECKED_TOY = ("te", "flash", "sdpa"), ("te", "sdpa")


def main() -> int:
    """Run all parts and report them; or be one of them."""
    arguments = _arguments()
    ignore_known_warnings()
    if arguments.part:
        return _child(arguments)
    out = arguments.out.resolve()
    refuse([], [out / "session.json"])
    with tempfile.TemporaryDirectory() as work:
        cells = _cells(arguments.cells, Path(work), 64 if arguments.toy else 2048)
        parts = toy_parts(out, cells) if arguments.toy else all_parts(out, cells)
        parts = _chosen(parts, arguments.only)
        outcomes = run_all(parts, out, arguments.seconds)
    print(summarise(out))
    return FINISHED if all(each.state == ENDED for each in outcomes) else DEFECT


def all_parts(out: Path, cells: Path) -> list[Part]:
    """The parts with a GPU, the most needed first."""
    packings = ("--packing", "padded", "packed", "--attention", "te", "flash", "--steps", "10")
    peers = ("--warmup", "1", "--rounds", "1", "--cells", str(cells))
    return [
        _own("machine", out, 45),
        *(_own(f"check_{name}", out, 60, "--seq-length", "1024") for name in CHECKED),
        _tflops("106m", out, 100, *packings, "--micro-batch", "16", "32", "64", "--seconds", "75"),
        _tflops("10m", out, 80, *packings, "--micro-batch", "64", "128", "--seconds", "60"),
        _train_step("106m", out, 130, *peers, "--global-batch", "128", "--micro-batches", "32"),
        _train_step("10m", out, 110, *peers, "--global-batch", "512", "--micro-batches", "64"),
    ]


def _chosen(parts: list[Part], names: list[str] | None) -> list[Part]:
    there = [part.name for part in parts]
    unknown = [name for name in names or () if name not in there]
    if unknown:
        raise ConfigError(
            f"--only must name parts of a session ({', '.join(there)}), and names "
            f"{', '.join(unknown)}."
        )
    return [part for part in parts if not names or part.name in names]


def toy_parts(out: Path, cells: Path) -> list[Part]:
    """The same on a CPU: every part in a few seconds, to know that it runs."""
    small = ("--seq-length", "64", "--steps", "1", "--warmup", "0")
    rows = ("--attention", "auto", "te", "--attention-dropout", "0.1", "--micro-batch", "2")
    peers = ("--global-batch", "4", "--micro-batches", "4", "--rounds", "1", "--cells", str(cells))
    only = ("--only", "ours_packed", "te_layers")
    return [
        _own("machine", out, 200),
        *(_own(f"check_{name}", out, 300, "--seq-length", "64") for name in CHECKED_TOY),
        _tflops("10m", out, 300, *small, *rows, "--lengths", "40"),
        _train_step("10m", out, 300, *small, *peers, *only),
    ]


def _own(name: str, out: Path, budget_s: float, *options: str) -> Part:
    command = [sys.executable, str(HERE / "gpu_session.py"), "--part", name, "--out", str(out)]
    return Part(name, [*command, *options], budget_s)


def _tflops(model: str, out: Path, budget_s: float, *options: str) -> Part:
    name = f"tflops_{model}"
    command = [sys.executable, str(HERE / "tflops.py"), "--model", model, *options]
    return Part(name, [*command, "--json", str(out / "parts" / f"{name}.json")], budget_s)


def _train_step(model: str, out: Path, budget_s: float, *options: str) -> Part:
    name = f"train_step_{model}"
    command = [sys.executable, str(HERE / "train_step.py"), "--model", model, *options]
    command += ["--work", str(out / "parts" / name), "--json", str(out / f"{name}.json")]
    return Part(name, command, budget_s)


def _child(arguments: argparse.Namespace) -> int:
    # Transformer Engine says which of its kernels it takes, into this part's log, and raises rather
    # than fall back to attention that keeps every score in memory. Timed parts must be left alone.
    os.environ.update(NVTE_DEBUG="1", NVTE_DEBUG_LEVEL="2", NVTE_UNFUSED_ATTN="0")
    from benchmarks.harness.session import check

    kind, _, name = arguments.part.partition("_")
    if kind == "machine":
        sound = check.machine(arguments.out)
    else:
        sound = check.check(name, arguments.out, arguments.seq_length)
    return FINISHED if sound else DEFECT


def _cells(flat: Path | None, work: Path, seq_length: int) -> Path:
    """The given flat copy, or one of made-up cells."""
    if flat is not None:
        return step_cells.flat_copy(flat).resolve()
    cells = made_up(MEAN_TOKENS * seq_length // 2048, seq_length, VOCABULARY)
    num_tokens = round(cells.mean_tokens * len(cells.source))
    return ensure(cells.source, "made_up_cells", num_tokens, work).folder


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for all results")
    add("--cells", type=Path, metavar="FLAT", help="a flat copy of tokens, for made-up cells")
    add("--only", nargs="+", metavar="PART", help="these parts; default: all")
    add("--toy", action="store_true", help="as small as can be, also without a GPU")
    add("--seconds", type=float, default=SECONDS, help=f"for all parts (default: {SECONDS:g})")
    add("--part", help=argparse.SUPPRESS)
    add("--seq-length", type=int, default=1024, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
