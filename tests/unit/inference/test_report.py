"""A run's folder as a table, as JSON, as a plot; and the README's tables from such JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geneformer_mcore.errors import DataError
from geneformer_mcore.report import figures, results
from tests.support import commands

CONFIG = """
data: {seq_length: 256}
model: {num_layers: 2, hidden_size: 64}
parallel: {tensor: 1}
train: {steps: 40, global_batch_size: 32, precision: fp32}
"""
BASELINES = {"unigram": 6.0, "gene_given_rank": 4.5, "cells": 500, "masked_tokens": 9000}
FINISHED = {"outcome": "finished", "exit_code": 0, "step": 40, "reason": "done", "restart": 0}
SAVED = {"outcome": "interrupted", "exit_code": 75, "step": 20, "reason": "SIGTERM", "restart": 1}
IS_FOLDER = r"cannot be read \(Is a directory\)"
RATES = """{"tokens_per_s": 40000.0, "tflops_padded_equivalent": 0.02, "tflops_executed": 0.01,
"mfu": 0.125, "data_wait_fraction": 0.05, "step_s": 0.5}"""


def training(step: int) -> dict[str, float]:
    cells_per_s = 100.0 if step == 10 else 400.0
    return {"step": step, "loss": 7.0 - step / 20, "cells_per_s": cells_per_s, **json.loads(RATES)}


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A finished run of 40 steps."""
    folder = tmp_path / "demo_run"
    for name in ("step_0000000020", "step_0000000040", ".staging_step_0000000041"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    records = [training(step) for step in (10, 20, 30, 40)]
    records.insert(2, {"step": 20, "val_loss": 5.5, "val_loss_cell_mean": 5.4})
    records.append({"step": 40, "val_loss": 4.75, "val_loss_cell_mean": 4.7})
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "baselines.json").write_text(json.dumps(BASELINES))
    (folder / "outcome.json").write_text(json.dumps(FINISHED))
    (folder / "log.txt").write_text(
        "2024-05-30T12:00:00+00:00 started\n  not a time\n2024-05-30T12:00:45+00:00 done\n"
    )
    return folder


def table_of(run_dir: Path) -> str:
    return results.text(results.load(run_dir))


def test_numbers_are_those_of_the_folder(run_dir) -> None:
    found = results.load(run_dir)
    assert (found.step, found.total_steps, found.exit_code) == (40, 40, 0)
    assert (found.train.last, found.validation.last) == (5.0, 4.75)
    assert found.val_loss_cell_mean == 4.7
    assert found.rates["cells_per_s"] == 400, "the median: the slow start does not count"
    assert (found.train_s, found.wall_s) == (40 * 0.5, 45)
    assert found.checkpoint == run_dir / "checkpoints" / "step_0000000040"
    table = results.text(found, run_dir / "loss.png")
    for part in (
        *("step 40 of 40", "4.7500", "400.0", "12.5%"),
        "6.0000   baseline; validation is 1.250 below",
        "4.5000   baseline; validation is 0.250 ABOVE",
        "0.02 padded-equivalent, 0.01 executed",
        "20 s in training steps of 45 s in all",
        *(str(run_dir / name) for name in ("tensorboard", "loss.png")),
        str(found.checkpoint),
    ):
        assert part in table
    assert "NOT FINISHED" not in table


def test_a_run_that_did_not_finish_says_so(run_dir) -> None:
    (run_dir / "outcome.json").write_text(json.dumps(SAVED))
    table = table_of(run_dir)
    for part in ("NOT FINISHED", "exit code 75: SIGTERM", f"(run.dir={run_dir}) continues it"):
        assert part in table
    (run_dir / "outcome.json").unlink()
    # Killed: a defect, as is half an outcome; metrics end within a character.
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 50, "loss": "\xe2\x82')
    (run_dir / "config.yaml").write_text(CONFIG + "checkpoint:\n")
    found = results.load(run_dir)
    assert (found.exit_code, found.step) == (1, 40)
    assert "killed, or still runs" in results.text(found)
    for content in ('{"exit_code": 0}', '{"exit_code": "?", "reason": ""}', "[]"):
        (run_dir / "outcome.json").write_text(content)
        assert results.load(run_dir).exit_code == 1


def test_a_run_without_validation_or_baselines(run_dir) -> None:
    (run_dir / "baselines.json").unlink()
    (run_dir / "metrics.jsonl").write_text(json.dumps(training(10)) + "\n")
    assert "validation           -" in table_of(run_dir)
    figures.save_loss(results.load(run_dir), run_dir / "loss.png")


def test_a_folder_that_is_no_run_or_of_a_refused_one(tmp_path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    for name in ("missing", "other"):
        with pytest.raises(DataError, match=r"give the run\.dir of a run"):
            results.load(tmp_path / name)
    refused = FINISHED | {"outcome": "refused", "exit_code": 2, "step": 0, "reason": "no store"}
    (tmp_path / "outcome.json").write_text(json.dumps(refused))
    last = table_of(tmp_path).splitlines()[-1]
    assert last.endswith("exit code 2: no store"), "and no table of dashes"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("outcome.json", '{"unigram": [', "is not JSON"),
        ("config.yaml", '{"unigram": [', "is not YAML"),
        ("outcome.json", None, IS_FOLDER),
        ("config.yaml", None, IS_FOLDER),
        ("metrics.jsonl", None, IS_FOLDER),
        ("log.txt", None, IS_FOLDER),
    ],
)
def test_a_damaged_file_or_a_folder_in_its_place_is_named(run_dir, name, content, message) -> None:
    replace(run_dir / name, content)
    with pytest.raises(DataError, match=f"{name} {message}"):
        results.load(run_dir)


def replace(path: Path, content: str | None) -> None:
    """Write a file of this content in the place of another, or make a folder there."""
    path.unlink(missing_ok=True)
    path.write_text(content) if content is not None else path.mkdir()


@pytest.mark.parametrize("content", ['{"unigram": 6.0, "gene_gi', '{"unigram": "six"}', None])
def test_baselines_that_cannot_be_read_do_not_end_the_report(run_dir, content: str | None) -> None:
    replace(run_dir / "baselines.json", content)
    found = results.load(run_dir)
    table = results.text(found)
    for name in ("unigram        ", "gene given rank"):
        assert f"{name}      -   not readable (baselines.json)" in table
    assert "validation           4.7500" in table
    assert results.as_json(found)["baselines"] is None
    figures.save_loss(found, run_dir / "loss.png")


def test_the_plot_is_a_picture_of_all_curves(run_dir, monkeypatch) -> None:
    drawn = []

    def savefig(figure: figures.Figure, path: Path, **_: object) -> None:
        path.touch()
        drawn.append(figure)

    monkeypatch.setattr(figures.Figure, "savefig", savefig)
    figures.save_loss(results.load(run_dir), run_dir / "loss.png")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "baseline: unigram (6.00)",
        "baseline: gene given rank (4.50)",
        "training",
        "validation (last 4.75)",
    ]
    assert axes.get_xlabel() == "optimizer step"
    assert "nats" in axes.get_ylabel()
    assert axes.get_lines()[-1].get_xydata().tolist() == [[20, 5.5], [40, 4.75]]


def test_the_command_writes_both_files_and_ends_with_the_runs_code(run_dir) -> None:
    replace(run_dir / "outcome.json", json.dumps(SAVED))
    out = run_dir / "kept" / "numbers.json"
    done = commands.run("launch/report.py", run_dir, "--json", out)
    assert done.returncode == 75, done.stderr
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads(out.read_text())
    assert kept["run"] == "demo_run"
    assert (kept["val_loss"], kept["baselines"]["unigram"]) == (4.75, 6.0)
    assert kept["curves"]["validation"] == {"steps": [20, 40], "losses": [5.5, 4.75]}
    assert {"machine", "versions", "commit"} <= set(kept)
    assert str(run_dir.parent) not in out.read_text(), "no path of one machine is kept"


def test_the_command_refuses_without_a_traceback(tmp_path, run_dir) -> None:
    for place in (run_dir / "metrics.jsonl" / "numbers.json", run_dir / "checkpoints"):
        done = commands.run("launch/report.py", run_dir, "--json", place)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {place}: cannot be written")
        assert len(done.stderr.splitlines()) == 1
        assert "validation           4.7500" in done.stdout, "the table is shown all the same"
    replace(run_dir / "loss.png", None)
    done = commands.run("launch/report.py", run_dir)
    warning = f"warning: no plot: {run_dir}/loss.png: cannot be written: Is a directory. Remedy: "
    assert (done.returncode, done.stderr[: len(warning)]) == (0, warning)
    assert "validation           4.7500" in done.stdout
    assert "loss plot" not in done.stdout


TABLE_README = """# Title
<!-- table: demo -->
old
<!-- end table -->
between
<!-- table: real_job -->
<!-- end table -->
<!-- table: tflops -->
<!-- end table -->
end
"""
TFLOPS = """{"rows": [{"model": "10M", "precision": "fp32", "attention": "sdpa",
"attention_dropout": 0.0, "micro_batch": 2, "seq_length": 2048, "packing": "packed",
"tokens_per_cell": 1300.4, "fill": 0.991, "step_s": 6.4321, "cells_per_s": 0.312,
"tokens_per_s": 412.3, "tflops_padded_equivalent": 0.0613, "tflops_executed": 0.0271, "mfu": null,
"data_wait_fraction": 0.01, "peak_mib": 1234.5}], "machine": "a laptop",
"versions": {"torch": "2.13.0", "apex": "absent"}, "commit": "0123456789ab"}"""


def test_readme_tables_are_filled_from_the_measurements(tmp_path, run_dir) -> None:
    kept, page = tmp_path / "results", tmp_path / "README.md"
    kept.mkdir()
    (kept / "demo.json").write_text(json.dumps(results.as_json(results.load(run_dir))))
    (kept / "tflops_cpu.json").write_text(TFLOPS)
    page.write_text(TABLE_README)
    script, places = "benchmarks/readme_tables.py", ("--readme", page, "--results", kept)
    before = commands.run(script, *places, "--check")
    assert before.returncode == 1
    assert "-old" in before.stderr
    assert page.read_text() == TABLE_README, "a check changes nothing"
    commands.check(script, *places)
    filled = page.read_text()
    assert filled.startswith("# Title\n")
    for part in (
        "| **validation loss** | **4.750** |",
        "| baseline: unigram | 6.000 |",
        "| cells/s | not measured | not measured |",  # the real job is not there
        "| a laptop | 10M | fp32 | packed, 1,300 tokens | sdpa, dropout 0 | no | 2 | 99.1% | 6.43 "
        "| 0.312 | 412 | 0.0613 | 0.0271 | not measured | 1.0% | 1,234 |",
        "torch 2.13.0; commit 0123456789ab",
        "\nbetween\n",
    ):
        assert part in filled
    assert "| **validation loss** | **not measured** |" not in filled
    assert "apex" not in filled.split("torch 2.13.0; commit 0123456789ab")[0].splitlines()[-1]
    commands.check(script, *places, "--check")
    page.write_text(filled.replace("4.750", "2.340"))
    changed = commands.run(script, *places, "--check")
    assert changed.returncode == 1
    for line in ("-| **validation loss** | **2.340** |", "+| **validation loss** | **4.750** |"):
        assert line in changed.stderr
    page.write_text("<!-- table: demmo -->\n<!-- end table -->\n")
    refused = commands.run(script, *places)
    assert refused.returncode == 2
    assert "is called demmo; there are demo, real_job, finetune, tflops" in refused.stderr
