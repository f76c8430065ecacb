"""How commands end, and what they do with words and with a console that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
START = "import sys; from geneformer_mcore.exit_codes import run\n"


def start(
    code: str, *words: str, stdout: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in an interpreter of its own, whose streams are what it is about."""
    return subprocess.run(
        [sys.executable, "-c", START + code, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize("printed", ["print('x')", "print('x', flush=True)", "print('x' * 99_999)"])
@pytest.mark.parametrize("code", [0, 2])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_no_work(printed: str, code: int, unbuffered: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    work = f"{printed}; print('done', file=sys.stderr); {printed}; return {code}"
    ended = start(f"def main(): {work}\nrun(main)", stdout=writes, PYTHONUNBUFFERED=unbuffered)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (code, "done\n")


def test_a_full_disk_of_the_console_ends_no_work() -> None:
    with open("/dev/full", "w") as full:
        ended = start("run(lambda: print('x', flush=True))", stdout=full.fileno())
    message = "warning: stdout cannot be written (No space left on device); it is skipped\n"
    assert (ended.returncode, ended.stderr) == (0, message)


def test_errors_on_a_closed_pipe_keep_their_code() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    code = "from geneformer_mcore.errors import DataError\n"
    code += "def main(): print('x'); print('y', file=sys.stderr); raise DataError('z')\nrun(main)"
    ended = subprocess.run(
        [sys.executable, "-c", START + code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writes,
        stderr=writes,
        check=False,
    )
    os.close(writes)
    assert ended.returncode == 2


def test_what_the_locale_has_no_sign_for_is_shown_all_the_same() -> None:
    ended = start("run(lambda: print('γδ T', 'Zelle'))", PYTHONIOENCODING="latin-1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\\u03b3\\u03b4 T Zelle\n", "")


def test_the_home_is_known_in_every_word() -> None:
    words = ["--out=~/x", "~/y", "run.dir=~/z", "10m=~/run", "a~/b", "--start", "c=~d", "~"]
    ended = start("run(lambda: print(*sys.argv[1:]))", *words, HOME="/users/me")
    assert ended.stdout.split() == [
        *("--out=/users/me/x", "/users/me/y", "run.dir=/users/me/z", "10m=/users/me/run"),
        *("a~/b", "--start", "c=~d", "~"),
    ]
