"""benchmarks/scaling.py: the model of a step, its inputs, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import readme_tables, scaling
from benchmarks.scaling_model import deals, lengths, pages, picture, study
from benchmarks.scaling_model.hardware import GPUS, MODELS, Network
from benchmarks.scaling_model.speed import Speed, flat_rate, speed
from benchmarks.scaling_model.step import Assumptions, Job, Terms, all_reduce_s, step
from geneformer_mcore.errors import ConfigError, DataError

LENGTHS = lengths.made_up()
BALANCED = deals.Deal(np.ones(1), np.ones(1), np.ones(1), 1.004, 1)
DEALT = replace(BALANCED, factor=1.25)
LOADER = study.Loader(100_000.0, 2e-5, 6e-4, 1e-5, 7e-3)


def inputs(assumed: Assumptions | None = None) -> study.Inputs:
    """Of the estimated speeds; micro batches as the cells fill them."""
    found = {}
    for model in MODELS.values():
        for nodes in study.NODES:
            passes = -(-model.global_batch // (8 * nodes) // model.micro_batch)
            pair = [replace(deal, micro_batches=passes) for deal in (BALANCED, DEALT)]
            found[model.name, 8 * nodes] = (pair[0], pair[1])
    return study.Inputs(
        {
            (gpu, name): Speed(card.cells_per_s[name], f"estimate, not measured: {gpu}")
            for gpu, card in GPUS.items()
            for name in MODELS
        },
        found,
        dict.fromkeys(MODELS, LOADER),
        LENGTHS,
        assumed or Assumptions(),
    )


@pytest.mark.parametrize(
    ("name", "step_s", "cells_per_s", "hours", "node_needs"),
    [("10m", 0.046, 44_000, 1.5, 5_500), ("106m", 0.176, 11_600, 5.6, 730)],
)
def test_the_plans_two_rows(
    name: str, step_s: float, cells_per_s: float, hours: float, node_needs: float
) -> None:
    """On A100, padded: computed by hand when the project was planned, rounded to two digits."""
    model = MODELS[name]
    row = study.row(inputs(), "A100", model, model.nodes, is_packed=False)
    assert row["step_s"] == pytest.approx(step_s, rel=0.02)
    assert row["cells_per_s"] == pytest.approx(cells_per_s, rel=0.02)
    assert row["hours"] == pytest.approx(hours, rel=0.02)
    assert row["node_needs_cells_per_s"] == pytest.approx(node_needs, rel=0.02)


def test_terms_by_hand() -> None:
    """1 GB of gradients, 2 nodes: 2 * 7/8 / 230 + 2 * 1/2 * (1/8) / 20 + 20 * 8 us, in seconds."""
    assert all_reduce_s(1e9, 2, Network()) == pytest.approx(0.0076087 + 0.00625 + 0.00016, rel=1e-4)
    job = Job(250_000_000, 2, 10.0, 2, 0.001, 1.5, 0.0, 1e12)
    found = step(job, Assumptions(optimizer_s=0.002))
    assert found.compute_s == pytest.approx(0.015)
    assert found.waiting_s == pytest.approx(0.005)
    assert found.all_reduce_s == pytest.approx(0.0140187, rel=1e-4)
    # Of the last of two micro batches 0.9 * 0.66 * 7.5 ms hide it.
    assert found.exposed_s == pytest.approx(0.0140187 - 0.004455, rel=1e-4)
    assert found.optimizer_s == pytest.approx(0.002 + 30 * 250e6 / 16 / 1e12)
    assert found.gpu_s == found.compute_s + found.exposed_s + found.optimizer_s
    assert found.step_s == pytest.approx(found.gpu_s / 0.96)
    assert found.cells_per_s == pytest.approx(160 / found.step_s)
    hidden = step(replace(job, cell_s=1.0), Assumptions())
    assert hidden.exposed_s == pytest.approx(0.06 * hidden.all_reduce_s)


def test_the_loader_bounds_a_step_when_it_is_slower() -> None:
    job = Job(10_000_000, 1, 16.0, 1, 0.001, 1.0, 0.05, 1e12)
    slow, fast = step(job, Assumptions()), step(replace(job, loader_s=0.001), Assumptions())
    assert (slow.bound, fast.bound) == ("loader", "GPU")
    assert slow.step_s == pytest.approx(0.05 / 0.96)
    assert fast.step_s < slow.step_s


def test_the_loaders_terms() -> None:
    padded, packed = (study.loader_s(LOADER, 2048, 16, is_packed) for is_packed in (False, True))
    assert padded == pytest.approx(2e-5 + 16e-5)
    assert packed == pytest.approx(padded + 6e-4), "every rank packs the whole global batch"
    cases = {case.name: case for case in study.CASES}
    from_store = cases["no flat copy: every rank reads the SOMA store"]
    assert study.loader_s(LOADER, 2048, 16, True, from_store) == pytest.approx(packed + 2048e-5)
    # Of 32 spans a rank of 128 meets one, as do three others.
    assert study.loader_s(LOADER, 2048, 16, False, from_store) == pytest.approx(padded + 64e-5)
    first = cases["first epoch: sums of blocks checked"]
    assert study.loader_s(LOADER, 2048, 16, True, first) == pytest.approx(packed + 7e-3)
    half = cases["loader at half the rate"]
    assert study.loader_s(LOADER, 2048, 16, True, half) == pytest.approx(2 * packed)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("is_packed", [False, True])
def test_more_nodes_are_never_slower(gpu: str, name: str, is_packed: bool) -> None:
    rows = [study.row(inputs(), gpu, MODELS[name], nodes, is_packed) for nodes in study.NODES]
    rates = [row["cells_per_s"] for row in rows]
    assert rates == sorted(rates)
    assert rates[-1] < rates[0] * study.NODES[-1], "and never better than linear"


@pytest.mark.parametrize("name", MODELS)
def test_nothing_worse_is_ever_faster(name: str) -> None:
    model = MODELS[name]
    for nodes in study.NODES:
        for is_packed in (False, True):
            usual = study.row(inputs(), "A100", model, nodes, is_packed)
            for case in study.CASES:
                worse = study.row(inputs(), "A100", model, nodes, is_packed, case)
                assert worse["step_s"] >= usual["step_s"], case.name
            packed = study.row(inputs(), "A100", model, nodes, True)
            assert packed["step_s"] < study.row(inputs(), "A100", model, nodes, False)["step_s"]


def test_slower_networks_are_never_faster() -> None:
    times = []
    for factor in (1, 2, 8, 64):
        assumed = Assumptions(network=Network().slower(factor))
        row = study.row(inputs(assumed), "H200", MODELS["106m"], 16, False)
        times.append(row["step_s"])
    assert times == sorted(times)
    assert times[-1] > 2 * times[0]


def test_measured_speeds_go_before_estimates(tmp_path: Path) -> None:
    usual = {"precision": "bf16", "attention_dropout": 0.1, "seq_length": 2048}
    rows = [
        {"model": "106m", "micro_batch": 16, "cells_per_s": 90.0, "tokens_per_cell": 2048.0},
        {"model": "106m", "micro_batch": 64, "cells_per_s": 99.0, "tokens_per_cell": 2048.0},
        {"model": "106m", "micro_batch": 16, "cells_per_s": 150.0, "tokens_per_cell": 1300.0},
        {"model": "10m", "micro_batch": 64, "cells_per_s": 500.0, "tokens_per_cell": 2048.0},
    ]
    content = {"machine": "x, 1 x NVIDIA A100-SXM4-80GB", "rows": [row | usual for row in rows]}
    (tmp_path / "tflops_a100.json").write_text(json.dumps(content))
    found = speed("A100", MODELS["106m"], tmp_path)
    assert (found.cells_per_s, found.source) == (90.0, "measured: tflops_a100.json")
    assert speed("A100", MODELS["10m"], tmp_path).cells_per_s == 500.0
    estimate = speed("H200", MODELS["106m"], tmp_path)
    assert estimate.source.startswith("estimate, not measured")
    (tmp_path / "tflops_b.json").write_text("[]")
    with pytest.raises(DataError, match=r"tflops_b\.json is no result"):
        speed("A100", MODELS["106m"], tmp_path)


def test_the_loaders_rate_is_the_measured_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no rate of ours_flat\. Remedy: python"):
        flat_rate(tmp_path)
    content = {"rows": [{"name": "ours_flat", "cells_per_s": 80.0}]}
    (tmp_path / "loader.json").write_text(json.dumps(content))
    rate = flat_rate(tmp_path)
    assert [rate.on_cores(cores) for cores in (1, 2, 16)] == [40, 80, 80]


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "benchmarks" / "scaling.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "--steps must be above 0, and is 0."),
        (("--ib-gb-s", "-1"), "--ib-gb-s must be above 0, and is -1."),
        (("--nvlink-gb-s", "0"), "--nvlink-gb-s must be above 0, and is 0."),
        (("--sustained", "1.5"), "--sustained must be within 0..1"),
        (("--optimizer-ms", "-1"), "--optimizer-ms must be at least 0"),
        (("--cores-per-rank", "0"), "--cores-per-rank must be above 0"),
        (("--cells", "a.h5ad", "--tokens", "b"), "give one of the two"),
    ],
)
def test_what_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    with pytest.raises(ConfigError, match=re.escape(message)):
        scaling.main()


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("--steps", "0", "--sustained", "2"), ("--steps must be", "--sustained must be")),
        (("--cells", "no_such.h5ad"), ("no_such.h5ad",)),
        (("--tokens", "no_such"), ("no_such",)),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    repository: Path, arguments: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    ended = run(repository, *arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert all(message in ended.stderr for message in messages)
    assert "Traceback" not in ended.stderr
    assert not ended.stdout


@pytest.fixture(scope="module")
def as_typed(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], Path]:
    """(console, JSON, folder of JSON and picture) of a short run."""
    folder = tmp_path_factory.mktemp("scaling")
    out = ("--json", folder / "scaling.json", "--svg", folder / "scaling.svg")
    ended = run(repository, "--steps", 2, *out)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, json.loads((folder / "scaling.json").read_text()), folder


@pytest.mark.slow
def test_every_term_of_every_step_is_kept(as_typed: tuple[str, dict[str, Any], Path]) -> None:
    console, found, _ = as_typed
    assert len(found["rows"]) == len(GPUS) * len(MODELS) * 2 * len(study.NODES)
    for row in [*found["rows"], *(row for case in found["sensitivity"] for row in case["rows"])]:
        assert {each.name for each in fields(Terms)} <= set(row)
        terms = row["compute_s"] + row["exposed_s"] + row["optimizer_s"]
        assert row["gpu_s"] == pytest.approx(terms)
        assert row["step_s"] == pytest.approx(max(terms, row["loader_s"]) / 0.96)
        assert row["cells_per_s"] == pytest.approx(2048 / row["step_s"])
    assert {"machine", "versions", "commit", "assumptions", "corpus"} <= set(found)
    estimates = [row for row in found["rows"] if "not measured" in row["cell_source"]]
    lines = [line for line in console.splitlines() if line.endswith("estimate, not measured")]
    layouts = [row for row in estimates if row["nodes"] == MODELS[row["model"]].nodes]
    assert len(lines) >= len(layouts) + len(estimates) / len(study.NODES)


@pytest.mark.slow
def test_the_loader_that_runs_is_the_loader_of_the_model(
    as_typed: tuple[str, dict[str, Any], Path],
) -> None:
    _, found, _ = as_typed
    for each in found["feeding"]:
        whole = each["places_s"] + each["lengths_s"] + each["pack_s"]
        assert 0 < whole < each["step_s"]
        (row, *_) = (
            row
            for row in found["rows"]
            if row["model"] == each["model"] and row["gpus"] == each["ranks"] and row["packed"]
        )
        assert row["loader_s"] >= each["step_s"] * 0.999


@pytest.mark.slow
def test_tables_and_picture_come_of_the_json(
    as_typed: tuple[str, dict[str, Any], Path],
) -> None:
    _, found, folder = as_typed
    for name in pages.TABLES:
        page = readme_tables.filled(f"<!-- table: {name} -->\n<!-- end table -->\n", folder)
        assert found["commit"] in page
        assert page.count("\n| ") >= 3
    card = readme_tables.filled("<!-- table: scaling_card -->\n<!-- end table -->\n", folder)
    assert "| card: TFLOPS per GPU, padded-eq. | 4.6 | 9.9 |" in card
    assert "| card: wall clock, hours | 44.3 | 90.9 |" in card
    picture.save(folder / "again.svg", found)
    assert (folder / "again.svg").read_bytes() == (folder / "scaling.svg").read_bytes()


def test_without_results_the_tables_say_so(tmp_path: Path) -> None:
    page = readme_tables.filled("<!-- table: scaling_steps -->\n<!-- end table -->\n", tmp_path)
    assert "not measured" in page


def test_a_case_that_is_worse_stands_out() -> None:
    here = inputs()
    found = {"sensitivity": study.sensitivity(here)}
    head, rows = pages.sensitivity(found)
    lines: dict[str, list[str]] = {name: cells for name, *cells in rows}
    column = head.index("A100 106M packed") - 1
    assert "**" not in lines["as assumed"][column]
    assert lines["no balancing: cell i to rank i % ranks"][column].startswith("**")
    assert lines["GPU as fast as NVIDIA's BioNeMo 2 on its chart"][-1] == "-"
