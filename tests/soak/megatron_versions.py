"""Other versions of Megatron-Core under the tests of training: the table in docs/parallel.md.

    python -m tests.soak.megatron_versions 0.16.0 0.17.1

Each is installed alone into build/megatron/VERSION, also where its wheel asks for another Python,
with triton, which it imports from 0.18 on. Nothing else of the environment changes.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.soak.parts import ROOT

FOLDER = ROOT / "build" / "megatron"
TESTS = [
    f"tests/distributed/training/test_{name}.py"
    for name in ("megatron_faults", "model", "parity", "saving", "resume")
]
WHEEL = ("--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--python-version=3.12")
MOST_FAILED = "--maxfail=40"


def installed(name: str, requirement: str) -> str:
    """The folder of one package."""
    folder = FOLDER / name
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", *WHEEL, "--implementation=cp"]
        subprocess.run([*pip, f"--target={folder}", requirement], check=True)
    return str(folder)


def tried(version: str) -> str:
    """The last line of pytest."""
    paths = [installed(version, f"megatron-core=={version}"), str(ROOT)]
    paths.append(installed("triton", "triton"))
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", MOST_FAILED, *TESTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    (FOLDER / f"{version}.log").write_text(found.stdout + found.stderr)
    return (found.stdout.strip() or found.stderr.strip()).splitlines()[-1]


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(f"{each}: {tried(each)}", flush=True)
