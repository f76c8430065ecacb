"""Report the results of a run: a short table, and its loss curve as RUN_DIR/loss.png.

    python launch/report.py RUN_DIR [--json OUT]

Exits with the status of the run itself, which torchrun turns into 1: 0 finished, 75 interrupted and
saved, 2 wrong settings or data, 1 anything else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from geneformer_mcore.exit_codes import print_stderr, run

EXAMPLE = "example: python launch/report.py runs/mine --json build/mine/report.json"


def main() -> int:
    """Print the table, write the plot and, if requested, the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("run_dir", type=Path, help="the run's folder, run.dir of its config")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers here")
    arguments = parser.parse_args()
    from geneformer_mcore.io.files import UnwritableError, write_json
    from geneformer_mcore.report import figures, results

    found = results.load(arguments.run_dir)
    plot = arguments.run_dir / "loss.png" if found.train.steps else None
    try:
        if plot is not None:
            figures.save_loss(found, plot)
    except UnwritableError as error:  # such as another user's run, which can only be read
        print_stderr(f"warning: no plot: {error}")
        plot = None
    print(results.text(found, plot))
    if arguments.json is not None:
        write_json(arguments.json, results.as_json(found))
    return found.exit_code


if __name__ == "__main__":
    run(main)
