"""What a user can do wrong, as exceptions of ours (floor 0).

Every message states the rule, the numbers that broke it, and the remedy. Commands print it without
a traceback and end with exit code 2 (see exit_codes.run); `assert` is kept for our own invariants.

A message names a parameter as who calls the library from Python writes it, in backticks:
`counts_layer=`, `dtype="float32"`, `allow_normalised=True`. A command shows the same message with
its options: --counts-layer, --dtype float32, --allow-normalised (see naming_options).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_PARAMETER = re.compile(r"`([a-z_]+)=([^`]*)`")
_options: dict[str, str] | None = None
"""In a command: its options for those parameters that do not share their name."""


@contextmanager
def naming_options(**options: str) -> Iterator[None]:
    """Inside, errors read as those of a command. options: {parameter: option}, or
    {"parameter=value": option}, where the option is not called as its parameter is. For the whole
    process: prefetching threads raise errors too."""
    global _options
    before, _options = _options, options
    try:
        yield
    finally:
        _options = before


def shown(text: str) -> str:
    """`text` as a message shows it: in a command, parameters in backticks become options."""
    return text if _options is None else _PARAMETER.sub(_as_option, text)


class _MessageError(Exception):
    """Shows its parameters as options where it ends a command."""

    def __str__(self) -> str:
        return shown(super().__str__())


class GeneformerError(_MessageError):
    """Anything the user can fix. Its message is complete: it is printed as it stands."""

    @property
    def names_parameter(self) -> bool:
        """Whether the message names a parameter."""
        return any(_PARAMETER.search(str(part)) for part in self.args)


def _as_option(parameter: re.Match[str]) -> str:
    name, value = parameter.groups()
    options = _options or {}
    if f"{name}={value}" in options:
        return options[f"{name}={value}"]
    option = options.get(name, f"--{name.replace('_', '-')}")
    return option if value in ("", "True") else option + " " + value.strip('"')


class ConfigError(GeneformerError):
    """A setting is unknown, out of range, or does not go with another one."""


class DataError(GeneformerError):
    """A file of counts, a vocabulary or a token store is missing, damaged or does not fit."""


class ExternalIOError(DataError):
    """What an input is read through failed (a disk, a limit), not the input: nothing may be
    concluded of it, least of all that it can be left out."""


class NetworkError(ExternalIOError):
    """A network failed to the last attempt: the same command may well do, started again."""


class LostWorkerError(_MessageError):
    """A worker process was killed, or memory ran out: no wrong input, and no defect of ours."""


AGAIN = "Remedy: start the same command again; if memory is short, with fewer `workers=`."
"""The remedy of a LostWorkerError."""


class DivergedError(GeneformerError):
    """A training cannot go on: its loss or gradients are not finite. Exit code 1."""


class CheckpointError(GeneformerError):
    """A checkpoint is damaged, or belongs to another run."""


class MissingBackendError(GeneformerError):
    """An optional package was asked for and is not installed, or is not the one it claims to be."""
