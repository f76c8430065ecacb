"""YAML file + `section.key=value` arguments -> Config; all errors are reported at once.

defaults (sections.py)  <-  [another run's]  <-  one YAML file  <-  command line
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from geneformer_mcore.config.sections import Activation, Config
from geneformer_mcore.errors import ConfigError

_PATHS = (
    *("run.dir", "data.store", "data.vocabulary", "data.split", "data.cache_dir"),
    "finetune.checkpoint",
)


def load(
    file: str | Path | None = None, overrides: Sequence[str] = (), beneath: Sequence[str] = ()
) -> tuple[Config, str]:
    """The settings of a run, and the same as YAML text with interpolations unresolved.

    beneath: section.key=value that the file and `overrides` override.
    Raises ConfigError that lists every unknown key (with the nearest known one), every value of a
    wrong type and every malformed argument.
    """
    merged = OmegaConf.structured(Config)
    problems: list[str] = []
    below = _argument_values(beneath, problems)
    above = _argument_values(overrides, problems)
    _merge(merged, [*below, *_file_values(file, problems), *above], problems)
    return _resolved(merged), dump(merged)


def parse(text: str, origin: str, overrides: Sequence[str] = ()) -> Config:
    """The settings in `text` of `dump`, with `overrides`. ConfigError as `load`, of `origin`."""
    merged = OmegaConf.structured(Config)
    problems: list[str] = []
    values = _text_values(text, origin, problems)
    _merge(merged, [*values, *_argument_values(overrides, problems)], problems)
    return _resolved(merged)


def dump(config: Config | DictConfig) -> str:
    """YAML text of all settings, interpolations such as ${oc.env:HOME} unresolved."""
    node = config if isinstance(config, DictConfig) else OmegaConf.structured(config)
    return OmegaConf.to_yaml(node, resolve=False)


def run_dir(file: str | Path | None, overrides: Sequence[str]) -> str:
    """run.dir as far as known, even of settings that `load` refuses."""
    found = [
        values["run.dir"]
        for _, values in [*_file_values(file, []), *_argument_values(overrides, [])]
        if isinstance(values.get("run.dir"), str)
    ]
    return _expanded(found[-1] if found else Config().run.dir)


def _file_values(file: str | Path | None, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    if file is None:
        return []
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        problems.append(f"cannot read the config file {file}: {error.strerror}.")
        return []
    except UnicodeDecodeError as error:
        problems.append(f"{file} is not plain YAML: {error}.")
        return []
    return _text_values(text, f"{file}", problems)


def _text_values(text: str, origin: str, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    try:
        values = _StrictLoader(text).get_single_data() or {}
    except yaml.YAMLError as error:
        problems.append(f"{origin} is not plain YAML: {' '.join(str(error).split())}.")
        return []
    if not isinstance(values, dict):
        text = f"{origin}: a config file is a mapping of sections, as in configs/demo.yaml."
        problems.append(text)
        return []
    return [(origin, {key: value}) for key, value in _leaves(values)]


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML in which no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(twice)} is set twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _leaves(values: dict[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            leaves += _leaves(value, f"{name}.")
        elif value or name not in _sections():  # an empty section sets nothing
            leaves.append((name, value))
    return leaves


def _argument_values(
    overrides: Sequence[str], problems: list[str]
) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for argument in overrides:
        key, equals, text = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            problems.append(f"`{argument}`: settings are written section.key=value.")
            continue
        try:
            # Nothing after the sign is "", not YAML's null.
            found.append((f"`{argument}`", {key: yaml.safe_load(text) if text else ""}))
        except yaml.YAMLError:
            problems.append(f"`{argument}`: the value is not valid YAML.")
    return found


def _merge(
    merged: DictConfig, given: Sequence[tuple[str, dict[str, Any]]], problems: list[str]
) -> None:
    known = [f"{name}.{key}" for name in _sections() for key in vars(getattr(Config(), name))]
    for origin, key, value in (
        (where, *item) for where, values in given for item in values.items()
    ):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
            problems.append(f"{origin}: there is no setting `{key}`.{hint}")
            continue
        try:
            value = _expanded(value) if key in _PATHS else value
            OmegaConf.update(merged, key, _number(merged, key, value))
        except OmegaConfBaseException:
            problems.append(f"{origin}: {key} takes {_wanted(key)}, and got {value!r}.")
    if problems:
        raise ConfigError("\n".join(problems))


def _expanded(value: Any) -> Any:
    """A path, or several with commas between, where `~` is the user's home."""
    if not isinstance(value, str):
        return value
    return re.sub(r"(^|,\s*)~(?=/)", lambda found: found[1] + os.path.expanduser("~"), value)


def _number(merged: DictConfig, key: str, value: Any) -> Any:
    # YAML 1.1 reads 1e-3 (no dot) as a string.
    default = OmegaConf.select(merged, key)
    if not isinstance(default, int | float) or isinstance(default, bool):
        return value
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    whole = isinstance(default, int) and isinstance(number, float) and number.is_integer()
    return int(number) if whole else number


def _wanted(key: str) -> str:
    """The kind of value that a setting takes, in words."""
    section, name = key.split(".")
    default = getattr(getattr(Config(), section), name)
    if isinstance(default, Enum) or default is None:
        choices = type(default) if isinstance(default, Enum) else Activation
        return f"one of {', '.join(choice.value for choice in choices)}"
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return kinds.get(type(default), "a list of numbers such as [0.8, 0.1, 0.1]")


def _sections() -> list[str]:
    return list(vars(Config()))


def _resolved(merged: DictConfig) -> Config:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"a setting refers to something that is not there: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(config, Config)
    return config
