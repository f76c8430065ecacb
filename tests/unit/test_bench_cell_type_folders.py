"""A folder of benchmarks/cell_types.py is found again by the same command, and by no other one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks import cell_types

DEFAULTS: dict[str, Any] = {"settings": [], "steps": None, "ranks": 2, "seed": 0, "resamples": 9}


def test_names_change_with_all_that_changes_figures(tmp_path: Path) -> None:
    train, config, vocabulary = (tmp_path / name for name in ("a.h5ad", "c.yaml", "v.json"))
    for path in (train, config, vocabulary):
        path.write_text("one")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.h5ad").write_text("one")
    names: list[str] = []

    def name(labelled: Path = train, options: tuple[str, ...] = (), **more: Any) -> None:
        arguments = argparse.Namespace(**DEFAULTS | {"config": config} | more)
        model = cell_types._model((train,), list(options), arguments)
        names.append(cell_types._types(labelled, tmp_path / model, arguments))

    name()
    name()
    assert names[0] == names[1]
    assert names[0].startswith("types_a_")
    name(tmp_path / "deep" / "a.h5ad")
    name(options=("--vocabulary", str(vocabulary)))
    for key, value in {"steps": 3, "settings": ["a=1"], "ranks": 1, "seed": 1}.items():
        name(**{key: value})
    name(resamples=8)
    config.write_text("other")
    name()
    os.utime(train, ns=(1, 1))
    name()
    assert len(set(names[1:])) == len(names[1:]) == 10
