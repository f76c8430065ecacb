"""Rules of the code that no linter knows: sizes, names, texts, settings, rates, bare machines."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from typing import get_type_hints

import pytest

from geneformer_mcore.config.sections import Config
from tests.rules.sources import COMMAND_FILES, LIBRARY, LIBRARY_FILES, ROOT, tree_of

MOST_FILE_LINES, MOST_FUNCTION_LINES = 600, 60
VAGUE_NAMES = {"utils.py", "util.py", "helpers.py", "helper.py", "misc.py", "common.py"}

BARE = (
    *("tflops.py", "train_step.py", "gpu_session.py", "harness/peers/steps*.py"),
    *("harness/tflops_rows.py", "harness/step_cells.py", "harness/made_up.py"),
)
"""Benchmarks, and what they import inside functions, that run where only torch, Megatron-Core,
numpy, numba and OmegaConf are installed."""
ABSENT = "anndata cellxgene_census datasets h5py matplotlib nvidia.dali pandas psutil pyarrow"
ABSENT += " scanpy scdataset scipy sklearn tensorboard tiledbsoma tiledbsoma_ml transformers"
IMPORT_THEM = """
import importlib, sys
absent, *modules = sys.argv[1:]
sys.modules |= dict.fromkeys(absent.split())
for module in modules:
    importlib.import_module(module)
"""

SECTION_OF = {kind.__name__: name for name, kind in get_type_hints(Config).items()}
SETTINGS = {
    f"{name}.{key.name}" for name, kind in get_type_hints(Config).items() for key in fields(kind)
}
SECTION = re.compile(rf"(?:.+\.)?config\.({'|'.join(SECTION_OF.values())})")
PLANNING = ("plan", "token_budget")


def test_sizes_and_names() -> None:
    for path in LIBRARY_FILES:
        assert path.name not in VAGUE_NAMES, path
        assert len(path.read_text().splitlines()) <= MOST_FILE_LINES, path
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < MOST_FUNCTION_LINES, (path, node.name)


# In brackets, so that this file does not hold what it looks for.
@pytest.mark.parametrize(
    "pattern",
    [
        "[/]work/\\w|[/]tmp/\\w|[/]root\\b|[/]home/\\w",
        "pypi[.]org|python[h]osted|index-url[= ]+https?[:]",
        "allow_pickle *= *[^F]|weights_only *= *[^T]",
    ],
    ids=["private path", "registry host", "pickle"],
)
def test_no_text_like(pattern: str) -> None:
    search = ["git", "grep", "--untracked", "-nIE", pattern]
    found = subprocess.run(search, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stdout + found.stderr


def test_some_benchmarks_need_five_packages_only() -> None:
    found = [sorted((ROOT / "benchmarks").glob(pattern)) for pattern in BARE]
    assert all(found)
    files = [path.relative_to(ROOT).with_suffix("") for paths in found for path in paths]
    words = [ABSENT, *(".".join(path.parts) for path in files)]
    subprocess.run([sys.executable, "-c", IMPORT_THEM, *words], cwd=ROOT, check=True, timeout=120)


def test_every_key_of_a_record_is_asserted() -> None:
    """No number of metrics.jsonl is printed unchecked."""
    record = next(
        node
        for node in ast.walk(tree_of(LIBRARY / "metrics" / "meter.py"))
        if isinstance(node, ast.FunctionDef) and node.name == "record"
    )
    (returned,) = (node.value for node in ast.walk(record) if isinstance(node, ast.Return))
    assert isinstance(returned, ast.Dict)
    keys = {key.value for key in returned.keys if isinstance(key, ast.Constant)}
    assert len(keys) >= 12
    tests = tree_of(ROOT / "tests" / "unit" / "training" / "test_metrics_meter.py")
    assertions = [ast.unparse(node) for node in ast.walk(tests) if isinstance(node, ast.Assert)]
    assert not keys - set(re.findall(r"\['(\w+)'\]", " ".join(assertions)))


def test_every_setting_has_a_docstring() -> None:
    tree = tree_of(LIBRARY / "config" / "sections.py")
    classes = [node for node in tree.body if getattr(node, "name", "") in SECTION_OF]
    assert len(classes) == len(SECTION_OF)
    bare = [
        ast.unparse(node)
        for section in classes
        for node, follower in pairwise([*section.body, ast.Pass()])
        if isinstance(node, ast.AnnAssign) and not re.match(r"['\"].{10}", ast.unparse(follower))
    ]
    assert not bare


def test_every_setting_is_read() -> None:
    """By code that acts on it. Checking a range is not acting, so of config/ only `plan` and what
    it computes with count, and no benchmark does."""
    planning = tree_of(LIBRARY / "config" / "derive.py").body
    files = [path for path in LIBRARY_FILES if path.parent.name != "config"]
    files += [path for path in COMMAND_FILES if path.parent.name in ("launch", "data_prep")]
    functions = [
        *(node for node in planning if getattr(node, "name", "") in PLANNING),
        *(f for path in files for f in ast.walk(tree_of(path)) if isinstance(f, ast.FunctionDef)),
    ]
    found = {name for function in functions for name in _read(function)}
    assert len(SETTINGS) > 40
    assert not SETTINGS - found
    # Attributes of other objects are not taken for settings.
    assert not found & {"optim.step", "optim.rank", "optim.world_size"}


def test_a_setting_that_is_only_shown_is_not_read() -> None:
    assert not _read(ast.parse("def f(config):\n    print(f'{config.optim.lr}')"))


def _read(function: ast.AST) -> set[str]:
    """Every `section.key` that a function reads, by the annotations and values of its names."""
    nodes = list(ast.walk(function))
    texts = (node for node in nodes if isinstance(node, ast.JoinedStr))
    shown = {node for text in texts for node in ast.walk(text)}
    known = {}
    for node in nodes:
        if isinstance(node, ast.arg) and node.annotation:
            known[node.arg] = SECTION_OF.get(ast.unparse(node.annotation).split(".")[-1], "")
        elif isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            known |= {ast.unparse(target): _section(value, {}) for target, value in pairs}
    return {
        f"{_section(node.value, known)}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if node not in shown
    }


def _section(node: ast.expr, known: dict[str, str]) -> str:
    """The section that an expression gives, or "" for anything else."""
    text = ast.unparse(node)
    found = SECTION.fullmatch(text)
    return found[1] if found else known.get(text, "")


def test_texts_are_utf_8_in_every_locale() -> None:
    """Of files and of other programs: the locale of a cluster may know no Greek letter."""
    commands = [path for path in COMMAND_FILES if "benchmarks" not in path.parts]
    calls = [
        (path, node)
        for path in [*LIBRARY_FILES, *commands]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and _is_of_text(node)
    ]
    assert len(calls) > 30
    assert not [
        f"{path}:{call.lineno}"
        for path, call in calls
        if "encoding" not in [keyword.arg for keyword in call.keywords]
    ]


def _is_of_text(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    words = call.args[isinstance(call.func, ast.Name) :]  # open(path, mode), path.open(mode)
    mode = words[0].value if words and isinstance(words[0], ast.Constant) else None
    is_mode = isinstance(mode, str) and re.fullmatch("[rawx][+t]*", mode)
    is_text = any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords)
    # read_text(path) is a function of ours, which names the encoding itself.
    is_path = name == "write_text" or (name == "read_text" and not call.args)
    return is_path or bool(name == "open" and is_mode) or is_text
