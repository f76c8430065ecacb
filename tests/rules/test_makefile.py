"""What `make` takes for done, and for stale. With stand-ins for pip and torchrun."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rules.sources import ROOT

DATA_PREP = ("data_prep/build_store.py", "data_prep/demo_cells.py")
STAND_IN = '#!/bin/sh\necho "$0 $*"\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile with the files that it names, in a folder of their own."""
    for package in (
        "data_prep",
        *(f"geneformer_mcore/{name}" for name in ("io", "tokenizer", "store")),
    ):
        shutil.copytree(ROOT / package, tmp_path / package)
    for name in ("Makefile", "requirements.lock", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(project: Path, *arguments: str) -> str:
    """What `make` prints; it must succeed."""
    own = {"PATH": f"{project / 'programs'}:{os.environ['PATH']}"}
    command = ["make", "-C", str(project), *arguments]
    made = subprocess.run(
        command, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    return made.stdout


def executable(path: Path, text: str = STAND_IN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_another_interpreter_is_another_environment(project: Path) -> None:
    def stamp(python: str | Path, folder: Path = project) -> list[str]:
        printed = make(folder, "-n", "env", f"PYTHON={python}")
        return re.findall(r"touch (\.venv/installed-\w+)", printed)

    other = executable(project / "other", "#!/bin/sh\necho '3.14.0 (other) /opt/other'\n")
    # An environment made from an interpreter is no other one.
    base = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    if not base.exists():
        pytest.skip(f"there is no {base}")
    assert stamp(sys.executable) == stamp(base) != stamp(other)
    moved = shutil.copytree(project, project.with_name("moved"))
    assert stamp(base, moved) != stamp(base)


def test_a_second_demo_makes_what_is_stale(project: Path) -> None:
    for name in ("python", "torchrun"):
        executable(project / ".venv" / "bin" / name)
    executable(project / "programs" / "date", "#!/bin/sh\necho 20240530_120000\n")
    store = project / "build" / "demo" / "store" / "manifest.json"
    store.parent.mkdir(parents=True)
    make(project, "--touch", "env", "build/demo/store/manifest.json")
    demos = [make(project, "demo") for _ in range(2)]
    for word in ("pip", "venv --clear", "Setting up", "demo_cells.py", "build_store.py"):
        assert word not in demos[0] + demos[1]
    # Two of one second have two folders.
    assert len({re.findall(r"run\.dir=(runs/demo_\S+)", printed)[0] for printed in demos}) == 2
    last = store.stat().st_mtime
    files = ("store/ingest/merge.py", "tokenizer/rank_encoder.py")
    for changed in (*(f"geneformer_mcore/{name}" for name in files), *DATA_PREP):
        before = (project / changed).stat().st_mtime
        os.utime(project / changed, (last + 1, last + 1))
        printed = make(project, "-n", "demo")
        assert "build_store.py" in printed, changed
        assert ("demo_cells.py" in printed) == (changed == "data_prep/demo_cells.py")
        assert "pip" not in printed
        os.utime(project / changed, (before, before))
