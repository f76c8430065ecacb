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

STAND_IN = '#!/bin/sh\necho "$0 $*"\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile with the files that it names, in a folder of their own."""
    folder = tmp_path / "project"
    for name in ("Makefile", "requirements.lock", "setup.py"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    for package in ("data_prep", "geneformer_mcore/cells", "geneformer_mcore/store"):
        shutil.copytree(ROOT / package, folder / package)
    return folder


def make(project: Path, *arguments: str, path: str = "") -> str:
    """What `make` prints; it must succeed."""
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(
        ["make", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def executable(path: Path, text: str = STAND_IN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def stamp(project: Path, python: str | Path) -> str:
    (name,) = re.findall(
        r"touch (\.venv/installed-\w+)", make(project, "-n", "env", f"PYTHON={python}")
    )
    return name


def test_another_interpreter_is_another_environment(project: Path) -> None:
    other = executable(project / "other", "#!/bin/sh\necho '3.14.0 (other) /opt/other'\n")
    assert stamp(project, sys.executable) == stamp(project, sys.executable)
    assert stamp(project, other) != stamp(project, sys.executable)
    shutil.copytree(project, project.with_name("moved"))
    assert stamp(project.with_name("moved"), sys.executable) != stamp(project, sys.executable)


def test_an_environment_made_from_an_interpreter_is_not_another_one(project: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(sys.base_prefix, "bin", version)
    if sys.prefix == sys.base_prefix or not base.exists():
        pytest.skip("these tests do not run in a virtual environment")
    assert stamp(project, base) == stamp(project, sys.executable)


def installed(project: Path) -> Path:
    """The project as it is after a demo, with stand-ins for all that takes long."""
    for name in ("python", "torchrun"):
        executable(project / ".venv" / "bin" / name)
    (project / "build" / "demo" / "store").mkdir(parents=True)
    make(project, "--touch", "env", "build/demo/store/manifest.json")
    assert "build_store.py" not in make(project, "demo")
    return project


def test_a_second_demo_installs_nothing_and_keeps_the_store(project: Path) -> None:
    printed = make(installed(project), "demo")
    assert "torchrun --nproc_per_node=2" in printed
    for word in ("pip", "venv --clear", "Setting up", "demo_cells.py", "build_store.py"):
        assert word not in printed


@pytest.mark.parametrize(
    "changed",
    [
        "data_prep/build_store.py",
        "data_prep/demo_cells.py",
        "geneformer_mcore/cells/ranks.py",
        "geneformer_mcore/store/writer.py",
    ],
)
def test_changed_code_makes_the_store_anew(project: Path, changed: str) -> None:
    installed(project)
    last = (project / "build" / "demo" / "store" / "manifest.json").stat().st_mtime
    os.utime(project / changed, (last + 1, last + 1))
    printed = make(project, "-n", "demo")
    assert "build_store.py" in printed
    assert ("demo_cells.py" in printed) == (changed == "data_prep/demo_cells.py")
    assert "pip" not in printed


def test_two_demos_of_one_second_have_two_folders(project: Path) -> None:
    installed(project)
    shutil.rmtree(project / "runs")
    executable(project / "clock" / "date", "#!/bin/sh\necho 20240530_120000\n")
    found = [
        re.findall(r"run\.dir=(\S+)", make(project, "demo", path=str(project / "clock")))[0]
        for _ in range(2)
    ]
    assert len(set(found)) == 2
    assert all(name.startswith("runs/demo_20240530_120000") for name in found)
    assert {path.name for path in (project / "runs").iterdir()} == {
        Path(name).name for name in found
    }
