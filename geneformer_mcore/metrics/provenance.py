"""Machine, versions and commit of a measurement, stored with every result."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from geneformer_mcore import backends

PROJECT = Path(__file__).resolve().parents[2]
GIB = 2**30


def provenance() -> dict[str, Any]:
    """{"machine": text, "versions": {package: version}, "commit": hash or "unknown"}, without paths
    and host names. The commit ends in "+changes" where the work tree differs from it."""
    versions = {"python": platform.python_version()} | backends.describe()
    return {"machine": machine(), "versions": versions, "commit": commit()}


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"{_processor()}, {cores} cores, {memory_gib:.0f} GiB, {_accelerators()}"


def commit() -> str:
    known = _git("rev-parse", "--short=12", "HEAD")
    if not known:
        return "unknown"
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return f"{known}+changes" if changes else known


def _git(*arguments: str) -> str:
    """Output of git; "" without git or a repository."""
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=PROJECT,
            capture_output=True,
            encoding="utf-8",
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerators() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"{count} x {torch.cuda.get_device_name(0)}" if count else "no GPU"
