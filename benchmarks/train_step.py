#!/usr/bin/env python
"""Speed of a training step, compared with the models a user would otherwise train.

    python benchmarks/train_step.py --cells FLAT_COPY --json out.json
    python benchmarks/train_step.py --cells a.h5ad b.h5ad --vocabulary gc30m.json [--make]

Every contestant takes full steps (zero gradients, forward, backward, clip to norm 1, AdamW) over
the same global batches of the same cells, masked alike, with the same sizes and hyperparameters:
ours, padded and packed; Hugging Face's BertForMaskedLM with dynamic padding, and padded to the full
length as NVIDIA's stack does; Megatron-Core's own BertModel; on a GPU, Transformer Engine's layers.

BertForMaskedLM is post-LN and has token types, so it is not the same function and its losses are
its own: layers, widths, vocabulary and FLOPs are equal. Megatron-Core's BertModel is the same
function as ours, with the same first weights: without dropout its first loss equals ours.

Each takes its turns in a process of its own. First each tries every micro batch and keeps the
fastest; then all take turns in rounds, A B C A B C. A contestant whose package is not there, or
that fails, is listed as skipped. BertForMaskedLM comes with

    pip install -c requirements.lock transformers        (version as measured: setup.py, [bench])

A flat copy of tokens (geneformer_mcore/store/local_cache.py) is a folder: that which pretraining
with data.cache_dir=DIR makes, or that which is made here of files of counts, through a store, in
--work. With one, ours needs torch, megatron-core, numpy, numba and omegaconf only: carry it to a
bare GPU machine. The cells' genes must be tokens of a vocabulary of at most 25,429.
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
import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.harness.common import (
    CONFIGS,
    ROOT,
    VOCABULARY,
    in_rounds,
    parser_of,
    refuse,
    save_results,
    too_small,
    unknown_names,
    why_failed,
)
from benchmarks.harness.peers.steps import NAMES, contestants
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io.files import write_json

if TYPE_CHECKING:
    from benchmarks.harness.peers.steps import Job

TIMEOUT_S = 3600
_JOB, _RESULT, _TURNS = "job.json", "turn.json", "turns.jsonl"
_ON_CPU: dict[str, Any] = {
    "precision": "fp32",
    # torch has no fused attention with dropout on a CPU.
    "dropout": 0.0,
    "batch": 16,
    "micro": (1, 2, 4, 8, 16),
    "steps": 1,
}
_ON_GPU: dict[str, Any] = {
    "precision": "bf16",
    "dropout": None,
    "batch": 512,
    "micro": (8, 16, 32, 64, 128),
    "steps": 5,
}


def main() -> int:
    """Find or make the cells, let all take turns, print the table; or take one turn."""
    arguments = _arguments()
    ignore_known_warnings()
    if arguments.turn:
        return _child(arguments)
    # The settings have a check of their own.
    problems = too_small(
        ("--rounds", arguments.rounds, 1),
        ("--steps", arguments.steps, 1),
        ("--warmup", arguments.warmup, 0),
        ("--global-batch", arguments.global_batch, 1),
        *(("--micro-batches", micro, 1) for micro in arguments.micro_batches or ()),
    )
    problems += unknown_names("--only", arguments.only, NAMES)
    refuse(problems, (arguments.json, arguments.work / _JOB))
    import torch

    on_gpu = torch.cuda.is_available()
    fill_in(arguments, _ON_GPU if on_gpu else _ON_CPU)
    job = _job(arguments)
    if arguments.make:
        print(f"The flat copy: {job.cells}")
        return 0
    write_json(arguments.work / _JOB, asdict(job))
    return _measure(arguments, job, on_gpu)


def fill_in(arguments: argparse.Namespace, usual: dict[str, Any]) -> None:
    """Set this machine's defaults, and the micro batches that fit into the global batch."""
    arguments.precision = arguments.precision or usual["precision"]
    if arguments.attention_dropout is None:
        arguments.attention_dropout = usual["dropout"]
    arguments.global_batch = arguments.global_batch or usual["batch"]
    arguments.steps = arguments.steps or usual["steps"]
    sizes = sorted(set(arguments.micro_batches or usual["micro"]))
    arguments.micro_batches = [micro for micro in sizes if arguments.global_batch % micro == 0]
    if not arguments.micro_batches:
        raise ConfigError(
            f"--global-batch ({arguments.global_batch}) must be a multiple of one of the "
            f"--micro-batches at least, and those are {sizes}."
        )


def _job(arguments: argparse.Namespace) -> Job:
    from benchmarks.harness.peers.steps import Job
    from benchmarks.harness.train_step import cells as step_cells
    from geneformer_mcore.config import plan

    changes = [
        f"train.precision={arguments.precision}",
        f"train.global_batch_size={arguments.global_batch}",
        f"train.micro_batch_size={arguments.micro_batches[0]}",
        f"data.seq_length={arguments.seq_length}",
    ]
    if arguments.attention_dropout is not None:
        changes.append(f"model.attention_dropout={arguments.attention_dropout}")
    sizes = {"steps": arguments.steps, "warmup": arguments.warmup}
    plan(Job("", arguments.model, tuple(changes)).config(), world_size=1)
    found = step_cells.find(arguments.cells)
    folder = found or step_cells.make(arguments.cells, arguments.vocabulary, arguments.work)
    step_cells.check(folder, VOCABULARY, arguments.global_batch)
    return Job(str(folder), arguments.model, tuple(changes), **sizes)


def _measure(arguments: argparse.Namespace, job: Job, on_gpu: bool) -> int:
    from benchmarks.harness.train_step import rows as step_rows
    from benchmarks.harness.train_step.turn import fastest, tune

    chosen = arguments.only or NAMES
    kinds = {name: kind for name, kind in contestants().items() if name in chosen}
    labels = {name: kind.label for name, kind in kinds.items()}
    reasons = {name: kind.why_not(job, on_gpu) for name, kind in kinds.items()}
    failures = {name: why for name, why in reasons.items() if why}
    sizes, turn = arguments.micro_batches, partial(_turn, arguments.work)
    tuning = tune(turn, labels, sizes, failures)
    micro = {name: fastest(tried, sizes) for name, tried in tuning.items()}
    turns = in_rounds(
        lambda name, _: turn(name, micro[name]), labels, arguments.rounds, failures, step_rows.rate
    )
    rows = [
        step_rows.row(
            *(name, kind, turns[name], micro[name], tuning[name]),
            not_measured=failures.get(name, ""),
            shape=job.shape(),
        )
        for name, kind in kinds.items()
    ]
    step_rows.add_ratios(rows)
    conditions = _conditions(arguments, job)
    print(f"\n{step_rows.table(rows)}\n\n{conditions}\n{step_rows.LEGEND}")
    if arguments.json:
        content = {"rows": rows, "conditions": conditions, "settings": job.changes}
        save_results(arguments.json, content)
    return 0


def _turn(work: Path, name: str, micro: int) -> tuple[dict[str, Any], str]:
    """(the measurements of a turn in a process of its own, why it failed). Kept at once, so that a
    comparison that is broken off leaves what it had."""
    command = [sys.executable, str(Path(__file__).resolve()), "--work", str(work)]
    command += ["--cells", str(work), "--turn", f"{name}:{micro}"]
    why = why_failed(command, TIMEOUT_S)
    found = {} if why else json.loads((work / _RESULT).read_text())
    with (work / _TURNS).open("a") as turns:
        turns.write(json.dumps({"name": name, "micro_batch": micro, "why_not": why} | found) + "\n")
    return found, why


def _child(arguments: argparse.Namespace) -> int:
    from benchmarks.harness.peers.steps import Job
    from benchmarks.harness.train_step.turn import take_turn
    from geneformer_mcore.io import files

    name, _, micro = arguments.turn.partition(":")
    task = json.loads((arguments.work / _JOB).read_text())
    job = Job(**(task | {"changes": tuple(task["changes"])}))
    files.write_json(arguments.work / _RESULT, take_turn(contestants()[name], job, int(micro)))
    return 0


def _conditions(arguments: argparse.Namespace, job: Job) -> str:
    config = job.config()
    return (
        f"Model {arguments.model}, {config.train.precision.value}, at most "
        f"{config.data.seq_length} tokens, hidden dropout {config.model.hidden_dropout}, attention "
        f"dropout {config.model.attention_dropout}; global batches of {arguments.global_batch} "
        f"cells; {job.steps} measured step(s) after {job.warmup} unmeasured, median of "
        f"{arguments.rounds} round(s); micro batch: the fastest of {arguments.micro_batches}."
    )


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--cells", type=Path, nargs="+", required=True, metavar="PATH", help="flat copy, or counts")
    add("--vocabulary", type=Path, metavar="FILE.json", help="of counts; default: their own genes")
    add("--work", type=Path, default=ROOT / "build" / "train_step", help="for what is made")
    add("--make", action="store_true", help="make the flat copy, print where it is, and end")
    add("--model", choices=CONFIGS, default="10m")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 on a GPU, else fp32")
    add("--attention-dropout", type=float, help="default: the card's on a GPU, else 0")
    add("--seq-length", type=int, default=2048)
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
