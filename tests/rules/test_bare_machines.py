"""Some benchmarks run where little is installed: torch, Megatron-Core, numpy and OmegaConf."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

from tests.rules.sources import COMMAND_FILES, LIBRARY_FILES, ROOT, tree_of

PRESENT = {"torch", "megatron", "numpy", "omegaconf", "yaml"}  # yaml comes with omegaconf
OURS = {"geneformer_mcore", "benchmarks", "tests"}
SIDE_BY_SIDE = ("step_*.py", "tflops_*.py", "session_*.py")
PARTS = ("tflops.py", "train_step.py", "gpu_session.py", "peers/steps_*.py")
PARTS += tuple(f"side_by_side/{name}" for name in SIDE_BY_SIDE)
"""The commands, and what they import inside functions."""
PROGRAM = """
import importlib, json, sys, warnings
absent, modules = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(absent))
warnings.simplefilter("ignore")
import geneformer_mcore
assert not [name for name in sys.modules if name.startswith("geneformer_mcore.")]
for name in modules:
    importlib.import_module(name)
"""


def test_they_need_four_packages_only() -> None:
    found = [sorted((ROOT / "benchmarks").glob(pattern)) for pattern in PARTS]
    assert all(found)
    paths = [path.relative_to(ROOT).with_suffix("") for each in found for path in each]
    modules = [".".join(path.parts) for path in paths]
    program = [sys.executable, "-c", PROGRAM, json.dumps([absent(), modules])]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def absent() -> list[str]:
    """What else our code imports, anywhere."""
    nodes = [node for path in [*LIBRARY_FILES, *COMMAND_FILES] for node in ast.walk(tree_of(path))]
    names = {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    found = {name.split(".")[0] for name in names} - PRESENT - OURS - set(sys.stdlib_module_names)
    assert {"h5py", "anndata", "tiledbsoma", "pandas"} <= found
    return sorted(found)
