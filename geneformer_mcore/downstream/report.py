"""A finished or stopped run in one short table, or as JSON to keep.

    Results (results.py)  ->  text, JSON

The plot of the same numbers: loss_plot.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from geneformer_mcore.commands import FINISHED, INTERRUPTED
from geneformer_mcore.downstream.results import BASELINES, Results
from geneformer_mcore.metrics.provenance import provenance


def text(results: Results, plot: Path | None = None) -> str:
    """The table that `make demo` ends with."""
    lines = [f"run                    {results.run_dir}", _ending(results)]
    if not results.train.steps:
        return "\n".join(lines)
    lines.append("")
    lines += [*_loss_lines(results), "", *_speed_lines(results), ""]
    lines.append(f"checkpoint             {results.checkpoint or 'none'}")
    lines.append(f"TensorBoard            tensorboard --logdir {results.run_dir / 'tensorboard'}")
    if plot is not None:
        lines.append(f"loss plot              {plot}")
    return "\n".join(lines)


def as_json(results: Results) -> dict[str, Any]:
    """The same numbers for a file that is kept, with machine, versions and commit as they are now.

    No path but the run folder's own name is in it.
    """
    settings = {name: results.config.get(name, {}) for name in ("model", "parallel", "train")}
    return {
        "run": results.run_dir.name,
        **results.outcome,
        "logged_step": results.step,
        "settings": settings | {"seq_length": results.config.get("data", {}).get("seq_length")},
        "train_loss": results.train.last,
        "val_loss": results.validation.last,
        "val_loss_cell_mean": results.val_loss_cell_mean,
        "val_loss_shuffled_genes": results.shuffled_loss,
        "baselines": results.baselines,
        **results.rates,
        "train_s": results.train_s,
        "wall_s": results.wall_s,
        "curves": {"train": asdict(results.train), "validation": asdict(results.validation)},
        **provenance(),
    }


def _ending(results: Results) -> str:
    outcome, of = results.outcome, results.total_steps or "?"
    if results.exit_code == FINISHED:
        return f"finished               step {results.step} of {of}"
    lines = [
        f"NOT FINISHED           {outcome['outcome']} at step {results.step} of {of}, "
        f"exit code {results.exit_code}: {outcome['reason']}"
    ]
    if results.exit_code == INTERRUPTED:
        lines.append(
            f"                       the same command (run.dir={results.run_dir}) continues it"
        )
    return "\n".join(lines)


def _loss_lines(results: Results) -> list[str]:
    validation = results.validation.last
    lines = [
        "loss                   nats per masked gene",
        f"  training             {_number(results.train.last)}   (last log step)",
        f"  validation           {_number(validation)}",
    ]
    if results.shuffled_loss is not None:
        lines.append(
            f"  genes shuffled       {_number(results.shuffled_loss)}   control: validation with "
            "each cell's genes in a random order"
        )
    for name, label in zip(BASELINES, ("unigram", "gene given rank"), strict=True):
        lines.append(f"  {label:<20} {_baseline(results.baselines, name, validation)}")
    return lines


def _baseline(baselines: dict[str, Any] | None, name: str, validation: float | None) -> str:
    if baselines is None:
        return "-   not readable (baselines.json)"
    line = f"{_number(baselines.get(name))}   baseline"
    if validation is None or name not in baselines:
        return line
    return f"{line}; validation is {_difference(validation, baselines[name])}"


def _speed_lines(results: Results) -> list[str]:
    rates = results.rates
    wall = "" if results.wall_s is None else f" of {results.wall_s:,.0f} s in all"
    return [
        "speed                  median of the log steps",
        f"  cells/s              {_number(rates['cells_per_s'], ',.1f')}",
        f"  tokens/s             {_number(rates['tokens_per_s'], ',.0f')}   (padding not counted)",
        f"  TFLOPS per rank      {_number(rates['tflops_padded_equivalent'], '.4g')} "
        f"padded-equivalent, {_number(rates['tflops_executed'], '.4g')} executed",
        f"  MFU                  {_number(rates['mfu'], '.1%')}   (executed / measured peak)",
        f"  waiting for data     {_number(rates['data_wait_fraction'], '.1%')}",
        f"  time                 {results.train_s:,.0f} s in training steps{wall}",
    ]


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _difference(loss: float, baseline: float) -> str:
    return f"{abs(loss - baseline):.3f} {'below' if loss < baseline else 'ABOVE'}"
