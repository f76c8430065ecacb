"""Fills the tables of README.md and docs/*.md from the measurements in benchmarks/results.

    python benchmarks/readme_tables.py            rewrites them
    python benchmarks/readme_tables.py --check    changes nothing; exit code 1 and a diff

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`. What was not measured says
so: no number gets in by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, where tokenize.py hides Python's own: the project.
    sys.path.remove(sys.path[0])
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import difflib
import re
from collections.abc import Callable

from benchmarks.scaling_model import pages
from benchmarks.side_by_side import cell_type_pages, perturb_pages, step_pages
from benchmarks.side_by_side.page_text import (
    NOT_MEASURED,
    Measurement,
    markdown,
    number,
    origin,
    read,
    share,
)
from benchmarks.side_by_side.run_pages import RUN_ROWS
from geneformer_mcore.errors import DataError
from geneformer_mcore.exit_codes import run

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)
NO_GPU = "no GPU"
"""How metrics/provenance.py ends the name of such a machine."""


def main() -> int:
    """Rewrites or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a page would change")
    parser.add_argument("--readme", type=Path, nargs="+", default=_pages(), metavar="PAGE")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    status = 0
    for page in arguments.readme:
        before = page.read_text()
        after = filled(before, arguments.results)
        if not arguments.check:
            page.write_text(after)
        elif before != after:
            _show_difference(page.name, before, after)
            status = 1
    return status


def _pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _show_difference(name: str, before: str, after: str) -> None:
    diff = difflib.unified_diff(
        before.splitlines(), after.splitlines(), name, f"{name} as measured", lineterm=""
    )
    print("\n".join(diff), file=sys.stderr)
    print("run: python benchmarks/readme_tables.py", file=sys.stderr)


def filled(readme: str, results: Path) -> str:
    """`readme` with every table made anew. Raises DataError for a name without a function."""

    def table(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in TABLES:
            raise DataError(f"no table is called {name}; there are {', '.join(TABLES)}.")
        return f"{opening}{TABLES[name](results)}\n{closing}"

    return BLOCK.sub(table, readme)


def demo(results: Path) -> str:
    """results/demo.json, as launch/report.py --json writes it."""
    found = read(results / "demo.json")
    rows = [[label, show(found) if found else NOT_MEASURED] for label, show in RUN_ROWS]
    return markdown(["`make demo`", ""], rows, [found])


def real_job(results: Path) -> str:
    """The runs on real cells, one column each."""
    files = {"10M, the card's settings": "real_job_10m.json", "narrower": "real_job_narrow.json"}
    found = [read(results / name) for name in files.values()]
    rows = [
        [label, *(show(run) if run else NOT_MEASURED for run in found)] for label, show in RUN_ROWS
    ]
    return markdown(["real cells", *files], rows, found)


def tflops(results: Path) -> str:
    """All results/tflops_*.json of benchmarks/tflops.py, one line per measured setting."""
    found = [each for path in sorted(results.glob("tflops_*.json")) if (each := read(path))]
    rows = [
        [here["machine"], *(show(row) for _, show in TFLOPS_COLUMNS)]
        for here in found
        for row in here["rows"]
    ]
    if all(here["machine"].endswith(NO_GPU) for here in found):
        rows.append(["one GPU", NOT_MEASURED, *("" for _ in TFLOPS_COLUMNS[1:])])
    head = ["machine", *(label for label, _ in TFLOPS_COLUMNS)]
    return markdown(head, rows, list(found), with_machine=False)


def tokenize(results: Path) -> str:
    """results/tokenize.json of benchmarks/tokenize.py."""
    found = read(results / "tokenize.json")
    head = ["tokeniser, one core", "cells/s", "ours is", "cells that differ from exact"]
    rows = _tokeniser_rows(found) if found else [[NOT_MEASURED, "", "", ""]]
    return markdown(head, rows, [found])


def _tokeniser_rows(found: Measurement) -> list[list[str]]:
    ours = found["rows"][0]["cells_per_s"]
    return [
        [
            row["name"],
            f"{row['cells_per_s']:,.0f}",
            f"{ours / row['cells_per_s']:.2f} x",
            f"{row['cells_that_differ']:,} of {found['cells']:,}",
        ]
        for row in found["rows"]
    ]


def ingest(results: Path) -> str:
    """results/ingest.json of benchmarks/ingest.py."""
    found = read(results / "ingest.json")
    head = ["cells", "wall time", "cells/s", "CPU time", "memory of all processes, PSS", "store"]
    if not found:
        return markdown(head, [[NOT_MEASURED, *("" for _ in head[1:])]], [])
    rows = [
        [
            f"{row['cells']:,}",
            f"{row['seconds']:.1f} s",
            f"{row['cells_per_s']:,}",
            f"{row['cpu_s']:.1f} s",
            f"{row['peak_pss_gb']:.2f} GB",
            f"{row['store_bytes'] / 1e6:,.0f} MB",
        ]
        for row in found["runs"]
    ]
    far = found["extrapolation"]
    rows.append(
        [f"{far['census']:,}, {far['cores']} cores: estimate", f"{far['minutes']:.0f} min"]
        + [""] * 4
    )
    return markdown(head, rows, [found])


def loader_counts(results: Path) -> str:
    """The peers that give raw counts, of results/loader.json of benchmarks/loader.py."""
    return _loader(results, "counts")


def loader_tokens(results: Path) -> str:
    """All that give padded batches of tokens."""
    return _loader(results, "tokens")


def loader_goals(results: Path) -> str:
    """The ratios and limits of results/loader.json, each with its bar."""
    found = read(results / "loader.json")
    rows = [
        [
            goal["what"],
            number(goal["value"], ".3g"),
            f"{'<' if goal['at_most'] else '>='} {goal['bar']:g} {goal['unit']}",
            {True: "yes", False: "**no**", None: NOT_MEASURED}[goal["met"]],
        ]
        for goal in (found["goals"] if found else ())
    ]
    head = ["", "found", "bar", "met"]
    return markdown(head, rows or [["", NOT_MEASURED, "", ""]], [found])


def parity(results: Path) -> str:
    """results/parity.json of tests/soak/parity_table.py: largest differences from plain PyTorch."""
    found = read(results / "parity.json")
    head = ["layout", "ranks", *PARITY_COLUMNS.values()]
    rows = [
        [row["layout"], str(row["ranks"]), *(number(row[key], ".1e") for key in PARITY_COLUMNS)]
        for row in (found["rows"] if found else ())
    ]
    return markdown(head, rows or [[NOT_MEASURED, *("" for _ in head[1:])]], [found])


def train_step(results: Path) -> str:
    """All results/train_step_*.json of benchmarks/train_step.py, one after the other."""
    files = sorted(results.glob("train_step_*.json"))
    found = {path.stem.removeprefix("train_step_"): read(path) for path in files}
    rows = [
        line
        for name, content in found.items()
        if content
        for line in step_pages.rows(name, content)
    ]
    rows = rows or [[NOT_MEASURED, *("" for _ in step_pages.HEAD[1:])]]
    return markdown(step_pages.HEAD, rows, list(found.values()))


def cell_types(results: Path) -> str:
    """results/cell_types.json of benchmarks/cell_types.py, every method, and what was trained."""
    found = read(results / "cell_types.json")
    table = markdown(cell_type_pages.HEAD, cell_type_pages.rows(found), [])
    return "\n\n".join([table, *(cell_type_pages.below(found) if found else ())])


def _scaling(name: str) -> Callable[[Path], str]:
    """A table of results/scaling.json of benchmarks/scaling.py."""

    def table(results: Path) -> str:
        found = read(results / "scaling.json")
        if not found:
            return markdown([NOT_MEASURED], [], [])
        head, rows = pages.TABLES[name](found)
        how = "Steps are modelled; ranks simulated and the loader timed with the real code. "
        return f"{markdown(head, rows, [])}\n\n<sub>{how}{origin(found, True)}</sub>"

    return table


def _loader(results: Path, table: str) -> str:
    found = read(results / "loader.json")
    rows = [
        [row["label"], row["peer"] or "-", *_loader_numbers(row)]
        for row in (found["rows"] if found else ())
        if row["table"] == table
    ]
    head = ["loader", "peer", *(label for label, _ in LOADER_COLUMNS)]
    rows = rows or [[NOT_MEASURED, *("" for _ in head[1:])]]
    return markdown(head, rows, [found])


def _loader_numbers(row: Measurement) -> list[str]:
    if row["not_measured"]:
        return [f"{NOT_MEASURED}: {row['not_measured']}", *("" for _ in LOADER_COLUMNS[1:])]
    return [show(row) for _, show in LOADER_COLUMNS]


TFLOPS_COLUMNS: list[tuple[str, Callable[[Measurement], str]]] = [
    ("model", lambda row: str(row["model"])),
    ("precision", lambda row: str(row["precision"])),
    ("cells", lambda row: f"{row.get('packing', 'padded')}, {row['tokens_per_cell']:,.0f} tokens"),
    ("attention", lambda row: f"{row['attention']}, dropout {row['attention_dropout']:g}"),
    ("compiled", lambda row: "yes" if row.get("compiled") else "no"),
    ("micro batch", lambda row: f"{row['micro_batch']:,}"),
    ("fill", lambda row: share(row.get("fill"))),
    ("s per step", lambda row: f"{row['step_s']:.3g}"),
    (
        "cells/s",
        lambda row: number(row["cells_per_s"], ",.0f" if row["cells_per_s"] > 99 else ".3g"),
    ),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:,.0f}"),
    ("TFLOPS, padded-equivalent", lambda row: f"{row['tflops_padded_equivalent']:.3g}"),
    ("TFLOPS, executed", lambda row: f"{row['tflops_executed']:.3g}"),
    ("MFU", lambda row: share(row["mfu"])),
    ("data wait", lambda row: share(row["data_wait_fraction"])),
    ("memory, MiB", lambda row: number(row.get("peak_mib"), ",.0f")),
]

LOADER_COLUMNS: list[tuple[str, Callable[[Measurement], str]]] = [
    ("cells/s", lambda row: f"{row['cells_per_s']:,.0f}"),
    ("first batch, s", lambda row: f"{row['first_batch_s']:.2f}"),
    ("memory, MiB", lambda row: f"{row['peak_mib']:,.0f}"),
    ("mixed, 1 = uniform", lambda row: f"{row['shuffle']['blocks']:.2f}"),
    ("each cell once", lambda row: "yes" if row["shuffle"]["each_once"] else "**no**"),
    ("epoch 2 differs", lambda row: "yes" if row["shuffle"]["epochs_differ"] else "**no**"),
]

PARITY_COLUMNS = {
    "logits": "logits, absolute",
    "gradient": "worst gradient",
    "norm": "gradient norm",
    "losses_from_seed": "loss, 100 steps from the seed",
    "losses_from_checkpoint": "loss, 50 steps from another layout's checkpoint",
}


def finetune(results: Path) -> str:
    """All results/finetune_*.json, the test/report.json of runs of launch/finetune.py."""
    found = [each for path in sorted(results.glob("finetune_*.json")) if (each := read(path))]
    rows = [[_trained(each), *(show(each) for _, show in FINETUNE_COLUMNS)] for each in found] or [
        [NOT_MEASURED, *("" for _ in FINETUNE_COLUMNS)]
    ]
    head = ["trained", *(label for label, _ in FINETUNE_COLUMNS)]
    return markdown(head, rows, list(found))


def _trained(report: Measurement) -> str:
    tune, layers = report["finetune"], report["model"]["num_layers"]
    if tune["lora_rank"]:
        return f"corrections of rank {tune['lora_rank']}, classifier"
    if tune["frozen_layers"] == layers:
        return "classifier"
    return f"all but {tune['frozen_layers']} layer(s)" if tune["frozen_layers"] else "everything"


FINETUNE_COLUMNS: tuple[tuple[str, Callable[[Measurement], str]], ...] = (
    ("steps x cells", lambda r: f"{r['finetune']['steps']} x {r['finetune']['global_batch_size']}"),
    ("learning rate", lambda r: f"{r['finetune']['lr']:g}"),
    ("test cells", lambda r: f"{r['num_cells']:,}"),
    ("accuracy", lambda r: share(r["accuracy"])),
    ("macro F1", lambda r: number(r["macro_f1"], ".3f")),
    ("accuracy of the commonest class", lambda r: share(r["majority_class"]["accuracy"])),
    ("its macro F1", lambda r: number(r["majority_class"]["macro_f1"], ".3f")),
)
"""Column -> what it shows of a report."""

TABLES: dict[str, Callable[[Path], str]] = {
    "demo": demo,
    "real_job": real_job,
    "finetune": finetune,
    "tflops": tflops,
    "ingest": ingest,
    "tokenize": tokenize,
    "loader_counts": loader_counts,
    "loader_tokens": loader_tokens,
    "loader_goals": loader_goals,
    "parity": parity,
    "perturb": perturb_pages.table,
    "train_step": train_step,
    "cell_types": cell_types,
    **{name: _scaling(name) for name in pages.TABLES},
}


if __name__ == "__main__":
    run(main)
