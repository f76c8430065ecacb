"""Tables of README.md and docs/*.md: (results folder) -> Markdown, by name in TABLES.

What was not measured is shown as such. Columns are {heading: row -> text}; the benchmarks print the
same tables on the console.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.harness import scaling_model
from geneformer_mcore.errors import DataError

NOT_MEASURED = "not measured"
YES = {True: "yes", False: "**no**", None: NOT_MEASURED}

Measurement: TypeAlias = dict[str, Any]
Columns: TypeAlias = dict[str, Callable[[Measurement], str]]


# Text


def number(value: float | None, form: str) -> str:
    """Formatted, or that it was not measured."""
    return NOT_MEASURED if value is None else format(value, form)


def shown(columns: Columns, row: Measurement) -> list[str]:
    return [show(row) for show in columns.values()]


def markdown(
    head: Iterable[str],
    rows: Sequence[Sequence[str]],
    sources: Iterable[Measurement | None] = (),
    with_machine: bool = True,
) -> str:
    """A table, and under it the origin of its numbers. Without rows: that nothing was measured."""
    head = list(head)
    rows = rows or [[NOT_MEASURED, *[""] * (len(head) - 1)]]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    origins = dict.fromkeys(origin(source, with_machine) for source in sources if source)
    return "\n".join([*lines, "", *(f"<sub>{origin}</sub>" for origin in origins)]).rstrip()


def table(
    columns: Columns,
    rows: Iterable[Measurement],
    sources: Iterable[Measurement | None] = (),
    num_names: int = 1,
) -> str:
    """A line per row; of a contestant not measured its names (the first columns) and the reason."""
    lines = []
    for row in rows:
        if row.get("not_measured"):
            known = [show(row) for show in list(columns.values())[:num_names]]
            known.append(f"{NOT_MEASURED}: {row['not_measured']}")
            lines.append(known + [""] * (len(columns) - len(known)))
        else:
            lines.append(shown(columns, row))
    return markdown(columns, lines, sources)


def origin(source: Measurement, with_machine: bool = True) -> str:
    """Machine, versions and commit of a measurement."""
    found = source["versions"].items()
    versions = ", ".join(f"{name} {number}" for name, number in found if number != "absent")
    machine = f"{source['machine']}; " if with_machine else ""
    return f"Measured on {machine}{versions}; commit {source['commit']}."


def read(path: Path) -> Measurement:
    """The measurement in `path`; empty where there is none."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise DataError(f"{path} is not JSON: measure again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold one object: measure again.")
    return found


def _all(results: Path, start: str) -> dict[str, Measurement]:
    """{rest of the file's name: its measurement}."""
    paths = sorted(results.rglob(f"{start}*.json"))
    return {path.stem.removeprefix(start): found for path in paths if (found := read(path))}


# Training runs


def _run_model(run: Measurement) -> str:
    model, settings = run["settings"]["model"], run["settings"]
    size = f"{model['num_layers']} layers x {model['hidden_size']}"
    return f"{size}, {settings['seq_length']:,} tokens, {settings['train']['precision']}"


def _run_steps(run: Measurement) -> str:
    batch = run["settings"]["train"]["global_batch_size"]
    return f"{run['logged_step']:,} of {batch:,} cells"


def _of(key: str, form: str) -> Callable[[Measurement], str]:
    return lambda row: number(row[key], form)


def _baseline(name: str) -> Callable[[Measurement], str]:
    return lambda run: number((run["baselines"] or {}).get(name), ".3f")


def _both_tflops(run: Measurement) -> str:
    kinds = (run["tflops_padded_equivalent"], run["tflops_executed"])
    return " / ".join(number(kind, ".3g") for kind in kinds)


RUN_ROWS: Columns = {
    "model": _run_model,
    "steps": _run_steps,
    "training loss, nats per masked gene": _of("train_loss", ".3f"),
    "**validation loss**": lambda run: f"**{number(run['val_loss'], '.3f')}**",
    "control: genes of each cell shuffled": _of("val_loss_shuffled_genes", ".3f"),
    "baseline: unigram": _baseline("unigram"),
    "baseline: gene given rank": _baseline("gene_given_rank"),
    "cells/s": _of("cells_per_s", ",.1f"),
    "tokens/s, padding not counted": _of("tokens_per_s", ",.0f"),
    "TFLOPS per rank, padded-equivalent / executed": _both_tflops,
    "MFU, executed / measured peak": _of("mfu", ".1%"),
    "share of time waiting for data": _of("data_wait_fraction", ".1%"),
    "wall time": lambda run: f"{number(run['wall_s'], ',.0f')} s",
}


def runs(results: Path, head: str, files: dict[str, str]) -> str:
    """Runs of launch/report.py --json, one column each. files: {heading: file name}."""
    found = [read(results / f"{name}.json") for name in files.values()]
    rows = [
        [label, *(show(run) if run else NOT_MEASURED for run in found)]
        for label, show in RUN_ROWS.items()
    ]
    return markdown([head, *files], rows, found)


REAL_JOB = {"10M, the card's settings": "runs/real_job_10m", "narrower": "runs/real_job_narrow"}


def _trained(report: Measurement) -> str:
    tune, layers = report["finetune"], report["model"]["num_layers"]
    if tune["lora_rank"]:
        return f"corrections of rank {tune['lora_rank']}, classifier"
    if tune["frozen_layers"] == layers:
        return "classifier"
    return f"all but {tune['frozen_layers']} layer(s)" if tune["frozen_layers"] else "everything"


FINETUNE_COLUMNS: Columns = {
    "trained": _trained,
    "steps x cells": lambda r: f"{r['finetune']['steps']} x {r['finetune']['global_batch_size']}",
    "learning rate": lambda r: f"{r['finetune']['lr']:g}",
    "test cells": lambda r: f"{r['num_cells']:,}",
    "accuracy": _of("accuracy", ".1%"),
    "macro F1": _of("macro_f1", ".3f"),
    "accuracy of the commonest class": lambda r: f"{r['majority_class']['accuracy']:.1%}",
    "its macro F1": lambda r: f"{r['majority_class']['macro_f1']:.3f}",
}


def finetune(results: Path) -> str:
    """All test/report.json of runs of launch/finetune.py."""
    found = _all(results, "finetune_").values()
    return table(FINETUNE_COLUMNS, found, found)


# Speed


def _rate(row: Measurement) -> str:
    rate = row["cells_per_s"]
    return number(rate, ",.0f" if rate > 99 else ".3g")


TFLOPS_COLUMNS: Columns = {
    "model": lambda row: str(row["model"]),
    "precision": lambda row: str(row["precision"]),
    "cells": lambda row: f"{row.get('packing', 'padded')}, {row['tokens_per_cell']:,.0f} tokens",
    "attention": lambda row: f"{row['attention']}, dropout {row['attention_dropout']:g}",
    "compiled": lambda row: "yes" if row.get("compiled") else "no",
    "micro batch": lambda row: f"{row['micro_batch']:,}",
    "fill": lambda row: number(row.get("fill"), ".1%"),
    "s per step": lambda row: f"{row['step_s']:.3g}",
    "cells/s": _rate,
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "TFLOPS, padded-equivalent": lambda row: f"{row['tflops_padded_equivalent']:.3g}",
    "TFLOPS, executed": lambda row: f"{row['tflops_executed']:.3g}",
    "MFU": _of("mfu", ".1%"),
    "data wait": _of("data_wait_fraction", ".1%"),
    "memory, MiB": lambda row: number(row.get("peak_mib"), ",.0f"),
}


def tflops(results: Path) -> str:
    found = _all(results, "tflops_").values()
    rows = [
        [here["machine"], *shown(TFLOPS_COLUMNS, row)] for here in found for row in here["rows"]
    ]
    if all(here["machine"].endswith("no GPU") for here in found):
        rows.append(["one GPU", NOT_MEASURED, *[""] * (len(TFLOPS_COLUMNS) - 1)])
    return markdown(["machine", *TFLOPS_COLUMNS], rows, found, with_machine=False)


def _step_ratio(found: list[float] | None) -> str:
    return "" if found is None else "**{:.2f}** ({:.2f} to {:.2f})".format(*found)


STEP_COLUMNS: Columns = {
    "cells": lambda row: row["cells"],
    "contestant": lambda row: row["label"],
    "micro batch": lambda row: str(row["micro_batch"]),
    "cells/s": lambda row: f"{row['cells_per_s']:.3g}",
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "fill": lambda row: f"{row['fill']:.0%}",
    "memory, MiB": lambda row: f"{row['peak_mib']:,.0f}",
    "TFLOPS, executed": lambda row: f"{row['tflops_executed']:.3f}",
    "x Hugging Face, dynamic padding": lambda row: _step_ratio(row["hf_dynamic_ratio"]),
    "x Hugging Face, padded to 2,048": lambda row: _step_ratio(row["hf_padded_ratio"]),
}


def train_step(results: Path) -> str:
    found = _all(results, "train_step_")
    rows = [row | {"cells": name} for name, content in found.items() for row in content["rows"]]
    return table(STEP_COLUMNS, rows, found.values(), num_names=2)


def tokenize(results: Path) -> str:
    found = read(results / "tokenize.json")
    rows = found.get("rows", [])
    columns: Columns = {
        "tokeniser, one core": lambda row: row["name"],
        "cells/s": lambda row: f"{row['cells_per_s']:,.0f}",
        "ours is": lambda row: f"{rows[0]['cells_per_s'] / row['cells_per_s']:.2f} x",
        "cells that differ from exact": (
            lambda row: f"{row['cells_that_differ']:,} of {found['cells']:,}"
        ),
    }
    return table(columns, rows, [found])


INGEST_COLUMNS: Columns = {
    "cells": lambda row: f"{row['cells']:,}",
    "wall time": lambda row: f"{row['seconds']:.1f} s",
    "cells/s": lambda row: f"{row['cells_per_s']:,}",
    "CPU time": lambda row: f"{row['cpu_s']:.1f} s",
    "memory of all processes, PSS": lambda row: f"{row['peak_pss_gb']:.2f} GB",
    "store": lambda row: f"{row['store_bytes'] / 1e6:,.0f} MB",
}


def ingest(results: Path) -> str:
    found = read(results / "ingest.json")
    rows = [shown(INGEST_COLUMNS, row) for row in found.get("runs", ())]
    if found:
        far = found["extrapolation"]
        what = f"{far['census']:,}, {far['cores']} cores: estimate"
        rows.append([what, f"{far['minutes']:.0f} min", *[""] * 4])
    return markdown(INGEST_COLUMNS, rows, [found])


LOADER_COLUMNS: Columns = {
    "loader": lambda row: row["label"],
    "peer": lambda row: row["peer"] or "-",
    "cells/s": lambda row: f"{row['cells_per_s']:,.0f}",
    "first batch, s": lambda row: f"{row['first_batch_s']:.2f}",
    "memory, MiB": lambda row: f"{row['peak_mib']:,.0f}",
    "mixed, 1 = uniform": lambda row: f"{row['shuffle']['blocks']:.2f}",
    "each cell once": lambda row: YES[row["shuffle"]["each_once"]],
    "epoch 2 differs": lambda row: YES[row["shuffle"]["epochs_differ"]],
}


def loader(results: Path, kind: str) -> str:
    found = read(results / "loader.json")
    rows = [row for row in found.get("rows", ()) if row["table"] == kind]
    return table(LOADER_COLUMNS, rows, [found], num_names=2)


GOAL_COLUMNS: Columns = {
    "": lambda goal: goal["what"],
    "found": lambda goal: number(goal["value"], ".3g"),
    "bar": lambda goal: f"{'<' if goal['at_most'] else '>='} {goal['bar']:g} {goal['unit']}",
    "met": lambda goal: YES[goal["met"]],
}


def loader_goals(results: Path) -> str:
    found = read(results / "loader.json")
    rows = [shown(GOAL_COLUMNS, goal) for goal in found.get("goals", ())]
    return markdown(GOAL_COLUMNS, rows, [found])


PERTURB_RATES = {"variants_per_s": "wall clock", "variants_per_cpu_s": "CPU"}


def perturb(results: Path) -> str:
    """A row per way of perturb.py; below, each goal by either clock and how to read it."""
    found = read(results / "perturb.json")
    head = ["10M model, one thread", "variants/s", "variants per CPU second"]
    head += [f"ours is, {name}" for name in [*PERTURB_RATES.values(), "operations"]]
    rows = []
    for row in found.get("rows", ()):
        ours = found["rows"][0]
        times = [ours[rate] / row[rate] for rate in PERTURB_RATES]
        times.append(row["flops_per_variant"] / ours["flops_per_variant"])
        numbers = [number(row[rate], ".3g") for rate in PERTURB_RATES]
        rows.append([row["name"], *numbers, *(f"{each:.2f} x" for each in times)])
    reading = "\n".join(f"- {line}" for line in found.get("reading", ()))
    return f"{markdown(head, rows, [found])}\n\n{reading}".rstrip()


# Correctness


PARITY_COLUMNS: Columns = {
    "layout": lambda row: row["layout"],
    "ranks": lambda row: str(row["ranks"]),
    "logits, absolute": _of("logits", ".1e"),
    "worst gradient": _of("gradient", ".1e"),
    "gradient norm": _of("norm", ".1e"),
    "loss, 100 steps from the seed": _of("losses_from_seed", ".1e"),
    "loss, 50 steps from another layout's checkpoint": _of("losses_from_checkpoint", ".1e"),
}


def parity(results: Path) -> str:
    """The largest differences from plain PyTorch, of tests/soak/parity_table.py."""
    found = read(results / "parity.json")
    return table(PARITY_COLUMNS, found.get("rows", ()), [found])


CELL_TYPE_COLUMNS: Columns = {
    "cells": lambda row: row["cells"],
    "scheme": lambda row: row["scheme"],
    "features": lambda row: row["features"],
    "classifier": lambda row: row["classifier"],
    "macro F1 (95 %)": lambda row: row["bold"].format(_score(row["macro_f1"])),
    "accuracy (95 %)": lambda row: _score(row["accuracy"]),
    "F1 over PCA + forest": lambda row: row["over"],
}


def cell_types(results: Path) -> str:
    """Every method of cell_types.py, and below the pretraining behind it."""
    found = read(results / "cell_types.json")
    return cell_types_of(found, [origin(found)]) if found else table(CELL_TYPE_COLUMNS, [])


def cell_types_of(content: Measurement, more: Sequence[str] = ()) -> str:
    """One row per method, scheme and labelled file; below, the pretraining of each file's model and
    the card's figures for reference."""
    rows = [
        _cell_type_row(each, scheme, row)
        for each in content["sets"]
        for scheme in each["schemes"]
        for row in scheme["rows"]
    ]
    card = content["nvidia"]
    figures = "; ".join(
        f"{row['features']} {row['macro_f1']:.3f} / {row['accuracy']:.3f}" for row in card["rows"]
    )
    reference = "For reference, the card's macro F1 / accuracy (random forest) on other cells, "
    reference += f"{card['data']}: {figures}."
    below = [*map(_pretraining, content["sets"]), reference, *more]
    below = [f"<sub>{line}</sub>" for line in below]
    return "\n\n".join([table(CELL_TYPE_COLUMNS, rows), *below])


def _cell_type_row(each: Measurement, scheme: Measurement, row: Measurement) -> Measurement:
    best = max(other["macro_f1"]["value"] for other in scheme["rows"])
    over = "-" if row is scheme["rows"][0] else _score(row["macro_f1_over_baseline"], "+.3f")
    return row | {
        "cells": f"{each['input'].removesuffix('.h5ad')}, {scheme['cells']:,} cells",
        "scheme": f"{scheme['name']}, {len(scheme['labels'])} labels",
        "bold": "**{}**" if row["macro_f1"]["value"] == best else "{}",
        "over": over,
    }


def _score(found: dict[str, float], form: str = ".3f") -> str:
    value, *bounds = (format(found[key], form) for key in ("value", "low", "high") if key in found)
    return f"{value} ({' to '.join(bounds)})" if bounds else value


def _pretraining(each: Measurement) -> str:
    run, left_out = each["pretraining"], each["not_trained_on"].items()
    parts = [
        f"{each['input']}: {run['num_layers']} layers x {run['hidden_size']}",
        f"{run['seq_length']:,} tokens",
        f"{run['steps']:,} steps of {run['cells_per_step']} cells",
    ]
    if run["wall_s"] is not None:
        parts.append(f"{run['wall_s'] / 60:.0f} minutes")
    if run["val_loss"] is not None:
        parts.append(f"validation loss {run['val_loss']:.2f}")
    trained = f"pretrained on {', '.join(each['trained_on'])}"
    not_on = "".join(f", not on {name} ({cells:,} of the cells)" for name, cells in left_out)
    return f"{', '.join(parts)}; {trained}{not_on}."


def scaling(results: Path) -> str:
    """The one table of scaling.py: estimates from the measured rows of one H200."""
    found = read(results / "scaling.json")
    if not found:
        return markdown([NOT_MEASURED], [])
    sources = f"<sub>{found['sources']} Commit {found['commit']}.</sub>"
    return f"{markdown(*scaling_model.table(found))}\n\n{sources}"


TABLES: dict[str, Callable[[Path], str]] = {
    "demo": partial(runs, head="`make demo`", files={"": "demo"}),
    "real_job": partial(runs, head="real cells", files=REAL_JOB),
    "finetune": finetune,
    "tflops": tflops,
    "ingest": ingest,
    "tokenize": tokenize,
    "loader_counts": partial(loader, kind="counts"),
    "loader_tokens": partial(loader, kind="tokens"),
    "loader_goals": loader_goals,
    "parity": parity,
    "perturb": perturb,
    "train_step": train_step,
    "cell_types": cell_types,
    "scaling": scaling,
}
