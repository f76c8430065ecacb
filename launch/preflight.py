#!/usr/bin/env python
"""Check the nodes of a job before it trains.

torchrun [as for the job] launch/preflight.py [--config FILE] [--json FILE] [section.key=value]
"""

from __future__ import annotations

import argparse
import os
import signal
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_mcore import config as settings
from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.errors import GeneformerError
from geneformer_mcore.exit_codes import (
    DEFECT,
    end_after_last_words,
    print_stderr,
    report_error,
    run,
)
from geneformer_mcore.inference import options
from geneformer_mcore.training import job

if TYPE_CHECKING:
    from geneformer_mcore.distributed.watchdog import LostRankError
    from geneformer_mcore.preflight.cluster import Traces

DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
EXAMPLE = """example, on every node, with the arguments of launch/pretrain.py:
  torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT \\
      launch/preflight.py --config configs/geneformer_106m.yaml data.store=stores/lung

exit codes (torchrun turns all but 0 into 1):
  0 all is well   2 something to fix, all of it listed   1 internal error or lost rank
"""


def main() -> int:
    """Return the same exit code on every rank."""
    arguments = _arguments()
    try:
        config, text = settings.load(arguments.config or DEMO, arguments.settings)
        settings.plan(config, job.num_ranks(dry_run=False))
    except GeneformerError as error:
        return report_error(error)
    ignore_known_warnings()
    from geneformer_mcore.distributed.watchdog import LostRankError, Watchdog
    from geneformer_mcore.io.files import check_output, write_json
    from geneformer_mcore.preflight import cluster
    from geneformer_mcore.preflight.cluster import Traces

    writes = arguments.json is not None and os.environ.get("RANK", "0") == "0"
    traces = Traces()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, partial(_end_on_signal, traces))
    watch = Watchdog(min(cluster.LIMIT_S, config.parallel.timeout_s), partial(_end_lost, traces))
    try:
        if writes:
            check_output(arguments.json, overwrite=True)
        with watch:
            code, result = cluster.check(config, text, watch, traces, partial(print, flush=True))
            if writes:
                write_json(arguments.json, result)
        return code
    except GeneformerError as error:
        return report_error(error)
    except LostRankError as error:
        if error.tell:
            print_stderr(f"error: {error}")
        return error.code
    except Exception:
        traceback.print_exc()
        return DEFECT


def _end_lost(traces: Traces, loss: LostRankError) -> None:
    def last_words() -> None:
        if loss.tell:
            print_stderr(f"error: {loss}")
        traces.clear()

    end_after_last_words(loss.code, last_words)


def _end_on_signal(traces: Traces, number: int, _frame: Any) -> None:
    """Signalled by torchrun, once another rank has ended, or by a launcher at its time limit."""
    traces.clear()
    os._exit(128 + number)


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, EXAMPLE)
    parser.add_argument("--config", type=Path, help="YAML file; default: configs/demo.yaml")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    options.add(parser, "settings")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run(main)
