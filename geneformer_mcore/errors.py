"""What a user can do wrong, as exceptions of ours (floor 0).

Every message states the rule, the numbers that broke it, and the remedy. Commands print it without
a traceback and end with exit code 2 (see commands.run); `assert` is kept for our own invariants.
"""

from __future__ import annotations


class GeneformerError(Exception):
    """Anything the user can mend. Its message is complete: it is printed as it stands."""


class ConfigError(GeneformerError):
    """A setting is unknown, out of range, or does not go with another one."""


class DataError(GeneformerError):
    """A file of counts, a vocabulary or a token store is missing, damaged or does not fit."""


class ExternalIOError(DataError):
    """What an input is read through failed (a disk, a limit), not the input: nothing may be
    concluded of it, least of all that it can be left out."""


class NetworkError(ExternalIOError):
    """A network failed to the last attempt: the same command may well do, started again."""


class LostWorkerError(Exception):
    """A worker process was killed, or memory ran out: no wrong input, and no defect of ours."""


AGAIN = "Remedy: start the same command again; if memory is short, with fewer --workers."
"""The remedy of a LostWorkerError."""


class CheckpointError(GeneformerError):
    """A checkpoint is damaged, or belongs to another run."""


class MissingBackendError(GeneformerError):
    """An optional package was asked for and is not installed, or is not the one it claims to be."""
