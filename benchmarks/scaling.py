#!/usr/bin/env python
"""How long a step takes on 8 to 128 GPUs, on paper, from what was measured and what is assumed.

    python benchmarks/scaling.py                                  the demo's cells, or made-up ones
    python benchmarks/scaling.py --cells a.h5ad b.h5ad --json out.json --svg out.svg
    python benchmarks/scaling.py --tokens CACHE/HASH              a flat copy of a store

No cluster is needed. The work of every simulated rank comes of real lengths, dealt by the packing
that pretraining uses; the loader of one rank of many runs for real. A GPU's speed is taken from
benchmarks/results/tflops_*.json where one of that GPU is there; each line that rests on an estimate
says so. How the terms come about: benchmarks/scaling_model/step.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where tokenize.py hides Python's own: the project.
    sys.path.remove(sys.path[0])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from typing import Any

from benchmarks.scaling_model import feeding, pages, picture, study
from benchmarks.scaling_model.assumed import described
from benchmarks.scaling_model.deals import batches, simulate
from benchmarks.scaling_model.hardware import (
    GPUS,
    GPUS_PER_NODE,
    MODELS,
    SEQ_LENGTH,
    Network,
)
from benchmarks.scaling_model.lengths import Corpus, corpus
from benchmarks.scaling_model.speed import flat_rate, speed, store_rate
from benchmarks.scaling_model.step import Assumptions
from benchmarks.side_by_side.picture import text_table
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.exit_codes import run
from geneformer_mcore.io.files import check_output, write_json

ROOT = Path(__file__).resolve().parents[1]
EXTRA_LAYOUT = (64, 16)
"""Ranks and cells per rank whose balance is shown beside the card's two layouts."""


def main() -> int:
    """Simulates, measures, prints the tables."""
    arguments = _arguments()
    check(arguments)
    ignore_known_warnings()
    found = result(arguments, corpus(arguments.cells, arguments.tokens))
    for name, table in pages.TABLES.items():
        print(f"\n{name}\n{text_table(*table(found))}")
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.svg:
        picture.save(arguments.svg, found)
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError that names every argument which makes no sense, and DataError if the
    results could not be written."""
    above_zero = (
        ("--steps", arguments.steps),
        ("--nvlink-gb-s", arguments.nvlink_gb_s),
        ("--ib-gb-s", arguments.ib_gb_s),
        ("--cores-per-rank", arguments.cores_per_rank),
    )
    problems = [
        f"{name} must be above 0, and is {value:g}." for name, value in above_zero if value <= 0
    ]
    if arguments.optimizer_ms < 0:
        problems.append(f"--optimizer-ms must be at least 0, and is {arguments.optimizer_ms:g}.")
    if not 0 < arguments.sustained <= 1:
        problems.append(
            f"--sustained must be within 0..1, 0 excluded, and is {arguments.sustained:g}."
        )
    if arguments.cells and arguments.tokens:
        problems.append("--cells and --tokens both say which cells: give one of the two.")
    if problems:
        raise ConfigError("\n".join(problems))
    for path in (arguments.json, arguments.svg):
        if path:
            check_output(path, overwrite=True)


def result(arguments: argparse.Namespace, cells: Corpus) -> dict[str, Any]:
    """All that is kept: inputs, rows, sensitivity, the card; with machine, versions and commit."""
    from geneformer_mcore.metrics.provenance import provenance

    timed = _timed(cells)
    inputs = study.Inputs(
        {
            (gpu, name): speed(gpu, MODELS[name], arguments.results)
            for gpu in GPUS
            for name in MODELS
        },
        _deals(arguments, cells),
        _loaders(arguments, timed),
        cells.lengths,
        _assumptions(arguments),
    )
    return {
        "corpus": cells.as_json(),
        "steps_simulated": arguments.steps,
        "balance": _balance(arguments, cells, inputs),
        "feeding": timed,
        "rows": study.all_rows(inputs),
        "sensitivity": study.sensitivity(inputs),
        "card": study.beside_the_card(inputs),
        "assumptions": described(inputs, cells, arguments.results, arguments.cores_per_rank),
        **provenance(),
    }


def _assumptions(arguments: argparse.Namespace) -> Assumptions:
    network = Network(arguments.nvlink_gb_s * 1e9, arguments.ib_gb_s * 1e9)
    return Assumptions(
        network, sustained=arguments.sustained, optimizer_s=arguments.optimizer_ms / 1e3
    )


def _deals(arguments: argparse.Namespace, cells: Corpus) -> dict[tuple[str, int], Any]:
    """(model, ranks) -> (packed, dealt), global batches being the same for all."""
    found = {}
    for model in MODELS.values():
        steps = list(batches(cells.lengths, model.global_batch, arguments.steps, seed=0))
        for nodes in study.NODES:
            ranks = nodes * GPUS_PER_NODE
            budget = model.micro_batch * SEQ_LENGTH
            found[model.name, ranks] = simulate(steps, ranks, budget, model)
    return found


def _balance(
    arguments: argparse.Namespace, cells: Corpus, inputs: study.Inputs
) -> list[dict[str, Any]]:
    """The deals of the card's layouts, and of one more."""
    ranks, share = EXTRA_LAYOUT
    model = MODELS["106m"]
    steps = list(batches(cells.lengths, ranks * share, arguments.steps, seed=0))
    extra = simulate(steps, ranks, share * SEQ_LENGTH, model)
    shown = [(model, ranks, share, extra)]
    for card in MODELS.values():
        gpus = card.nodes * GPUS_PER_NODE
        shown.append((card, gpus, card.global_batch // gpus, inputs.deals[card.name, gpus]))
    return [
        {
            "model": model.name,
            "ranks": ranks,
            "cells_per_rank": share,
            "packed": packed.as_json(),
            "dealt": dealt.as_json(),
        }
        for model, ranks, share, (packed, dealt) in shown
    ]


def _timed(cells: Corpus) -> list[dict[str, Any]]:
    """One rank's feed, on each of the card's layouts."""
    return [
        {"model": model.name, "ranks": ranks} | feeding.measure(cells.lengths, ranks, budget, size)
        for model in MODELS.values()
        for ranks, budget, size in [
            (model.nodes * GPUS_PER_NODE, model.micro_batch * SEQ_LENGTH, model.global_batch)
        ]
    ]


def _loaders(arguments: argparse.Namespace, timed: list[dict[str, Any]]) -> dict[str, study.Loader]:
    """A rank's own cells at the slower of two rates: that of loader.json, which has whole batches
    of 64, and that of its share here."""
    flat = flat_rate(arguments.results).on_cores(arguments.cores_per_rank)
    store = store_rate(arguments.results).on_cores(arguments.cores_per_rank)
    return {
        each["model"]: study.Loader(
            cells_per_s=min(flat, each["cells_per_s"]),
            places_s=each["places_s"],
            whole_batch_s=each["lengths_s"] + each["pack_s"],
            store_cell_s=max(0.0, 1 / store - 1 / flat),
            sums_s=max(0.0, each["first_epoch_s"] - each["step_s"]),
        )
        for each in timed
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    assumed, network = Assumptions(), Network()
    add = parser.add_argument
    add("--cells", nargs="+", type=Path, default=[], metavar="FILE.h5ad", help="whose lengths")
    add("--tokens", type=Path, metavar="DIR", help="a flat copy whose lengths")
    add("--steps", type=int, default=50, help="global batches that are dealt (default: 50)")
    add("--nvlink-gb-s", type=float, default=network.nvlink_bytes_s / 1e9, help="per GPU")
    add("--ib-gb-s", type=float, default=network.ib_bytes_s / 1e9, help="per GPU, between nodes")
    add("--optimizer-ms", type=float, default=assumed.optimizer_s * 1e3, help="its fixed part")
    add("--sustained", type=float, default=assumed.sustained, help="share of the best speed")
    add("--cores-per-rank", type=float, default=2, help="for the loader (default: 2)")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="measurements")
    add("--json", type=Path, metavar="OUT", help="write the numbers here too")
    add("--svg", type=Path, metavar="OUT", help="draw cells/s against GPUs here (.svg, .png)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
