"""Measures every layout against plain PyTorch, for the table of docs/parallel.md.

    python -m tests.soak.parity_table [--json OUT] [LAYOUT ...]

The same measurements and bars as in tests/distributed/training/test_parity.py, with the numbers
kept, and loss curves of every layout. Layouts that OUT has of this very commit are not measured
again.
"""

from __future__ import annotations

import os

# Before torch is imported, also by the process that ranks are forked from: see tests/conftest.py.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from geneformer_mcore.backends import ignore_known_warnings

OUT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "parity.json"
BARS = {
    "logits": 1e-5,
    "gradient": 1e-5,
    "norm": 1e-5,
    "losses_from_seed": 1e-4,
    "losses_from_checkpoint": 1e-4,
}
"""The largest differences that are none: of logits absolutely, of the others relatively."""
LAST = "losses_from_checkpoint"
"""What is measured last: a row that has it is whole."""


def main() -> int:
    """Measures, prints a line per layout and writes the JSON file; 1 if a layout is over a bar."""
    from geneformer_mcore.metrics.provenance import provenance
    from tests.distributed import curves, parity

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=OUT, metavar="OUT")
    parser.add_argument("layouts", nargs="*", default=list(parity.LAYOUTS), metavar="LAYOUT")
    arguments = parser.parse_args()
    where = provenance()  # before anything is written
    measured = rows_of(arguments.json, where["commit"])
    truth, plain = parity.truth(), curves.plain()
    learnt = {"steps": curves.STEPS, "first_loss": plain[0], "last_loss": plain[-1]}
    rows = [measured.get(name) or one_step(name, truth) for name in arguments.layouts]

    def keep() -> None:
        found = {"rows": rows, "plain": learnt} | where
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")

    keep()
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            if row[LAST] is None:
                row |= losses(row["layout"], plain, Path(folder))
            print(json.dumps(row), flush=True)
            keep()  # curves take minutes: those that were measured outlive an interruption
    over = [f"{row['layout']}: {key}" for row in rows for key in BARS if not row[key] <= BARS[key]]
    print(f"{len(rows)} layouts, over a bar: {over or 'none'}")
    return 1 if over else 0


def rows_of(file: Path, commit: str) -> dict[str, dict[str, Any]]:
    """{layout: its whole row} of an earlier table of that commit."""
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.get("commit") != commit or commit.endswith("+changes"):
        return {}
    return {row["layout"]: row for row in found["rows"] if row[LAST] is not None}


def losses(name: str, plain: list[float], folder: Path) -> dict[str, Any]:
    """Differences of a layout's loss curves; `folder` holds the checkpoints they start from."""
    from tests.distributed import curves

    saver = curves.saver_for(name)
    checkpoint = folder / saver.replace(" ", "_")
    if not checkpoint.exists():
        curves.save(saver, checkpoint)
    goes_on = curves.from_checkpoint(name, checkpoint)
    return {
        "losses_from_seed": curves.largest_difference(curves.from_seed(name), plain),
        "losses_from_checkpoint": curves.largest_difference(goes_on, plain[curves.SAVED_AT :]),
        "checkpoint_of": saver,
    }


def one_step(name: str, truth: Any) -> dict[str, Any]:
    """Errors of logits, gradients and norm of a layout, with the parameter that is worst."""
    from tests.distributed import parity

    found = parity.parity(name, truth)
    worst = max(found.gradients, key=found.gradients.__getitem__)
    return {
        "layout": name,
        "ranks": parity.LAYOUTS[name][0],
        "logits": found.logits,
        "gradient": found.gradients[worst],
        "worst_parameter": worst,
        "norm": found.norm,
        "losses_from_seed": None,
        "losses_from_checkpoint": None,
    }


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ignore_known_warnings()
        sys.exit(main())
