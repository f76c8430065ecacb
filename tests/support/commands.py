"""Commands as a user types them, in a process forked from one that has imported all they need.

    run("data_prep/build_store.py", "--out", "s", "a.h5ad", cwd=folder)  ->  CompletedProcess

A fresh interpreter takes four to eight seconds of a core to import torch, Megatron-Core and
TileDB-SOMA; a forked one takes a tenth. From the script's first line on everything is as it is in
`python SCRIPT`: arguments, `__main__`, sys.path, working directory, streams, exit code, warnings.
Tests of how the interpreter itself starts or ends use subprocess.
"""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.io import progress
from tests.distributed.ranks import context

ROOT = Path(__file__).resolve().parents[2]


def run(
    script: str | Path,
    *arguments: object,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 120,
    trouble: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the project, given from its root, or an absolute path, to its end.

    environment: variables that are set in addition. A warning is an error, as with `-W error`.
    trouble: done in its process first; importable
    """
    words = [str(ROOT / script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(
            target=_run,
            args=(words, str(cwd), dict(environment or {}), str(out), str(err), trouble),
        )
        process.start()
        process.join(timeout_s)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        ended = subprocess.CompletedProcess(words, code or 0, out.read_text(), err.read_text())
        assert code is not None, f"{words} did not end in {timeout_s:g} s:\n{ended.stderr}"
        return ended


def check(script: str | Path, *arguments: object, cwd: Path = ROOT) -> str:
    """What it prints; fails with its errors unless it exits with status 0."""
    ended = run(script, *arguments, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    """A torchrun in an interpreter of its own, with those arguments, to its end."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def _run(
    words: list[str],
    cwd: str,
    environment: dict[str, str],
    out: str,
    err: str,
    trouble: Callable[[], None] | None,
) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), stream)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    warnings.resetwarnings()
    warnings.simplefilter("error")
    ignore_known_warnings()
    # What a command prints must not depend on the machine's speed.
    progress._LOG_INTERVAL_S = math.inf
    if trouble is not None:
        trouble()
    runpy.run_path(words[0], run_name="__main__")
