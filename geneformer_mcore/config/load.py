"""YAML file + `section.key=value` arguments -> Config, with all mistakes named at once.

defaults (sections.py)  <-  one YAML file  <-  command line  =  merged, interpolations unresolved
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from geneformer_mcore.config.sections import Config
from geneformer_mcore.errors import ConfigError


def load(file: str | Path | None = None, overrides: Sequence[str] = ()) -> tuple[Config, str]:
    """The settings of a run, and the same as YAML text with interpolations left as written.

    Raises ConfigError that lists every unknown key (with the nearest known one), every value of a
    wrong type and every malformed argument.
    """
    merged = OmegaConf.structured(Config)
    problems: list[str] = []
    for origin, values in [*_file_values(file, problems), *_argument_values(overrides, problems)]:
        _merge(merged, origin, values, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return _resolved(merged), dump(merged)


def dump(config: Config | DictConfig) -> str:
    """YAML text of all settings; interpolations such as ${oc.env:HOME} stay as they are."""
    node = config if isinstance(config, DictConfig) else OmegaConf.structured(config)
    return OmegaConf.to_yaml(node, resolve=False)


def _file_values(file: str | Path | None, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    if file is None:
        return []
    try:
        values = yaml.safe_load(Path(file).read_text()) or {}
    except OSError as error:
        problems.append(f"cannot read the config file {file}: {error.strerror}.")
        return []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{file} is not plain YAML: {' '.join(str(error).split())}.")
        return []
    if not isinstance(values, dict):
        problems.append(f"{file}: a config file is a mapping of sections, as in configs/demo.yaml.")
        return []
    return [(f"{file}: {key}", {key: value}) for key, value in _leaves(values)]


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            leaves += _leaves(value, f"{name}.")
        elif value is not None or prefix:
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
            found.append((f"`{argument}`", {key: yaml.safe_load(text)}))
        except yaml.YAMLError:
            problems.append(f"`{argument}`: the value is not valid YAML.")
    return found


def _merge(merged: DictConfig, origin: str, values: dict[str, Any], problems: list[str]) -> None:
    for key, value in values.items():
        known = _known_keys()
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
            problems.append(f"{origin}: there is no setting `{key}`.{hint}")
            continue
        try:
            OmegaConf.update(merged, key, _number(merged, key, value))
        except OmegaConfBaseException as error:
            problems.append(f"{origin}: {str(error).splitlines()[0]}")


def _number(merged: DictConfig, key: str, value: Any) -> Any:
    # YAML 1.1 reads 1e-3 (no dot) as a string: people write learning rates that way.
    if isinstance(value, str) and isinstance(OmegaConf.select(merged, key), float):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _known_keys() -> list[str]:
    sections = OmegaConf.to_container(OmegaConf.structured(Config), enum_to_str=True)
    assert isinstance(sections, dict)
    return [f"{section!s}.{key}" for section, keys in sections.items() for key in keys]


def _resolved(merged: DictConfig) -> Config:
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"a setting refers to something that is not there: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(config, Config)
    return config
