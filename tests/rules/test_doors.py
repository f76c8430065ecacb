"""Each third-party package comes in by few doors, so that it can be replaced, or be absent."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.rules.sources import (
    ROOT,
    command_files,
    imports_of,
    is_type_checking,
    library_files,
    name_of,
    package_of,
    tree_of,
)

OURS = ("geneformer_mcore", "benchmarks", "tests")

DOORS = {
    "tiledbsoma": ({"cells", "store"}, 3),
    "anndata": ({"cells"}, 2),
    "cellxgene_census": ({"cells"}, 1),
    "h5py": ({"cells"}, 4),
    "omegaconf": ({"config"}, 2),
    "transformer_engine": ({"parallel", "model", "optim"}, 2),
    "apex": ({"parallel", "model", "optim"}, 2),
    "nvidia": ({"feed"}, 1),
    "megatron": ({"parallel", "model", "optim", "checkpoint", "train"}, 17),
    "matplotlib": ({"downstream"}, 6),
    "torch.utils.tensorboard": ({"metrics"}, 1),
    "scanpy": ({"downstream"}, 2),
    "sklearn": ({"downstream", "metrics"}, 3),
}
"""Package -> (packages of the library that may import it, in how many modules at most)."""

FOR_BARE_MACHINES = ("tflops.py", "train_step.py", "gpu_session.py")
BARE_MACHINE_HAS = {"torch", "megatron", "numpy", "omegaconf", "yaml"}
"""What these benchmarks may need besides the standard library: a GPU machine may have no more.
(yaml comes with omegaconf.)"""


@pytest.mark.parametrize("door", DOORS)
def test_door(door: str) -> None:
    packages, most = DOORS[door]
    users = [path for path in library_files() if _imports(path, door)]
    strangers = [name_of(path) for path in users if package_of(path) not in packages]
    assert not strangers, f"{door} may be imported in {packages} only"
    assert len(users) <= most, [name_of(path) for path in users]


def test_commands_keep_away_from_torch_distributed_in_data_prep() -> None:
    for path in command_files():
        if path.parent.name == "data_prep":
            for door in ("torch.distributed", "megatron"):
                assert not _imports(path, door), f"{name_of(path)} imports {door}"


@pytest.mark.parametrize("name", FOR_BARE_MACHINES)
def test_runs_with_four_packages(name: str) -> None:
    needed = {name.split(".")[0] for name in _reachable(ROOT / "benchmarks" / name)}
    third_party = needed - set(sys.stdlib_module_names) - set(OURS)
    assert third_party <= BARE_MACHINE_HAS, third_party - BARE_MACHINE_HAS


@pytest.mark.parametrize(
    "part",
    [
        *("peers/steps_*.py", "side_by_side/step_*.py"),
        *("side_by_side/tflops_*.py", "side_by_side/session_*.py"),
    ],
)
def test_parts_of_benchmarks_for_bare_machines_need_no_more(part: str) -> None:
    """They are imported inside functions: what is reached from each is looked at by itself."""
    paths = sorted((ROOT / "benchmarks").glob(part))
    assert len(paths) >= 4
    needed = {name.split(".")[0] for path in paths for name in _reachable(path)}
    assert needed - set(sys.stdlib_module_names) - set(OURS) <= BARE_MACHINE_HAS


def _imports(path: Path, door: str) -> bool:
    return any(name == door or name.startswith(f"{door}.") for name in imports_of(tree_of(path)))


def _reachable(start: Path) -> set[str]:
    """Names imported when `start` is run: by itself, and by modules of ours it leads to."""
    found: set[str] = set()
    waiting = [start]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        names = set(_imported_at_start(path))
        found |= names
        waiting += [file for name in names for file in _files_of(name)]
    return found


def _imported_at_start(path: Path) -> list[str]:
    # What stands inside a function is imported only when that is called.
    tree = tree_of(path)
    statements = [node for node in tree.body if not is_type_checking(node)]
    lazy = (ast.FunctionDef, ast.ClassDef)
    return [name for node in statements if not isinstance(node, lazy) for name in imports_of(node)]


def _files_of(name: str) -> list[Path]:
    """The files Python runs to import the dotted name, if it is ours: packages' __init__ first."""
    parts = name.split(".")
    if parts[0] not in OURS:
        return []
    folders = [ROOT.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)]
    candidates = [folder / "__init__.py" for folder in folders]
    candidates += [folder.with_suffix(".py") for folder in folders]
    return [path for path in candidates if path.is_file()]
