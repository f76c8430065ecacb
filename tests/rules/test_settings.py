"""Every setting says what it does, and does it: none is without a docstring or unread."""

from __future__ import annotations

import ast

import pytest

from tests.rules.readings import Settings, settings_read
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
    settings = Settings.of(tree_of(SECTIONS))
    assert len(settings.names()) > 40
    read = {name for tree in _acting_trees() for name in settings_read(tree, settings)}
    dead = settings.names() - read
    assert not dead, f"dead settings: {sorted(dead)}"


EXAMPLE = Settings.of(
    ast.parse(
        """
class OptimConfig:
    lr: float = 1.0
    clip: float = 1.0
class TrainConfig:
    steps: int = 1
class Config:
    optim: OptimConfig
    train: TrainConfig
"""
    )
)


@pytest.mark.parametrize(
    "code",
    [
        "x = config.optim.lr",
        "def f(run):\n    return run.config.optim.lr",
        "def f(config):\n    optim = config.optim\n    return optim.lr",
        "def f(run):\n    train, o = run.config.train, run.config.optim\n    return o.lr",
        "def f(settings: Config):\n    return settings.optim.lr",
        "def f(o: OptimConfig):\n    return o.lr",
        "def f(*, o: sections.OptimConfig):\n    def g():\n        return o.lr\n    return g",
        "class A:\n    def f(self):\n        return self.config.optim.lr",
        "def f():\n    config, text = load()\n    return config.optim.lr",
    ],
)
def test_a_reading_is_found(code: str) -> None:
    assert settings_read(ast.parse(code), EXAMPLE) == {"optim.lr"}


@pytest.mark.parametrize(
    "code",
    [
        "x = schedule.lr",
        "x = optim.lr",
        "x = config.train.lr",
        "x = config.schedule.lr",
        "def f(model):\n    return model.lr",
        "def f(optim: OptimConfig):\n    optim = optim.groups\n    return optim.lr",
        "def f(o: OptimConfig):\n    pass\ndef g(o):\n    return o.lr",
        "config.optim.lr = 3",
        "print(f'{config.optim.lr}')",
        "x = 'optim.lr'",
    ],
)
def test_what_only_looks_like_a_reading_is_not_one(code: str) -> None:
    assert not settings_read(ast.parse(code), EXAMPLE)


def test_a_dead_setting_would_be_found() -> None:
    """Settings nobody reads, named like attributes that the library does read of other objects."""
    text = SECTIONS.read_text()
    for name in ("step", "rank", "world_size"):
        assert f".{name}" in (LIBRARY / "train" / "setup.py").read_text()
        text = text.replace(
            "    clip: float = 1.0\n", f"    {name}: int = 1\n    clip: float = 1.0\n"
        )
    settings = Settings.of(ast.parse(text))
    read = {name for tree in _acting_trees() for name in settings_read(tree, settings)}
    assert settings.names() - read == {"optim.step", "optim.rank", "optim.world_size"}


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


def _acting_trees() -> list[ast.AST]:
    """The code that acts on settings. Checking a range is not acting, so of config/ only `plan`
    and what it computes with count, and no benchmark does."""
    commands = [path for path in command_files() if path.parent.name != "benchmarks"]
    library = [path for path in library_files() if path.parent.name != "config"]
    planning = [
        node
        for node in tree_of(DERIVE).body
        if isinstance(node, ast.FunctionDef) and node.name in ("plan", "token_budget")
    ]
    assert len(planning) == 2
    return [*planning, *(tree_of(path) for path in [*library, *commands])]
