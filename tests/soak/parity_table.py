"""Measures every layout against plain PyTorch, for the table of docs/parallel.md.

    python -m tests.parity_table [--json OUT] [LAYOUT ...]

The same measurements as tests/distributed/test_parity.py, with the numbers kept: nothing is
compared with a bar here.
"""

from __future__ import annotations

import os

# Before torch is imported, also by the process that ranks are forked from: see tests/conftest.py.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from geneformer_mcore.backends import ignore_known_warnings

OUT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "parity.json"


def main() -> None:
    """Measures, prints a line per layout and writes the JSON file."""
    from geneformer_mcore.metrics.provenance import provenance
    from tests.distributed import curves, parity

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=OUT, metavar="OUT")
    parser.add_argument("layouts", nargs="*", default=list(parity.LAYOUTS), metavar="LAYOUT")
    arguments = parser.parse_args()
    where = provenance()  # before anything is written
    truth, plain = parity.truth(), curves.plain()
    learnt = {"steps": curves.STEPS, "first_loss": plain[0], "last_loss": plain[-1]}
    rows = [one_step(name, truth) for name in arguments.layouts]

    def keep() -> None:
        found = {"rows": rows, "plain": learnt} | where
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")

    keep()
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            row |= losses(row["layout"], plain, Path(folder))
            print(json.dumps(row), flush=True)
            keep()  # curves take minutes: those that were measured outlive an interruption


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
        main()
