"""Every setting says what it does, and does it: none is without a docstring or unread."""

from __future__ import annotations

import ast

from tests.rules.sources import LIBRARY, command_files, library_files, tree_of

SECTIONS = LIBRARY / "config" / "sections.py"
DERIVE = LIBRARY / "config" / "derive.py"


def test_every_setting_has_a_docstring() -> None:
    bare = [
        f"{section.name}.{name}"
        for section in _sections()
        for name, follower in _fields(section)
        if not _is_docstring(follower)
    ]
    assert not bare


def test_every_setting_is_read() -> None:
    read = _attributes_read()
    unread = [
        f"{section.name}.{name}"
        for section in _sections()
        for name, _ in _fields(section)
        if name not in read
    ]
    assert not unread, f"dead settings: {unread}"


def _sections() -> list[ast.ClassDef]:
    found = [
        node
        for node in tree_of(SECTIONS).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.name != "Config"
    ]
    assert len(found) >= 8
    return found


def _fields(section: ast.ClassDef) -> list[tuple[str, ast.stmt | None]]:
    """(name, the statement that follows) of each field."""
    followers = [*section.body[1:], None]
    return [
        (node.target.id, follower)
        for node, follower in zip(section.body, followers, strict=True)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _is_docstring(node: ast.stmt | None) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and len(node.value.value) > 10
    )


def _attributes_read() -> set[str]:
    """Names read as `.name` by code that acts on them. Checking a range is not acting, so of
    config/ only `plan` itself counts."""
    trees: list[ast.AST] = [
        tree_of(path)
        for path in [*library_files(), *command_files()]
        if path.parent.name != "config"
    ]
    trees += [
        node
        for node in tree_of(DERIVE).body
        if isinstance(node, ast.FunctionDef) and node.name == "plan"
    ]
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
