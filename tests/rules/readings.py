"""Which settings a piece of code reads: `config.optim.lr`, or `optim.lr` where `optim` is known.

    config, x.config, a parameter `: Config`      ->  all settings
    config.SECTION, a parameter `: OptimConfig`   ->  a section
    name = one of these (alone or in a tuple)     ->  the same under another name
    SECTION.KEY                                   ->  a reading

Followed by names within a function and the functions around it, not through calls or attributes
of objects. What is only shown (in an f-string) or set is not read.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TypeAlias

ALL = "Config"
"""The class that holds the sections, by the name of which the whole of the settings goes here."""

Known: TypeAlias = dict[str, str | None]
"""Name -> the class it is an instance of, None for any other."""


@dataclass(frozen=True)
class Settings:
    """sections: section -> its class;  keys: class -> its settings."""

    sections: dict[str, str]
    keys: dict[str, set[str]]

    @classmethod
    def of(cls, module: ast.Module) -> Settings:
        """The settings that the classes of `module` declare."""
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        (whole,) = (node for node in classes if node.name == ALL)
        sections = {
            field.target.id: ast.unparse(field.annotation)
            for field in whole.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        keys = {
            node.name: {
                field.target.id
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
            for node in classes
            if node.name in sections.values()
        }
        return cls(sections, keys)

    def names(self) -> set[str]:
        """Every `section.key`."""
        return {f"{name}.{key}" for name, kind in self.sections.items() for key in self.keys[kind]}


def settings_read(tree: ast.AST, settings: Settings) -> set[str]:
    """Every `section.key` that the code in `tree` reads."""
    reader = _Reader(settings)
    reader.visit(tree)
    return reader.read


class _Reader(ast.NodeVisitor):
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.read: set[str] = set()
        self.known: Known = {"config": ALL}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside, self.known = self.known, dict(self.known)
        for parameter in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self._bind(parameter.arg, self._annotated(parameter.annotation))
        self.generic_visit(node)
        self.known = outside

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Showing a setting is not acting on it."""

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        kind = self._kind(node.value)
        if isinstance(node.ctx, ast.Load) and node.attr in self.settings.keys.get(kind or "", ()):
            (section,) = (name for name, of in self.settings.sections.items() if of == kind)
            self.read.add(f"{section}.{node.attr}")

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its_value in zip(target.elts, value.elts, strict=False):
                self._assign(one, its_value)
        elif isinstance(target, ast.Name):
            self._bind(target.id, self._kind(value))

    def _bind(self, name: str, kind: str | None) -> None:
        # `config` may come from a call, as from load(): no other name is believed unseen.
        self.known[name] = ALL if name == "config" else kind

    def _kind(self, node: ast.expr) -> str | None:
        """The class of settings that an expression gives."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        if self._kind(node.value) == ALL:
            return self.settings.sections.get(node.attr)
        return ALL if node.attr == "config" else None

    def _annotated(self, annotation: ast.expr | None) -> str | None:
        name = ast.unparse(annotation).split(".")[-1] if annotation else ""
        return name if name == ALL or name in self.settings.keys else None
