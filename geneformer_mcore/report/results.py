"""Results of a finished or stopped run, from its directory: numbers, table, JSON.

    config.yaml  metrics.jsonl  baselines.json  outcome.json  log.txt  ->  Results  ->  text | JSON

A run may be killed at any moment, so half a line or a missing file is no error. For the plot of the
losses see figures.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from geneformer_mcore.config import plain_yaml
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import DEFECT, FINISHED, INTERRUPTED
from geneformer_mcore.io.schema import parse_json
from geneformer_mcore.metrics.provenance import provenance

RATES = (
    "cells_per_s",
    "tokens_per_s",
    "tflops_padded_equivalent",
    "tflops_executed",
    "mfu",
    "data_wait_fraction",
)
"""Keys of metrics.jsonl that are reported as medians, which one slow step does not move."""
BASELINES = ("unigram", "gene_given_rank")
"""Keys of baselines.json, in nats."""
_MOST_NUMBER = 1e300


@dataclass(frozen=True)
class Curve:
    """Losses in nats by step, None where a step predicted nothing."""

    steps: list[int]
    losses: list[float | None]

    @property
    def last(self) -> float | None:
        """The last loss there is."""
        return next((loss for loss in reversed(self.losses) if loss is not None), None)


@dataclass(frozen=True)
class Results:
    """Content of a run directory. Losses in nats per masked gene, times in seconds.

    config:         sections of config.yaml
    outcome:        outcome.json, "unknown" without that file
    val_loss_cell_mean:  mean over validation cells of their mean losses, as in the model card
    shuffled_loss:  permutation control: validation loss with the genes of each cell in a random
                    order; None before the last step
    rates:          medians of RATES
    baselines:      baselines.json; empty without that file, None if it is damaged
    train_s:        in training steps, without validation and saving
    wall_s:         from the first to the last line of log.txt, pauses between starts included
    """

    run_dir: Path
    config: dict[str, Any]
    outcome: dict[str, Any]
    train: Curve
    validation: Curve
    val_loss_cell_mean: float | None
    shuffled_loss: float | None
    rates: dict[str, float | None]
    baselines: dict[str, Any] | None
    train_s: float
    wall_s: float | None

    @property
    def exit_code(self) -> int:
        """Exit code of the run itself; torchrun's is another one."""
        return int(self.outcome["exit_code"])

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return self.train.steps[-1] if self.train.steps else 0

    @property
    def total_steps(self) -> int | None:
        """Steps of the settings."""
        return self.config.get("train", {}).get("steps")

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the latest checkpoint."""
        found = (self.run_dir / "checkpoints").glob("step_" + "[0-9]" * 10)
        return max(found, default=None)


def load(run_dir: Path) -> Results:
    """Read a run directory. Raises DataError if it is none, or a file is damaged or cannot be
    read."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder: give the run.dir of a run.")
    try:
        return _load(run_dir)
    except OSError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}): give the run.dir of a run, or "
            "fix its permissions."
        ) from None


def _load(run_dir: Path) -> Results:
    if not any((run_dir / name).exists() for name in ("outcome.json", "metrics.jsonl")):
        raise DataError(
            f"{run_dir} holds neither outcome.json nor metrics.jsonl: give the run.dir of a run."
        )
    records = _records(run_dir / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    validations = [record for record in records if "val_loss" in record]
    last = validations[-1] if validations else {}
    return Results(
        run_dir=run_dir,
        config=_sections(run_dir / "config.yaml"),
        outcome=_outcome(run_dir / "outcome.json"),
        train=_curve(training, "loss"),
        validation=_curve(validations, "val_loss"),
        val_loss_cell_mean=last.get("val_loss_cell_mean"),
        shuffled_loss=last.get("val_loss_shuffled_genes"),
        rates={name: _median(training, name) for name in RATES},
        baselines=_baselines(run_dir / "baselines.json"),
        train_s=_train_seconds(training),
        wall_s=_wall_seconds(run_dir / "log.txt"),
    )


def _curve(records: list[dict[str, Any]], name: str) -> Curve:
    return Curve([record["step"] for record in records], [record[name] for record in records])


def _median(records: list[dict[str, Any]], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return statistics.median(values) if values else None


def _train_seconds(records: list[dict[str, Any]]) -> float:
    """Sum over the records of seconds per step x steps since the previous record."""
    previous, seconds = 0, 0.0
    for record in records:
        seconds += (record.get("step_s") or 0.0) * (record["step"] - previous)
        previous = record["step"]
    return seconds


def _wall_seconds(path: Path) -> float | None:
    times = []
    for line in _text(path).splitlines():
        try:
            times.append(datetime.fromisoformat(line.partition(" ")[0]))
        except ValueError:
            continue
    return (times[-1] - times[0]).total_seconds() if times else None


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl but half ones, as a kill leaves them."""
    records = []
    for line in _text(path).splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_number(record.get("step"), int):
            kept = {k: each for k, each in record.items() if each is None or _is_number(each)}
            records.append(kept)
    return records


def _is_number(found: Any, kind: Any = int | float) -> bool:
    is_it = isinstance(found, kind) and not isinstance(found, bool)
    return is_it and abs(found) < _MOST_NUMBER  # also False for NaN


def _outcome(path: Path) -> dict[str, Any]:
    found = _json(path)
    texts = [found.get(name) for name in ("outcome", "reason")]
    if _is_number(found.get("exit_code"), int) and all(isinstance(text, str) for text in texts):
        return found
    reason = "it left no outcome.json: it was killed, or still runs"
    return {"outcome": "unknown", "exit_code": DEFECT, "reason": reason}


def _baselines(path: Path) -> dict[str, Any] | None:
    # The run's own numbers are shown without them.
    try:
        found = _json(path)
    except (DataError, OSError):
        return None
    numbers = [found.get(name, 0.0) for name in BASELINES]
    return found if all(map(_is_number, numbers)) else None


def _sections(path: Path) -> dict[str, Any]:
    try:
        found = plain_yaml.values(_text(path))
    except (yaml.YAMLError, ValueError):
        raise DataError(f"{path} is not YAML: it was damaged after the run wrote it.") from None
    sections = found if isinstance(found, dict) else {}
    return {name: keys for name, keys in sections.items() if isinstance(keys, dict)}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(_text(path) or "{}")
    except ValueError:
        raise DataError(f"{path} is not JSON: it was damaged after the run wrote it.") from None
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    """The file's text, "" where there is none; a kill may have left half a character."""
    return path.read_text(errors="replace", encoding="utf-8") if path.exists() else ""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their widest entries, two blanks between."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[e.ljust(width) for e, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in padded]


def text(results: Results, plot: Path | None = None) -> str:
    """The table of launch/report.py."""
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
    """The same numbers as JSON, with the current machine, versions and commit, without paths."""
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
    for name in BASELINES:
        label = name.replace("_", " ")
        lines.append(f"  {label:<20} {_baseline(results.baselines, name, validation)}")
    return lines


def _baseline(baselines: dict[str, Any] | None, name: str, validation: float | None) -> str:
    if baselines is None:
        return "-   not readable (baselines.json)"
    line = f"{_number(baselines.get(name))}   baseline"
    if validation is None or name not in baselines:
        return line
    side = "below" if validation < baselines[name] else "ABOVE"
    return f"{line}; validation is {abs(validation - baselines[name]):.3f} {side}"


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
