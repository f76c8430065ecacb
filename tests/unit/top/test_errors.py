"""Errors name a parameter of the library, or the option of the command that met them."""

from __future__ import annotations

import pickle

import pytest

from geneformer_mcore import exit_codes
from geneformer_mcore.errors import DataError, naming_options

MESSAGE = 'a "b=c": `counts_layer=`, `dtype="float32"`, `top=3`, `allow_normalised=True`, `X`.'
ERROR = DataError(MESSAGE)


def test_parameters_are_options_in_a_command_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        # As it comes from a worker process.
        raise DataError(f"x: {pickle.loads(pickle.dumps(ERROR))}")

    for options, layer in (({}, "--counts-layer"), ({"counts_layer": "--layer"}, "--layer")):
        with pytest.raises(SystemExit, match="2"):
            exit_codes.run(fails, **options)
        assert capsys.readouterr().err == (
            f'error: x: a "b=c": {layer}, --dtype float32, --top 3, --allow-normalised, `X`.\n'
        )
    assert str(ERROR) == MESSAGE
    with naming_options():
        assert ERROR.names_parameter
    assert not DataError("`X` and a=b").names_parameter
