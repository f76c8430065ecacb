#!/usr/bin/env python
"""How fast a training step is, in numbers that can be compared and checked.

    python benchmarks/tflops.py                      this machine's usual settings
    python benchmarks/tflops.py --model 106m --micro-batch 16 --steps 20 --json out.json

Made-up cells of full length go through the real feed, model, loss and optimizer. Needs torch,
megatron-core, numpy and omegaconf, nothing else.
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
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.commands import run
from geneformer_mcore.config import Config, load, plan
from geneformer_mcore.contracts import NUM_SPECIALS, RaggedCells
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.metrics import kept

if TYPE_CHECKING:
    from geneformer_mcore.train.step import Totals

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 25_429
CONFIGS = {name: ROOT / "configs" / f"geneformer_{name}.yaml" for name in ("10m", "106m")}

HOW = """
padded-equivalent TFLOPS  cells/s x FLOPs of a cell of {seq_length} tokens, all predicted:
                          comparable with published figures; a unit of throughput
executed TFLOPS           real tokens, predicted positions only, attention within each cell
MFU                       executed TFLOPS / {peak:.3g} TFLOPS, the fastest matrix product of this
                          precision measured here just now
FLOPs                     3 x [L (8nh^2 + 4nhf) + 4Lhn^2 + 2mh^2 + 2mhV] per cell of n tokens, m
                          predicted, V = 25,429; 2 per multiply-add; recomputation not counted
rates                     mean work of {steps} steps after {warmup} unmeasured ones, over the median
                          time of one: wait for data, forward, backward, clipping and AdamW on one
                          micro batch
"""

COLUMNS = (
    ("model", "{model}"),
    ("precision", "{precision}"),
    ("attention", "{attention}"),
    ("dropout", "{attention_dropout}"),
    ("micro batch", "{micro_batch}"),
    ("tokens", "{tokens_per_cell:.0f}"),
    ("s/step", "{step_s:.3f}"),
    ("cells/s", "{cells_per_s:.3f}"),
    ("tokens/s", "{tokens_per_s:,.0f}"),
    ("TFLOPS padded-eq.", "{tflops_padded_equivalent:.3f}"),
    ("TFLOPS executed", "{tflops_executed:.3f}"),
    ("MFU", "{mfu:.1%}"),
    ("data wait", "{data_wait_fraction:.1%}"),
)


class MadeUpCells:
    """Cells of `length` tokens: different genes in a random order. Implements TokenSource."""

    num_cells = 512

    def __init__(self, length: int) -> None:
        rng = np.random.default_rng(0)
        self.length = length
        self.genes = np.arange(NUM_SPECIALS, VOCABULARY, dtype=np.uint16)
        rng.shuffle(self.genes)

    def read(self, start: int, stop: int) -> RaggedCells:
        """Rows start..stop-1: windows of one shuffled list of genes, each behind a [CLS]."""
        rows = np.arange(start, stop)
        places = (rows[:, None] * 37 + np.arange(self.length - 1)) % len(self.genes)
        tokens = np.zeros((len(rows), self.length), np.uint16)
        tokens[:, 1:] = self.genes[places]
        offsets = np.arange(len(rows) + 1, dtype=np.int64) * self.length
        return RaggedCells(tokens.ravel(), offsets, rows.astype(np.uint64))


@dataclass(frozen=True)
class Step:
    """One measured step. step_s includes data_wait_s."""

    step_s: float
    data_wait_s: float
    totals: Totals


def main() -> int:
    """Measures every asked-for setting and prints the table."""
    arguments = _arguments()
    check(arguments)
    ignore_known_warnings()
    import torch

    from geneformer_mcore.metrics.ceiling import measured_peak
    from geneformer_mcore.metrics.provenance import provenance
    from geneformer_mcore.model import settings
    from geneformer_mcore.parallel import device, groups

    here = device.start()
    configs = _configs(arguments, here.type == "cuda")
    groups.start(here, configs[0][1].parallel)
    peak = measured_peak(here, settings.DTYPES[configs[0][1].train.precision])
    rows = []
    for model, config in configs:
        steps = list(_steps(config, arguments, here))[arguments.warmup :]
        rows.append(row(config, model, steps, here, peak))
        print(_table(rows[-1:], header=len(rows) == 1), flush=True)
    groups.stop()
    how = {"steps": arguments.steps, "warmup": arguments.warmup, "peak": peak / 1e12}
    print(HOW.format(seq_length=arguments.seq_length, **how))
    where = provenance()
    print(f"{where['machine']}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    if arguments.json:
        kept.save(arguments.json, {"rows": rows, **how, **where})
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError that names every argument by which nothing can be measured, and
    DataError if the results could not be written. The settings have a check of their own."""
    ranges = (
        ("--steps", arguments.steps, 1),
        ("--warmup", arguments.warmup, 0),
        ("--micro-batch", arguments.micro_batch, 1),
        ("--length", arguments.length, 2),
    )
    problems = [
        f"{name} must be at least {low}, and is {value}."
        for name, value, low in ranges
        if value is not None and value < low
    ]
    if arguments.length is not None and arguments.length > arguments.seq_length:
        problems.append(
            f"--length ({arguments.length}) must not exceed --seq-length ({arguments.seq_length})."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    if arguments.json:
        kept.check_place(arguments.json)


def _configs(arguments: argparse.Namespace, on_gpu: bool) -> list[tuple[str, Config]]:
    """(model, settings) of every line of the table, all checked before the first is measured."""
    models = [arguments.model] if arguments.model else (["10m", "106m"] if on_gpu else ["10m"])
    configs = [
        (model, _config(arguments, model, on_gpu, dropout))
        for model in models
        for dropout in _dropouts(arguments, on_gpu)
    ]
    for _, config in configs:
        plan(config, world_size=1)
    return configs


def _config(
    arguments: argparse.Namespace, model: str, on_gpu: bool, dropout: float | None
) -> Config:
    """The card's settings with what this machine and the arguments change."""
    micro = arguments.micro_batch
    if micro is None:
        micro = {"10m": 32, "106m": 16}[model] if on_gpu else 1
    changes = [
        f"train.precision={arguments.precision or ('bf16' if on_gpu else 'fp32')}",
        f"train.micro_batch_size={micro}",
        f"train.global_batch_size={micro}",
        f"data.seq_length={arguments.seq_length}",
        f"model.attention={arguments.attention}",
    ]
    if dropout is not None:
        changes.append(f"model.attention_dropout={dropout}")
    return load(CONFIGS[model], changes)[0]


def _dropouts(arguments: argparse.Namespace, on_gpu: bool) -> list[float | None]:
    # torch has no fused attention with dropout on a CPU: show what the card's dropout costs there.
    if arguments.attention_dropout is not None:
        return [arguments.attention_dropout]
    return [None] if on_gpu else [None, 0.0]


def row(config: Config, model: str, steps: list[Step], here: Any, peak: float) -> dict[str, Any]:
    """A line of the table: the mean work of `steps` over their median time.

    The median, because one slow moment says nothing of the code; the mean of the work, because
    cells of one length still differ in how many genes are predicted.
    """
    from geneformer_mcore.metrics.meter import Meter
    from geneformer_mcore.model import attention
    from geneformer_mcore.model.flops import ModelShape
    from geneformer_mcore.train.step import Totals

    shape, train = config.model, config.train
    size = ModelShape(shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, VOCABULARY)
    meter = Meter(size, config.data.seq_length, 1, peak)
    totals = sum((step.totals for step in steps), Totals())
    cells = len(steps) * train.global_batch_size
    meter.add(
        loss_sum=totals.loss_sum,
        num_predicted=totals.num_predicted,
        cells=cells,
        tokens=totals.num_tokens,
        sum_squared_lengths=totals.sum_squared_lengths,
        data_wait_s=len(steps) * statistics.median(step.data_wait_s for step in steps),
        step_s=len(steps) * statistics.median(step.step_s for step in steps),
        steps=len(steps),
    )
    rates = meter.record(step=len(steps), grad_norm=0.0, lr=config.optim.lr)
    shown = ("cells_per_s", "tokens_per_s", "mfu", "data_wait_fraction", "step_s")
    return {
        "model": model,
        "precision": train.precision.value,
        "attention": attention.choose(shape, here, train.precision).value,
        "attention_dropout": shape.attention_dropout,
        "micro_batch": train.micro_batch_size,
        "seq_length": config.data.seq_length,
        "tokens_per_cell": totals.num_tokens / cells,
        **{name: rates[name] for name in shown},
        **{name: rates[name] for name in rates if name.startswith("tflops")},
    }


def _steps(config: Config, arguments: argparse.Namespace, here: Any) -> Iterator[Step]:
    """Every step, the unmeasured ones first."""
    from geneformer_mcore.feed.loader import Feed, Share
    from geneformer_mcore.feed.masks import Masking
    from geneformer_mcore.feed.order import Order
    from geneformer_mcore.model import geneformer, initial_weights, settings
    from geneformer_mcore.optim import optimizer as optim
    from geneformer_mcore.parallel import groups
    from geneformer_mcore.train.step import train_step

    topology = groups.topology()
    groups.seed_dropout(config.train.seed, topology)
    core = settings.transformer_config(config.model, config.parallel, config.train.precision, here)
    stages = geneformer.build(config.model, core, here, VOCABULARY, config.data.seq_length)
    for stage in stages:
        initial_weights.fill(stage, config.train.seed)
    trainable = optim.wrap(stages, config.optim, config.parallel)
    cells = MadeUpCells(arguments.length or config.data.seq_length)
    batch = config.train.global_batch_size
    masking = Masking(config.data.mask_probability, (0.8, 0.02, 0.18), VOCABULARY, 1)
    order = Order(0, cells.num_cells, 64, 4, 1)
    feed = Feed(cells, order, masking, Share(batch, batch, 0, 1), config.data.seq_length, 0)
    with closing(feed.steps(0, prefetch=2)) as stream:  # type: ignore[type-var]
        for _ in range(arguments.warmup + arguments.steps):
            began = time.perf_counter()
            batches = [part.to(here) for part in next(stream)]
            waited = time.perf_counter() - began
            result = train_step(trainable, batches, config.optim.lr, topology)
            # train_step has read the loss: the device is done with all but AdamW's last kernels.
            yield Step(time.perf_counter() - began, waited, result.totals)


def _table(rows: list[dict[str, Any]], header: bool) -> str:
    lines = ["  ".join(name for name, _ in COLUMNS)] if header else []
    for row in rows:
        cells = [form.format(**row).rjust(len(name)) for name, form in COLUMNS]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=CONFIGS, help="default: 10m, and 106m on a GPU")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on a GPU")
    parser.add_argument("--micro-batch", type=int, help="default: the card's on a GPU, else 1")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--length", type=int, help="tokens of a cell; default: all of seq-length")
    parser.add_argument("--attention", choices=["auto", "te", "sdpa", "plain"], default="auto")
    parser.add_argument(
        "--attention-dropout", type=float, help="default: the card's, and 0 on a CPU"
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured steps before them")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows here too")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
