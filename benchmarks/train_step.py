#!/usr/bin/env python
"""Speed of a training step, compared with the models a user would otherwise train.

    python benchmarks/train_step.py --cells FLAT_COPY --json out.json

Every contestant takes full steps (zero gradients, forward, backward, clip to norm 1, AdamW) over
the same global batches of the same cells, masked alike, with the same sizes and hyperparameters:
ours, padded and packed; Hugging Face's BertForMaskedLM with dynamic padding, and padded to the full
length as NVIDIA's stack does; Megatron-Core's own BertModel, which is the same function as ours.

Each takes its turns in a process of its own. First each tries every micro batch and keeps the
fastest; then all take turns in rounds, A B C A B C. One whose package is not there (transformers is
in the extra [bench]), or that fails, is listed as not measured. A flat copy of tokens is the folder
that launch/cache_store.py makes of a store. Needs torch, megatron-core, numpy, numba and omegaconf.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # in place of this folder, whose tokenize.py hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.harness import common
from benchmarks.harness.common import CONFIGS, ROOT, SEQ_LENGTH, VOCABULARY
from benchmarks.harness.pages import STEP_COLUMNS, table
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io.files import write_json
from geneformer_mcore.model.flops import ModelShape, Workload, executed_flops

if TYPE_CHECKING:
    from benchmarks.harness.peers.steps import Job

TIMEOUT_S = 3600
_JOB = "job.json"
USUAL: dict[str, tuple[Any, Any]] = {
    "precision": ("fp32", "bf16"),
    "attention_dropout": (0.0, None),  # torch has no fused attention with dropout on a CPU
    "global_batch": (16, 512),
    "micro_batches": ([1, 2, 4, 8, 16], [8, 16, 32, 64, 128]),
    "steps": (1, 5),
}
"""Defaults on a CPU, and on a GPU."""
NAMES = ("ours_packed", "ours_padded", "hf_dynamic", "hf_padded", "megatron")
AGAINST = {"hf_dynamic_ratio": "hf_dynamic", "hf_padded_ratio": "hf_padded"}

Turn: TypeAlias = Callable[[str, int], tuple[dict[str, Any], str]]
"""(contestant, micro batch) -> (what was measured, why it failed)."""
Tried: TypeAlias = dict[int, float | str]
"""{micro batch: cells/s, or why there is none}."""


def main() -> int:
    """Find or make the cells, let all take turns, print the table; or take one turn."""
    arguments = _arguments()
    ignore_known_warnings()
    if arguments.turn:
        return _child(arguments)
    # The settings have a check of their own.
    lows = {"rounds": 1, "steps": 1, "warmup": 0, "global_batch": 1, "micro_batches": 1}
    problems = common.too_small(arguments, **lows)
    problems += common.unknown_names("--only", arguments.only, NAMES)
    common.refuse(problems, (arguments.json, arguments.work / _JOB))
    import torch

    fill_in(arguments, torch.cuda.is_available())
    job = _job(arguments)
    write_json(arguments.work / _JOB, asdict(job))
    _measure(arguments, job)
    return 0


def fill_in(arguments: argparse.Namespace, on_gpu: bool) -> None:
    """Set this machine's defaults, and the micro batches that fit into the global batch."""
    for key, usual in USUAL.items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, usual[on_gpu])
    sizes = sorted(set(arguments.micro_batches))
    arguments.micro_batches = [micro for micro in sizes if arguments.global_batch % micro == 0]
    if not arguments.micro_batches:
        raise ConfigError(
            f"--global-batch ({arguments.global_batch}) must be a multiple of one of the "
            f"--micro-batches at least, and those are {sizes}."
        )


def _job(arguments: argparse.Namespace) -> Job:
    from benchmarks.harness import step_cells
    from benchmarks.harness.peers.steps import Job
    from geneformer_mcore.config import plan

    changes = [
        f"train.precision={arguments.precision}",
        f"train.global_batch_size={arguments.global_batch}",
        f"train.micro_batch_size={arguments.micro_batches[0]}",
        f"data.seq_length={arguments.seq_length}",
    ]
    if arguments.attention_dropout is not None:
        changes.append(f"model.attention_dropout={arguments.attention_dropout}")
    plan(Job("", arguments.model, tuple(changes)).config(), world_size=1)
    folder = step_cells.flat_copy(arguments.cells)
    step_cells.check(folder, VOCABULARY, arguments.global_batch)
    sizes = {"steps": arguments.steps, "warmup": arguments.warmup}
    return Job(str(folder), arguments.model, tuple(changes), **sizes)


def _measure(arguments: argparse.Namespace, job: Job) -> None:
    from benchmarks.harness.peers.steps import CONTESTANTS

    chosen = arguments.only or NAMES
    kinds = {name: kind for name, kind in CONTESTANTS.items() if name in chosen}
    labels = {name: kind.label for name, kind in kinds.items()}
    failures, sizes = common.not_installed(kinds), arguments.micro_batches

    def turn(name: str, micro: int) -> tuple[dict[str, Any], str]:
        words = ("--cells", str(arguments.work), "--turn", f"{name}:{micro}")
        return common.child(__file__, arguments.work, TIMEOUT_S, *words)

    tuning = tune(turn, labels, sizes, failures)
    micro = {name: fastest(tried, sizes) for name, tried in tuning.items()}
    turns = common.in_rounds(
        lambda name, _: turn(name, micro[name]), labels, arguments.rounds, failures, rate
    )
    rows = [
        common.named(name, kind, failures.get(name, ""))
        | {"tuning": {str(size): found for size, found in tuning[name].items()}}
        | ({} if name in failures else measured(turns[name], micro[name], job.shape()))
        for name, kind in kinds.items()
    ]
    add_ratios(rows)
    print(table(STEP_COLUMNS, [row | {"cells": Path(job.cells).name} for row in rows], (), 2))
    content = {"rows": rows, "settings": job.changes, "steps": job.steps, "warmup": job.warmup}
    common.save_results(arguments.json, content)


def tune(
    turn: Turn, labels: dict[str, str], sizes: Sequence[int], failures: dict[str, str]
) -> dict[str, Tried]:
    """The rate of every contestant of `labels` with each micro batch of `sizes`, ascending.

    failures: {contestant: why it is skipped}; who can take no size at all is added
    """
    found: dict[str, Tried] = {name: {} for name in labels}
    if len(sizes) == 1:
        return found  # nothing to choose from
    for name, tried in found.items():
        for size in [] if name in failures else sizes:
            result, why = turn(name, size)
            tried[size] = why or rate(result)
            print(f"micro batch {size}: {labels[name]}: {tried[size]}", flush=True)
            if why:
                break  # a larger one wants more memory still
        if tried and all(isinstance(each, str) for each in tried.values()):
            failures[name] = str(tried[sizes[0]])
    return found


def fastest(tried: Tried, sizes: Sequence[int]) -> int:
    """The micro batch with the highest rate; the first of `sizes` where none has one."""
    rates = {size: found for size, found in tried.items() if not isinstance(found, str)}
    return max(rates, key=lambda size: rates[size], default=sizes[0])


def rate(turn: dict[str, Any]) -> float:
    return turn["cells"] / sum(turn["seconds"])


def measured(
    turns: Sequence[dict[str, Any]], micro_batch: int, shape: ModelShape
) -> dict[str, Any]:
    """The measured part of a row: medians over the rounds, which all have the same cells.

    turns: results of `take_turn` with micro batches of micro_batch cells
    """
    first = turns[0]
    needed = Workload(**first["needed"])
    cells_per_s = statistics.median(map(rate, turns))
    seconds = first["cells"] / cells_per_s
    return {
        "micro_batch": micro_batch,
        "rounds": [rate(turn) for turn in turns],
        "step_s": [turn["seconds"] for turn in turns],
        "first_loss": first["losses"][0],
        "losses": first["losses"],
        "peak_mib": statistics.median(turn["peak_mib"] for turn in turns),
        "cells_per_s": cells_per_s,
        "tokens_per_s": needed.tokens / seconds,
        "tflops_executed": executed_flops(shape, needed) / seconds / 1e12,  # the same for all
        "fill": needed.tokens / first["positions"],
    }


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add the ratios to the two of Hugging Face to every measured row: [median, least, most] of
    the ratios of one round each, or None where that one was not measured."""
    rounds = {found["name"]: found.get("rounds") for found in rows}
    for found in rows:
        for key, other in AGAINST.items() if found.get("rounds") else ():
            pairs = zip(found["rounds"], rounds.get(other) or (), strict=False)
            ratios = [mine / theirs for mine, theirs in pairs]
            known = ratios and [statistics.median(ratios), min(ratios), max(ratios)]
            found[key] = known or None


def _child(arguments: argparse.Namespace) -> int:
    from benchmarks.harness.peers.steps import CONTESTANTS, Job, take_turn

    name, _, micro = arguments.turn.partition(":")
    task = json.loads((arguments.work / _JOB).read_text())
    job = Job(**(task | {"changes": tuple(task["changes"])}))
    write_json(arguments.work / common.TURN, take_turn(CONTESTANTS[name], job, int(micro)))
    return 0


def _arguments() -> argparse.Namespace:
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--cells", type=Path, required=True, metavar="FLAT", help="a flat copy of tokens")
    add("--work", type=Path, default=ROOT / "build" / "train_step", help="for the turns")
    add("--model", choices=CONFIGS, default="10m")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 on a GPU, else fp32")
    add("--attention-dropout", type=float, help="default: the card's on a GPU, else 0")
    add("--seq-length", type=int, default=SEQ_LENGTH)
    add("--global-batch", type=int, metavar="N", help="cells of a step (default: 512 on a GPU, 16)")
    add("--micro-batches", type=int, nargs="+", metavar="N", help="of which the fastest is kept")
    add("--rounds", type=int, default=3, help="turns of each (default: 3)")
    add("--steps", type=int, help="measured steps of a turn (default: 5 on a GPU, 1)")
    add("--warmup", type=int, default=1, help="unmeasured steps before them")
    add("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(NAMES)}")
    add("--json", type=Path, metavar="OUT", help="write the rows here too")
    add("--turn", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
