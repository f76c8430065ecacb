"""Files that are not Python: README, pages, CONTRIBUTING, Makefile, Dockerfile, shell scripts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from geneformer_mcore.config import load
from tests.dockerfile import instructions, is_ignored
from tests.rules.sources import ROOT
from tests.soak.parts import PARTS

FOLDERS = "data_prep|launch|benchmarks|slurm|configs|tests"


def test_commands_of_the_readme_exist() -> None:
    """tests/readme_commands.sh runs them."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown = "".join(blocks)
    files = set(re.findall(rf"(?:^|[ =])((?:{FOLDERS})/[\w./-]+\.(?:py|sh|yaml))", shown, re.M))
    assert len(files) >= 5
    assert not [name for name in files if not (ROOT / name).is_file()]
    targets = set(re.findall(r"^(?:\$ )?make (?:[A-Z_]+=\S+ )*([\w-]+)", shown, re.M))
    assert targets
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_links_from_the_pages_lead_to_what_they_name() -> None:
    command = [sys.executable, ROOT / "tests" / "doc_links.py", "--check"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_promise_is_held_by_tests_that_exist() -> None:
    """The table of CONTRIBUTING.md: rows R1 to R10, with files of tests and parts of the soak."""
    rows = re.findall(r"^\| (R\d+) \|(.*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert [name for name, _ in rows] == [f"R{number}" for number in range(1, 11)]
    for name, row in rows:
        _, tests, soak = row.split("|")
        folder, files = "", []
        for word in re.findall(r"`([\w./-]+)`", tests):
            # A folder holds for the files that follow it.
            folder = word.removeprefix("tests/").rpartition("/")[0] if "/" in word else folder
            files.append(ROOT / "tests" / folder / word.rpartition("/")[2])
        assert files, name
        assert not [file for file in files if not file.is_file()], name
        assert set(re.findall(r"`([\w-]+)`", soak)) <= {part.name for part in PARTS}, name


def test_shell_scripts_stop_at_the_first_error_and_hold_no_secrets() -> None:
    for path in (ROOT / ".ci" / "run", *ROOT.glob("tests/*.sh"), *ROOT.glob("slurm/*.sh")):
        text = path.read_text()
        # Two are read by others, whose `set` holds for them.
        assert path.name in ("environment.sh", "job.sh") or "set -euo pipefail" in text, path
        assert not re.search(r"\beval\b|0\.0\.0\.0|password|token=|secret", text, re.I), path


def test_jobs_differ_in_nothing_but_their_size() -> None:
    texts = [(ROOT / "slurm" / f"pretrain_{size}.sh").read_text() for size in ("10m", "106m")]
    small, large = (text.replace("106m", "10m").splitlines() for text in texts)
    comment, nodes = (b for a, b in zip(small, large, strict=True) if a != b)
    assert (comment[:2], nodes) == ("# ", "#SBATCH --nodes=16")


@pytest.mark.parametrize(("size", "nodes"), [("10m", 8), ("106m", 16)])
def test_nodes_and_micro_batches_make_the_global_batch(size: str, nodes: int) -> None:
    script = (ROOT / "slurm" / f"pretrain_{size}.sh").read_text()
    assert f"#SBATCH --nodes={nodes}\n#SBATCH --gpus-per-node=8\n" in script
    config, _ = load(ROOT / "configs" / f"geneformer_{size}.yaml")
    assert 8 * nodes * config.train.micro_batch_size == config.train.global_batch_size == 2048


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())
NEEDED = (
    r"^ARG BASE=\S+:(?!latest)\S+\nFROM \$\{BASE\}$",
    r'^SHELL \["/bin/bash", "-euo", "pipefail", "-c"\]$',
    r"^WORKDIR /",
    r"^USER [1-9]\d*:\d+$(?![\s\S]*^USER)",
)
REFUSED = (
    r"\bsudo\b",
    r"^ADD ",
    r"^(CMD|ENTRYPOINT) [^\[]",
    r"pip install (?!--no-cache-dir)",
    r"^FROM (?!\$\{BASE\}$)",
    r"^(ENV|ARG) .*(?i:TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY)",
    r"apt-get install (?!.*--no-install-recommends)",
    r"apt-get (?!.*rm -rf /var/lib/apt/lists)",
)


def test_the_dockerfile() -> None:
    text = "".join(f"{word} {value}\n" for word, value in DOCKERFILE)
    for pattern in NEEDED:
        assert re.search(pattern, text, re.MULTILINE), pattern
    for pattern in REFUSED:
        assert not re.search(pattern, text, re.MULTILINE), pattern


def test_what_docker_is_given() -> None:
    copies = [value.split() for word, value in DOCKERFILE if word == "COPY" and "--" not in value]
    copied = [name for words in copies for name in words[:-1]]
    assert len(copied) >= 4
    assert all((ROOT / path).exists() for path in copied)
    ignore_file = ROOT / ".dockerignore"
    for path in [*copied, "geneformer_mcore/model/bert.py", "launch/x.py", "configs/x.yaml"]:
        assert not is_ignored(path.rstrip("/"), ignore_file), path
    caches = [".mypy_cache/x", "launch/__pycache__/x.pyc", "image/lists/constraints.txt"]
    for path in [".git/config", ".venv/bin/python", "build/x", "runs/x/outcome.json", *caches]:
        assert is_ignored(path, ignore_file), path


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
    """The output of `make`, which must succeed."""
    own = {"PATH": f"{project / 'programs'}:{os.environ['PATH']}"}
    command = ["make", "-C", str(project), *arguments]
    made = subprocess.run(
        command, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    return made.stdout


def executable(path: Path, command: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
    return path


def test_another_interpreter_is_another_environment(project: Path) -> None:
    def stamp(python: str | Path, folder: Path = project) -> list[str]:
        printed = make(folder, "-n", "env", f"PYTHON={python}")
        return re.findall(r"touch (\.venv/installed-\w+)", printed)

    other = executable(project / "other", "echo '3.14.0 (other) /opt/other'")
    # An environment made from an interpreter is no other one.
    base = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    if not base.exists():
        pytest.skip(f"there is no {base}")
    assert stamp(sys.executable) == stamp(base) != stamp(other)
    moved = shutil.copytree(project, project.with_name("moved"))
    assert stamp(base, moved) != stamp(base)


def test_a_second_demo_makes_what_is_stale(project: Path) -> None:
    for name in ("python", "torchrun"):
        executable(project / ".venv" / "bin" / name, 'echo "$0 $*"')
    executable(project / "programs" / "date", "echo 20240530_120000")
    store = project / "build" / "demo" / "store" / "manifest.json"
    store.parent.mkdir(parents=True)
    make(project, "--touch", "env", "build/demo/store/manifest.json")
    demos = [make(project, "demo") for _ in range(2)]
    for word in ("pip", "venv --clear", "Setting up", "demo_cells.py", "build_store.py"):
        assert word not in demos[0] + demos[1]
    # Two of one second have two folders.
    assert len({re.findall(r"run\.dir=(runs/demo_\S+)", printed)[0] for printed in demos}) == 2
    last = store.stat().st_mtime
    sources = [
        f"geneformer_mcore/{name}"
        for name in ("store/ingest/merge.py", "tokenizer/rank_encoder.py")
    ]
    for changed in (*sources, "data_prep/build_store.py", "data_prep/demo_cells.py"):
        before = (project / changed).stat().st_mtime
        os.utime(project / changed, (last + 1, last + 1))
        printed = make(project, "-n", "demo")
        assert "build_store.py" in printed, changed
        assert ("demo_cells.py" in printed) == (changed == "data_prep/demo_cells.py")
        assert "pip" not in printed
        os.utime(project / changed, (before, before))
