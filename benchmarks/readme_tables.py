"""Fills the tables of README.md from the measurements in benchmarks/results.

    python benchmarks/readme_tables.py            rewrites README.md
    python benchmarks/readme_tables.py --check    changes nothing; exit code 1 and a diff

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`. What was not measured says
so: no number gets in by hand.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geneformer_mcore.commands import run
from geneformer_mcore.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)
NOT_MEASURED = "not measured"

Measurement = dict[str, Any]


def main() -> int:
    """Rewrites or checks the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if README.md would change")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    before = arguments.readme.read_text()
    after = filled(before, arguments.results)
    if not arguments.check:
        arguments.readme.write_text(after)
        return 0
    diff = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "README.md", "README.md as measured", lineterm=""
    )
    difference = "\n".join(diff)
    if difference:
        print(f"{difference}\nrun: python benchmarks/readme_tables.py", file=sys.stderr)
    return 1 if difference else 0


def filled(readme: str, results: Path) -> str:
    """`readme` with every table made anew. Raises DataError for a name without a function."""

    def table(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in TABLES:
            raise DataError(f"README.md: no table is called {name}; there are {', '.join(TABLES)}.")
        return f"{opening}{TABLES[name](results)}\n{closing}"

    return BLOCK.sub(table, readme)


def demo(results: Path) -> str:
    """results/demo.json, as launch/report.py --json writes it."""
    found = _read(results / "demo.json")
    rows = [[label, show(found) if found else NOT_MEASURED] for label, show in RUN_ROWS]
    return _markdown(["`make demo`", ""], rows, [found])


def real_job(results: Path) -> str:
    """The runs on real cells, one column each."""
    columns = {
        "10M, the card's settings": _read(results / "real_job_10m.json"),
        "narrower": _read(results / "real_job_narrow.json"),
    }
    found = list(columns.values())
    rows = [
        [label, *(show(run) if run else NOT_MEASURED for run in found)] for label, show in RUN_ROWS
    ]
    return _markdown(["real cells", *columns], rows, found)


def tflops(results: Path) -> str:
    """All results/tflops_*.json of benchmarks/tflops.py, one line per measured setting."""
    files = sorted(results.glob("tflops_*.json"))
    found = [_read(path) for path in files]
    rows = [
        [found_here["machine"], *(show(row) for _, show in TFLOPS_COLUMNS)]
        for found_here in found
        if found_here
        for row in found_here["rows"]
    ]
    head = ["machine", *(label for label, _ in TFLOPS_COLUMNS)]
    rows = rows or [[NOT_MEASURED, *("" for _ in TFLOPS_COLUMNS)]]
    return _markdown(head, rows, found, with_machine=False)


def _model(run: Measurement) -> str:
    model, settings = run["settings"]["model"], run["settings"]
    return (
        f"{model['num_layers']} layers x {model['hidden_size']}, "
        f"{settings['seq_length']:,} tokens, {settings['train']['precision']}"
    )


def _steps(run: Measurement) -> str:
    batch = run["settings"]["train"]["global_batch_size"]
    return f"{run['logged_step']:,} of {batch:,} cells"


def _baseline(run: Measurement, name: str) -> str:
    return _nats((run["baselines"] or {}).get(name))


def _both_tflops(run: Measurement) -> str:
    kinds = (run["tflops_padded_equivalent"], run["tflops_executed"])
    return " / ".join(_number(kind, ".3g") for kind in kinds)


def _wall(run: Measurement) -> str:
    return f"{_number(run['wall_s'], ',.0f')} s"


def _nats(value: float | None) -> str:
    return _number(value, ".3f")


def _share(value: float | None) -> str:
    return _number(value, ".1%")


def _number(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form)


RUN_ROWS: list[tuple[str, Callable[[Measurement], str]]] = [
    ("model", _model),
    ("steps", _steps),
    ("training loss, nats per masked gene", lambda run: _nats(run["train_loss"])),
    ("**validation loss**", lambda run: f"**{_nats(run['val_loss'])}**"),
    ("control: genes of each cell shuffled", lambda run: _nats(run["val_loss_shuffled_genes"])),
    ("baseline: unigram", lambda run: _baseline(run, "unigram")),
    ("baseline: gene given rank", lambda run: _baseline(run, "gene_given_rank")),
    ("cells/s", lambda run: _number(run["cells_per_s"], ",.1f")),
    ("tokens/s, padding not counted", lambda run: _number(run["tokens_per_s"], ",.0f")),
    ("TFLOPS per rank, padded-equivalent / executed", _both_tflops),
    ("MFU, executed / measured peak", lambda run: _share(run["mfu"])),
    ("share of time waiting for data", lambda run: _share(run["data_wait_fraction"])),
    ("wall time", _wall),
]

TFLOPS_COLUMNS: list[tuple[str, Callable[[Measurement], str]]] = [
    ("model", lambda row: str(row["model"])),
    ("precision", lambda row: str(row["precision"])),
    ("attention", lambda row: f"{row['attention']}, dropout {row['attention_dropout']:g}"),
    ("micro batch", lambda row: f"{row['micro_batch']:,}"),
    ("tokens per cell", lambda row: f"{row['seq_length']:,}"),
    ("s per step", lambda row: f"{row['step_s']:.3g}"),
    ("cells/s", lambda row: f"{row['cells_per_s']:,.3g}"),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
    ("TFLOPS, padded-equivalent", lambda row: f"{row['tflops_padded_equivalent']:.3g}"),
    ("TFLOPS, executed", lambda row: f"{row['tflops_executed']:.3g}"),
    ("MFU", lambda row: _share(row["mfu"])),
]

TABLES: dict[str, Callable[[Path], str]] = {"demo": demo, "real_job": real_job, "tflops": tflops}


def _markdown(
    head: list[str],
    rows: list[list[str]],
    sources: list[Measurement | None],
    with_machine: bool = True,
) -> str:
    """A table, and under it where its numbers are from."""
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
    origins = dict.fromkeys(_origin(source, with_machine) for source in sources if source)
    return "\n".join([*lines, "", *(f"<sub>{origin}</sub>" for origin in origins)]).rstrip()


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(source: Measurement, with_machine: bool) -> str:
    versions = ", ".join(
        f"{name} {number}" for name, number in source["versions"].items() if number != "absent"
    )
    machine = f"{source['machine']}; " if with_machine else ""
    return f"Measured on {machine}{versions}; commit {source['commit']}."


def _read(path: Path) -> Measurement | None:
    """The measurement in `path`; None where there is none."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise DataError(f"{path} is not JSON: measure again.") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} must hold one object: measure again.")
    return found


if __name__ == "__main__":
    run(main)
