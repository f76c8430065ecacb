"""Figures that the benchmarks print: from times and counts to rate, ratio and goal, by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from benchmarks import ingest, loader, perturb, tokenize, train_step
from benchmarks.harness import loader_turn
from benchmarks.harness.common import goal, goal_text, in_rounds
from benchmarks.harness.loader_cells import Cells
from benchmarks.harness.peers.contestant import COUNTS, Contestant, shuffled_batches
from benchmarks.harness.peers.loaders import CONTESTANTS
from benchmarks.harness.peers.steps import CONTESTANTS as STEPS
from benchmarks.harness.tflops_rows import Setting, Step, numbers
from geneformer_mcore.errors import DataError
from geneformer_mcore.model.flops import (
    ModelShape,
    Workload,
    executed_flops,
    padded_equivalent_flops,
)
from geneformer_mcore.training.step import Totals
from tests.support.small_cells import vocabulary_of


@pytest.mark.parametrize(
    ("value", "at_most", "met", "word"),
    [
        *((15.0, False, True, "met"), (14.9, False, False, "MISSED")),
        *((15.0, True, False, "MISSED"), (None, False, None, "not measured")),
    ],
)
def test_a_goal(value: float | None, at_most: bool, met: bool | None, word: str) -> None:
    found = goal("a", value, 15, at_most=at_most)
    assert found["met"] == met
    assert goal_text(found).endswith(f"15 x): {word}")


def test_tokenisers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds of ours take 1, 2 and 8 seconds, of the other 4 each, for eight cells."""
    times = itertools.chain.from_iterable((0, each) for each in (1, 4, 2, 4, 8, 4))
    cells = Cells(sparse.csr_matrix(np.eye(8, 9)), [""] * 9, np.zeros(8), vocabulary_of(9))
    exact = [np.array([0, token]) for token in range(8)]
    wrong = [*exact[:7], np.array([7, 0])]
    ways = {tokenize.OURS: lambda _: exact, tokenize.LEAN: lambda _: wrong}
    for name, value in {
        "time": SimpleNamespace(process_time=lambda: next(times)),
        "exact_tokens": lambda *_: exact,
        "tokenisers": lambda _: ways,
    }.items():
        monkeypatch.setattr(tokenize, name, value)
    ours, lean = tokenize.measure(cells, cells, 3)
    keys = ("name", "cells_per_s", "us_per_cell", "cells_that_differ", "runs")
    assert [ours[key] for key in keys] == [tokenize.OURS, 4, 250_000, 0, [8, 4, 1]]
    assert [lean[key] for key in keys] == [tokenize.LEAN, 2, 500_000, 1, [2, 2, 2]]


def build(cells: int, **changes: Any) -> dict[str, Any]:
    times = {"seconds": cells / 4000, "tokenising_s": cells / 8000, "writing_s": cells / 20_000}
    sizes = {"input_bytes": cells * 1000, "store_bytes": cells * 3000, "peak_pss_gb": 0.5}
    return {"cells": cells, "cells_per_s": 4000} | times | sizes | changes


def test_ingest() -> None:
    result = ingest._result([build(50_000), build(200_000, peak_pss_gb=0.6)], 2, ["a.h5ad"])
    found = result["extrapolation"]
    assert (found["per_core"], found["merge"], found["merge_s"]) == (4000, 20_000, 1180)
    assert found["tokenise_s"] == round(23_600_000 / (4000 * 64))
    # Units of 16,384 rows, a power of two of buckets of at most 32,768 cells for each split.
    assert found["pieces"] == 1441 * 3 * 1024
    pieces_s = 1441 * 3072 * 50e-6
    assert found["minutes"] == round((23_600_000 / 256_000 + 1180 + pieces_s) / 60, 1)
    assert found["read_gb_per_s"] == 0.26
    goals = ingest._goals(build(50_000), build(200_000, seconds=60.0, peak_pss_gb=2.5))
    assert [goal["value"] for goal in goals] == [4000, 2.5, pytest.approx(1.2), 5]
    assert not any(goal["met"] for goal in goals)
    assert all(goal["met"] for goal in ingest._goals(*[build(50_000, cells_per_s=5000)] * 2))
    printed = "5.0 s (looking at inputs 0.1, tokenising 4.2, writing rows 0.0)"
    assert ingest._phase_s("tokenising", printed) == 4.2
    assert ingest._phase_s("writing rows", printed) == 0.1, "rounded to nothing by build_store.py"


def test_memory_is_summed_over_all_processes() -> None:
    hold = "b = bytearray(60_000_000); print(flush=True); input()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    command = [sys.executable, "-c", f"b = bytearray(60_000_000); {child}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = ingest._memory(process.pid)
        process.communicate(b"\n")
    assert found > 120_000_000


class Fake(Contestant):
    """Rows of a uniform shuffle; the sum of a cell's counts is its row."""

    label, table, package = "fake", COUNTS, "fake"

    def __init__(self, data: Any) -> None:
        self.num_cells = len(data)

    def epoch(self, number: int) -> Iterator[Any]:
        return ((rows, rows) for rows in shuffled_batches(self.num_cells, number))

    def sums(self, batch: Any) -> np.ndarray:
        return batch[1].astype(float)


class FakeData:
    def __init__(self, num_cells: int) -> None:
        self.count_sums_N = np.arange(float(num_cells))

    def __len__(self) -> int:
        return len(self.count_sums_N)


def test_a_turn_of_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second whenever it is read: two epochs in four seconds."""
    ticks, cpu = itertools.count(0.0), iter([10.0, 10.5])
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(loader_turn, "time", clock)
    monkeypatch.setattr(loader_turn, "_cpu_s", lambda: next(cpu))
    monkeypatch.setattr(loader_turn, "MIN_S", 3.0)
    data: Any = FakeData(4096)
    found = loader_turn.take_turn(Fake, data, FakeData(128), with_check=True)  # type: ignore[arg-type]
    assert (found["epochs"], found["first_batch_s"], found["cells_per_s"]) == (2, 1, 2048)
    assert found["cpu_us_per_cell"] == pytest.approx(0.5 / 8192 * 1e6)
    assert found["shuffle"]["each_once"]
    assert found["shuffle"]["epochs_differ"]
    assert found["peak_mib"] > 10
    data.count_sums_N[77] += 1
    with pytest.raises(DataError, match="1 cells hold something else"):
        loader_turn.checked(Fake(data), data, [np.arange(4096)])


def test_loaders() -> None:
    """Medians of turns; goals are ratios of them."""
    found = {"cpu_us_per_cell": 9.0, "first_batch_s": 0.5, "peak_mib": 900.0}
    turns = [found | {"cells_per_s": each} for each in (10.0, 100.0, 700.0)]
    rates = {"counts_soma_dense": 2.0, "counts_soma_sparse": 4.0, "counts_scdl": 40.0}
    rates |= {"tokens_soma": 10.0, "tokens_scdataset": 20.0, "tokens_scdataset_array": 80.0}
    rates |= {"masked_scdl": 25.0, "soma_tokenised": 3.0, "ours_flat": 300.0, "ours_h5ad": 6.0}
    rows = [loader.row("ours_store", turns, None), loader.row("tokens_scdl", [], "absent")]
    assert (rows[0]["cells_per_s"], rows[0]["runs"]) == (100, [10, 100, 700])
    assert (rows[1]["not_measured"], rows[1]["peer"][:12]) == ("absent", "bionemo-scdl")
    more = [{"name": name, "cells_per_s": rates[name]} for name in rates]
    goals = loader.goals_of([*rows, *more])
    assert [goal["value"] for goal in goals[:9]] == [50, 25, 5, 2.5, 3.75, 12, 4, 2, None]
    assert [goal["met"] for goal in goals[6:9]] == [True, False, None]
    for kinds in (CONTESTANTS, STEPS):
        assert len({kind.label for kind in kinds.values()}) == len(kinds)
    assert tuple(STEPS) == train_step.NAMES


def test_perturbations() -> None:
    shape = ModelShape(2, 8, 16, 50)
    ours = perturb.Side(perturb.OURS, [2.0, 4.0], [1.0, 2.0], [2, 1], [10, 20])
    other = perturb.Side(perturb.STATES, [4.0], [1.0], [1], [20])
    whole = perturb.Side(perturb.WHOLE, [4.0], [4.0], [1], [20])
    # Per layer 8 n h^2 + 4 n h f + 4 n^2 h, and the head, by hand.
    linear, square = 2 * (8 * 64 + 4 * 8 * 16), 2 * 4 * 8
    mine = (linear * (2 * 10 + 11 + 20 + 21) + square * (2 * 100 + 121 + 400 + 441)) / 3
    states = linear * 200 + square * 200**2
    head = 2 * 8 * (8 + 50) * 200
    about = {"mean_tokens": 826.4, "mean_tokens_measured": 731.1}
    found = perturb.in_json([ours, whole, other], about, shape, 200)
    for key, expected in {
        "variants_per_s": [0.5, 0.25, 0.25],
        "variants_per_cpu_s": [1, 0.25, 1],
        "flops_per_variant": [mine, states + head, states],
    }.items():
        assert [each[key] for each in found["rows"]] == expected
    assert [goal["value"] for goal in found["goals"]] == [2, 4, 2, 1]
    ratios = f"{(states + head) / mine:.2f} x, {states / mine:.2f} x"
    assert found["reading"][-2].endswith(f"model/flops.py: {ratios}")
    assert "shorter than those of the job (731 against 826" in found["reading"][-1]


def a_turn(seconds: float) -> dict[str, Any]:
    needed = vars(Workload(400, 30_000, 60))
    known = {"losses": [6.5, 6.4, 6.3], "cells": 8, "peak_mib": 100.0}
    return {"seconds": [seconds / 2] * 2, "needed": needed, "positions": 500} | known


def test_training_steps() -> None:
    """Medians over rounds; ratios of one round each."""
    shape = ModelShape(4, 32, 64, 700)
    rounds = {"ours_padded": (1.0, 2.0, 4.0), "hf_dynamic": (4.0, 4.0, 4.0)}
    rows = [
        {"name": name} | train_step.measured([a_turn(s) for s in each], 2, shape)
        for name, each in rounds.items()
    ]
    rows.append({"name": "megatron", "not_measured": "it failed"})
    train_step.add_ratios(rows)
    ours, theirs, failed = rows
    assert (ours["cells_per_s"], ours["tokens_per_s"], ours["fill"]) == (4, 200, 0.8)
    flops = executed_flops(shape, Workload(400, 30_000, 60)) / 2
    assert ours["tflops_executed"] * 1e12 == pytest.approx(flops)
    assert (ours["hf_dynamic_ratio"], ours["hf_padded_ratio"]) == ([2, 1, 4], None)
    assert theirs["hf_dynamic_ratio"] == [1, 1, 1]
    assert list(failed) == ["name", "not_measured"]


def test_each_contestant_keeps_its_fastest_micro_batch_and_takes_its_turns() -> None:
    calls = []

    def turn(name: str, size: int) -> tuple[dict[str, Any], str]:
        calls.append((name, size))
        return ({}, "no memory") if name == "b" or size == 4 else (a_turn(2 / size), "")

    labels, failures = {name: name for name in "abc"}, {"c": "no GPU"}
    tuning = train_step.tune(turn, labels, [1, 2, 4], failures)
    assert tuning == {"a": {1: 4, 2: 8, 4: "no memory"}, "b": {1: "no memory"}, "c": {}}
    assert failures == {"b": "no memory", "c": "no GPU"}
    sizes = {name: train_step.fastest(tried, [1, 2, 4]) for name, tried in tuning.items()}
    assert sizes == {"a": 2, "b": 1, "c": 1}
    calls.clear()
    failures.pop("c")
    turns = in_rounds(
        lambda name, _: turn("b" if name == "c" else name, sizes[name]),
        *(labels, 2, failures, train_step.rate),
    )
    assert calls == [("a", 2), ("b", 1), ("a", 2)], "who fails takes no further turn"
    assert failures["c"] == "no memory"
    assert [len(each) for each in turns.values()] == [2, 0, 0]


def a_step(seconds: float, predicted: int, tokens: int = 4000) -> Step:
    totals = Totals(9.0 * predicted, predicted, 0.0, 2, tokens, 2000 * tokens)
    return Step(seconds, 0.5, 5000, totals)


def test_tflops() -> None:
    """Rates are of the mean work and the median time per token."""
    config = Setting("10m", "fp32", "padded", "sdpa", 0.0, 2).config(2048)
    steps = [a_step(2.0, 100), a_step(50.0, 200), a_step(1.0, 600)]
    found = numbers(config, steps, peak=1e12)
    keys = ("step_s", "data_wait_fraction", "cells_per_s", "tokens_per_s", "tokens_per_cell")
    assert [found[key] for key in (*keys, "fill")] == [2, 0.25, 1, 2000, 2000, 0.8]
    shape = ModelShape(6, 256, 512, 25_429)
    flops = executed_flops(shape, Workload(4000, 8_000_000, 300)) / 2
    assert found["tflops_executed"] * 1e12 == pytest.approx(flops)
    assert found["mfu"] == pytest.approx(flops / 1e12)
    padded = padded_equivalent_flops(shape, 2048)
    assert found["tflops_padded_equivalent"] * 1e12 == pytest.approx(padded)
    unlike = [a_step(s, 10, tokens) for s, tokens in ((1.0, 1000), (3.0, 3000), (9.0, 2000))]
    found = numbers(config, unlike, peak=1e12)
    assert (found["tokens_per_s"], found["step_s"]) == (1000, 2)
