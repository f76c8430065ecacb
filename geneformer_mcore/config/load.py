"""YAML file + `section.key=value` arguments -> Config; all errors are reported at once.

defaults (sections.py)  <-  [another run's]  <-  one YAML file  <-  command line

A value is what was written, 2024_01_31 as well as 0012, until the type of its setting reads it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from geneformer_mcore.config import plain_yaml
from geneformer_mcore.config.sections import Activation, Config, Source
from geneformer_mcore.errors import ConfigError

_PATHS = (
    *("run.dir", "data.store", "data.vocabulary", "data.split", "data.cache_dir"),
    "finetune.checkpoint",
)
_NULL = ("~", "null", "Null", "NULL")
_IN_NO_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


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
    config = _resolved(merged)
    _check_texts(config)
    return config, dump(merged)


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


def argument(key: str, value: object) -> str:
    """`key=value` that `load` reads as just this value, whatever it is: text is quoted, and means
    no reference where it holds `${`."""
    if isinstance(value, str):
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return f"{key}={json.dumps(value)}"


def from_anywhere(text: str, config: Config) -> str:
    """The `text` of `load` with absolute paths, as a run keeps it: it is read in other folders.
    A path that begins with a reference, such as ${oc.env:STORES}, keeps it."""
    merged = OmegaConf.structured(Config)
    _merge(merged, _text_values(text, "the settings", []), [])
    written: Any = OmegaConf.to_container(merged, resolve=False)
    for path in _PATHS:
        section, key = path.split(".")
        of_counts = path == "data.store" and config.data.source is Source.counts
        value = getattr(getattr(config, section), key)
        absolute = _absolute(written[section][key], value, of_counts)
        OmegaConf.update(merged, path, absolute)
    return dump(merged)


def _absolute(written: str, value: str, of_counts: bool) -> str:
    if of_counts and "${" not in written:  # several, with commas between
        parts = [part.strip() for part in written.split(",")]
        return ",".join(_absolute(part, part, False) for part in parts)
    if not value or "://" in value or os.path.isabs(value):
        return written
    return f"{Path.cwd()}/{written}" if "${" in written else str(Path(written).absolute())


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
        text = plain_yaml.read_text(Path(file))
    except OSError as error:
        problems.append(f"cannot read the config file {file}: {error.strerror}.")
        return []
    except UnicodeDecodeError as error:
        problems.append(f"{file} is not plain YAML: {error}.")
        return []
    return _text_values(text, f"{file}", problems)


def _text_values(text: str, origin: str, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    try:
        values = plain_yaml.values(text, as_written=True) or {}
    except yaml.YAMLError as error:
        problems.append(f"{origin} is not plain YAML: {' '.join(str(error).split())}.")
        return []
    if not isinstance(values, dict):
        text = f"{origin}: a config file is a mapping of sections, as in configs/demo.yaml."
        problems.append(text)
        return []
    return [(origin, {key: value}) for key, value in _leaves(values)]


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
            found.append((f"`{argument}`", {key: _typed(key, text)}))
        except yaml.YAMLError as error:
            why = f" ({error.problem})" if isinstance(error, plain_yaml.LimitError) else ""
            problems.append(f"`{argument}`: the value is not valid YAML{why}.")
    return found


def _typed(key: str, text: str) -> Any:
    """The value of `key=text`: for a setting that is text, the text itself, or what its quotes
    hold."""
    if not text:  # not YAML's null
        return ""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if key in _texts() and not is_quoted:
        return None if text in _NULL else text
    if is_quoted:
        with suppress(ValueError):  # of `argument`: YAML reads \\ud83e as half of a character
            return json.loads(text)
    return plain_yaml.values(text, as_written=True)


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
            if key in _texts() and not isinstance(value, str):
                raise ValidationError
            OmegaConf.update(merged, key, _number(merged, key, value))
        except OmegaConfBaseException:
            problems.append(
                f"{origin}: {key} takes {_wanted(key)}, and got {value!r:.200}.{_hint(key, value)}"
            )
        if value == "???":  # OmegaConf's word for a value that is still to come
            problems.append(f"{origin}: {key} takes {_wanted(key)}, and cannot be {value}.")
    if problems:
        raise ConfigError("\n".join(problems))


def _expanded(value: Any) -> Any:
    """A path, or several with commas between, where `~` is the user's home."""
    if not isinstance(value, str):
        return value
    return re.sub(r"(^|,\s*)~(?=/)", lambda found: found[1] + os.path.expanduser("~"), value)


def _number(merged: DictConfig, key: str, value: Any) -> Any:
    """A number that is written as people write it: 1e3 for a whole one, 0100 for a hundred."""
    default = OmegaConf.select(merged, key)
    if not isinstance(default, int | float) or isinstance(default, bool):
        return value
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            number = kind(value)
        except ValueError:
            continue
        whole = isinstance(default, int) and isinstance(number, float) and number.is_integer()
        return int(number) if whole else number
    return value


def _wanted(key: str) -> str:
    """The kind of value that a setting takes, in words."""
    section, name = key.split(".")
    default = getattr(getattr(Config(), section), name)
    if isinstance(default, Enum) or default is None:
        choices = type(default) if isinstance(default, Enum) else Activation
        return f"one of {', '.join(choice.value for choice in choices)}"
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return kinds.get(type(default), "a list of numbers such as [0.8, 0.1, 0.1]")


def _hint(key: str, value: Any) -> str:
    """What is to be done about a text that is refused."""
    if value is None and key in _texts():
        return f" Leave it empty ({key}= or '') for none; a name is put in quotes: '\"null\"'."
    if "${" in str(value):
        return " `${` begins a reference such as ${oc.env:HOME}; for the two signs write `\\${`."
    return ""


def _check_texts(config: Config) -> None:
    """Raise ConfigError for what neither a file nor a column can be called, or nobody means to."""
    problems = []
    for key in _texts():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if _IN_NO_NAME.search(value):
            problems.append(
                f"{key} must be one line of Unicode without control characters, and is {value!r}."
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _texts() -> list[str]:
    """The settings that are text."""
    return [
        f"{section}.{name}"
        for section in _sections()
        for name, value in vars(getattr(Config(), section)).items()
        if isinstance(value, str)
    ]


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
