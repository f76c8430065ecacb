"""Every setting says what it does, and does it: none is without a docstring or unread."""

from __future__ import annotations

import ast
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import get_type_hints

from geneformer_mcore.config.sections import Config
from tests.rules.sources import COMMAND_FILES, LIBRARY, LIBRARY_FILES, tree_of

WHOLE = "config"
"""The name under which all sections are known, and what they are called here."""
SECTION_OF = {kind.__name__: name for name, kind in get_type_hints(Config).items()}
SETTINGS = {
    f"{name}.{key.name}" for name, kind in get_type_hints(Config).items() for key in fields(kind)
}
PLANNING = ("plan", "token_budget")


def test_every_setting_has_a_docstring() -> None:
    classes = [
        node
        for node in tree_of(LIBRARY / "config" / "sections.py").body
        if isinstance(node, ast.ClassDef) and node.name in SECTION_OF
    ]
    assert len(classes) == len(SECTION_OF)
    bare = [
        f"{section.name}: {ast.unparse(node)}"
        for section in classes
        for node, follower in pairwise([*section.body, ast.Pass()])
        if isinstance(node, ast.AnnAssign) and not _is_docstring(follower)
    ]
    assert not bare


def test_every_setting_is_read() -> None:
    assert len(SETTINGS) > 40
    dead = SETTINGS - _read_by_all()
    assert not dead


def test_a_dead_setting_would_be_found() -> None:
    """It is named like attributes that the library reads of other objects, or is only shown."""
    assert not _read_by_all() & {"optim.step", "optim.rank", "optim.world_size"}
    assert not _read(ast.parse("def f(config):\n    print(f'{config.optim.lr}')"))


def _is_docstring(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and len(str(value.value)) > 10


@cache
def _read_by_all() -> set[str]:
    """What the code that acts on settings reads. Checking a range is not acting, so of config/ only
    `plan` and what it computes with count, and no benchmark does."""
    planning = tree_of(LIBRARY / "config" / "derive.py").body
    files = [path for path in LIBRARY_FILES if path.parent.name != "config"]
    files += [path for path in COMMAND_FILES if path.parent.name in ("launch", "data_prep")]
    functions = [
        *(f for f in planning if isinstance(f, ast.FunctionDef) and f.name in PLANNING),
        *(f for path in files for f in ast.walk(tree_of(path)) if isinstance(f, ast.FunctionDef)),
    ]
    return {name for function in functions for name in _read(function)}


def _read(function: ast.AST) -> set[str]:
    """Every `section.key` that a function reads. What is shown, in an f-string, or set is not."""
    nodes = list(ast.walk(function))
    texts = (node for node in nodes if isinstance(node, ast.JoinedStr))
    shown = {id(node) for text in texts for node in ast.walk(text)}
    known = _known(nodes)
    return {
        f"{_section(node.value, known)}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if id(node) not in shown
    }


def _known(nodes: list[ast.AST]) -> dict[str, str]:
    """The section that each name stands for, by its annotation or value."""
    known = {WHOLE: WHOLE}
    for node in nodes:
        if isinstance(node, ast.arg) and node.annotation:
            kind = ast.unparse(node.annotation).split(".")[-1]
            known[node.arg] = WHOLE if kind == "Config" else SECTION_OF.get(kind, "")
        elif isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(pairs[0][0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(pairs[0][0].elts, node.value.elts, strict=False))
            known |= {
                one.id: _section(its, known) for one, its in pairs if isinstance(one, ast.Name)
            }
            # It may come from a call, as from load().
            known[WHOLE] = WHOLE
    return known


def _section(node: ast.expr, known: dict[str, str]) -> str:
    """What an expression gives: a section, all of them, or "" for anything else."""
    if isinstance(node, ast.Name):
        return known.get(node.id, "")
    if not isinstance(node, ast.Attribute):
        return ""
    if node.attr == WHOLE:
        return WHOLE
    return (
        node.attr
        if node.attr in SECTION_OF.values() and _section(node.value, known) == WHOLE
        else ""
    )
