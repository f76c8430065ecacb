"""The commands of the Dockerfile, run without docker: in a copy, by an environment that stands in
for the base image's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from image.packages import name_of
from tests.dockerfile import instructions, is_ignored

NOBODY = "65534"
BASE = {
    "torch": "2.10.0a0+a36e1d39eb.nv26.1",
    "numpy": "2.1.0",
    "transformer_engine": "2.11.0",
    "pandas": "2.2.2",
}
"""What a base image may hold, as far as pip can see."""


@pytest.fixture
def copy(repository: Path) -> Iterator[Path]:
    """What docker would be given, in a folder that everybody may read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        target, ignore_file = Path(folder, "project"), repository / ".dockerignore"

        def left_out(at: str, names: list[str]) -> list[str]:
            inside = Path(at).relative_to(repository)
            return [name for name in names if is_ignored(str(inside / name), ignore_file)]

        shutil.copytree(repository, target, ignore=left_out)
        yield target


def stand_in(folder: Path, *more: str) -> Path:
    """A fresh environment; returns its folder of packages."""
    subprocess.run([sys.executable, "-m", "venv", *more, str(folder)], check=True, timeout=100)
    (packages,) = folder.glob("lib/python3*/site-packages")
    return packages


def pretend(packages: Path, name: str, version: str) -> None:
    """Lets pip find a package that is not there."""
    information = packages / f"{name}-{version}.dist-info"
    information.mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (information / "METADATA").write_text(text)


def run(command: str, copy: Path, environment: Path) -> subprocess.CompletedProcess[str]:
    """As the Dockerfile's shell does, its `python` being that of `environment`."""
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    there = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=copy,
        env=there | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def commands(copy: Path) -> list[str]:
    every = instructions((copy / "Dockerfile").read_text())
    return [value for word, value in every if word == "RUN"]


@pytest.mark.soak
def test_pip_finds_what_the_base_lacks_and_leaves_its_torch_alone(
    copy: Path, tmp_path: Path, repository: Path
) -> None:
    packages = stand_in(tmp_path / "base")
    for name, version in BASE.items():
        pretend(packages, name, version)
    first, _ = commands(copy)
    assert "pip install" in first
    ended = run(first.replace("pip install", "pip install --dry-run"), copy, tmp_path / "base")
    if re.search("NewConnectionError|Temporary failure in name resolution", ended.stderr):
        pytest.skip("no index of packages can be reached")
    assert ended.returncode == 0, ended.stderr
    (line,) = re.findall("^Would install (.*)", ended.stdout, re.MULTILINE)
    would = dict(each.rsplit("-", 1) for each in line.split())
    assert {"megatron-core", "tiledbsoma", "anndata"} <= set(would)
    # pandas 2.2.2 does for all of ours, and is not the version of requirements.lock.
    assert not {"torch", "numpy", "transformer-engine", "pandas"} & set(map(name_of, would))
    locked = (repository / "requirements.lock").read_text().lower()
    assert all(f"\n{name.lower()}=={version}\n" in locked for name, version in would.items())


def test_a_base_without_torch_is_refused(copy: Path, tmp_path: Path) -> None:
    stand_in(tmp_path / "base")
    ended = run(commands(copy)[0], copy, tmp_path / "base")
    assert ended.returncode == 2
    assert ended.stderr == "error: the base image has no torch, numpy\n"


def test_a_package_that_was_replaced_is_named(copy: Path, tmp_path: Path) -> None:
    packages = stand_in(tmp_path / "base")
    for name, version in BASE.items():
        pretend(packages, name, version)
    lists = "python image/packages.py image/lists"
    assert run(f"{lists} && {lists} --check", copy, tmp_path / "base").returncode == 0
    (packages / f"torch-{BASE['torch']}.dist-info").rename(packages / "torch-2.13.0.dist-info")
    metadata = packages / "torch-2.13.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace(BASE["torch"], "2.13.0"))
    ended = run(f"{lists} --check", copy, tmp_path / "base")
    assert ended.returncode == 1
    assert f"torch=={BASE['torch']} of the base image is now 2.13.0" in ended.stderr


@pytest.mark.slow
def test_what_is_installed_runs_and_needs_no_root(copy: Path) -> None:
    """All commands as they stand; the base has all packages, those of this environment."""
    base = copy.parent / "base"
    # pip is one of them, too; what is outside of its environment it cannot remove.
    (stand_in(base, "--without-pip") / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for command in commands(copy):
        ended = run(command, copy, base)
        assert ended.returncode == 0, ended.stderr
    assert "'megatron-core': '0.16.1'" in ended.stdout
    dry = "python launch/pretrain.py --dry-run data.store=nowhere"
    assert "num_layers" in run(dry, copy, base).stdout
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can give the copy to another user")
    # Whoever may not write to it, and reads what all may read: as a user of the image is.
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(copy)], check=True)
    other = "setpriv --bounding-set -dac_override,-dac_read_search,-fowner,-chown"
    assert run(f"{other} touch new", copy, base).returncode != 0
    where = "import geneformer_mcore; print(geneformer_mcore.__file__)"
    found = run(f'{other} python -c "{where}"', copy, base)
    assert found.stdout.strip() == str(copy / "geneformer_mcore" / "__init__.py"), found.stderr
    assert "num_layers" in run(f"{other} {dry}", copy, base).stdout
