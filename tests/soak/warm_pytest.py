"""A process that has imported what tests import of others, and forks a pytest for every request.

    stdin: {"arguments", "log", "failures"} as a line of JSON  ->  stdout: process id  ->  exit code

Of the project nothing is imported here: every fork sees its files as they are then.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import warnings
from typing import Any

MODULES = (
    "anndata",
    "matplotlib.pyplot",
    "megatron.core.distributed",
    "megatron.core.models.bert.bert_model",
    "megatron.core.optimizer",
    "numba",
    "omegaconf",
    "pandas",
    "psutil",
    "pyarrow.compute",
    "scipy.stats",
    "sklearn.ensemble",
    "tiledbsoma",
    "torch",
    "yaml",
)


def main() -> None:
    """Until stdin is closed."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as tests/conftest.py has it, and before numpy comes
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        for name in MODULES:
            importlib.import_module(name)
    import pytest

    sys.path.pop(0)  # the folder of this file
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _begin(request)
            sys.exit(int(pytest.main(request["arguments"])))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _begin(request: dict[str, Any]) -> None:
    """Of a fork: a session of its own, and its output in the log."""
    os.setsid()
    os.environ["PLANTED_FAILURES"] = request["failures"]
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, stream in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, stream)


if __name__ == "__main__":
    main()
