"""A damaged checkpoint is found before any weight is used, and the one before it is taken.

Random damage, often: tests/soak/checkpoint_damage.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from geneformer_mcore.checkpoint import folder as checkpoints
from tests.distributed import toy
from tests.distributed.parity import TP2
from tests.distributed.ranks import run_ranks
from tests.distributed.training.test_saving import record, saver_of
from tests.support.small_cells import flip_bit


def save_twice(root: str) -> None:
    run = toy.make("model.num_layers=1", TP2)
    saver = saver_of(run, root, [])
    for step in (1, 2):
        saver.begin(run.trainable, record(step))


def flip_a_bit(path: Path, rng: np.random.Generator) -> None:
    flip_bit(path, rng.integers(path.stat().st_size), rng.integers(8))  # type: ignore[arg-type]


def cut(path: Path, rng: np.random.Generator) -> None:
    os.truncate(path, rng.integers(path.stat().st_size))


def lengthen(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(3))


def delete(path: Path, _rng: np.random.Generator) -> None:
    path.unlink()


Damage = Callable[[Path, np.random.Generator], None]
DAMAGES: tuple[Damage, ...] = (flip_a_bit, cut, lengthen, delete)
KINDS = ("__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "manifest.json", "record.json")
KINDS += ("metadata.json", "random/rank_00001.npz")


def assert_passed_over(root: Path, name: str, damage: Damage, rng: np.random.Generator) -> None:
    """The newest checkpoint of `root`, that of step 2, is damaged in its file `name`, and the one
    before it is found."""
    damage(checkpoints.step_folder(root, 2) / name, rng)
    found, messages = checkpoints.newest_good(root)
    assert found == checkpoints.step_folder(root, 1), (damage.__name__, name)
    assert len(messages) == 1
    assert "It is now called damaged_step_0000000002" in messages[0]


def test_damage_to_any_kind_of_file_is_seen(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = tmp_path / "checkpoints"
    run_ranks(save_twice, 2, str(saved))
    assert checkpoints.newest_good(saved) == (checkpoints.step_folder(saved, 2), [])
    files = [path for path in checkpoints.step_folder(saved, 2).rglob("*") if path.is_file()]
    kinds = {re.sub(r"\d+", "N", path.name) for path in files}
    assert kinds == {re.sub(r"\d+", "N", Path(name).name) for name in KINDS}, "a new kind of file"
    for number, name in enumerate(KINDS):
        for damage in (flip_a_bit, DAMAGES[1 + number % 3]):
            root = Path(shutil.copytree(saved, tmp_path / f"{number}_{damage.__name__}"))
            assert_passed_over(root, name, damage, rng)
