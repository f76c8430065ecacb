"""How much room a run's checkpoints take, known before there is one.

a checkpoint = parameters x (weights + fp32 master + two moments) + a little per rank
a run        = checkpoints that are kept + the one that is being written
"""

from __future__ import annotations

import math
from pathlib import Path

from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint.saving import SPARE_BYTES
from geneformer_mcore.config.sections import Config, Precision
from geneformer_mcore.contracts import padded_vocabulary_size
from geneformer_mcore.model.flops import ModelShape, num_parameters

OPTIMIZER_BYTES = 12
"""Per parameter: fp32 master weight and two fp32 moments."""
_RANDOM_BYTES = 32_768
"""A rank's file of random states, at most."""


def bytes_of_tensors(config: Config, vocabulary_size: int) -> int:
    """Bytes of all tensors of one checkpoint; the layout of ranks does not matter."""
    model = config.model
    shape = ModelShape(
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
        padded_vocabulary_size(vocabulary_size),
    )
    weight_bytes = 4 if config.train.precision is Precision.fp32 else 2
    return num_parameters(shape, config.data.seq_length) * (weight_bytes + OPTIMIZER_BYTES)


def bytes_of_one(config: Config, vocabulary_size: int, world_size: int) -> int:
    """Bytes of one checkpoint, at most."""
    return bytes_of_tensors(config, vocabulary_size) + SPARE_BYTES + world_size * _RANDOM_BYTES


def most_at_once(config: Config) -> int:
    """Checkpoints that a run may have at one time, the one being written included. An upper bound:
    one that is kept for two reasons counts twice."""
    settings, steps = config.checkpoint, config.train.steps
    every = 0
    if settings.keep_every:
        every = steps // math.lcm(settings.keep_every, settings.save_every_steps or 1)
    best = int(settings.keep_best and config.train.validate_every_steps > 0)
    return settings.keep_last + best + every + 1


def bytes_there(root: Path) -> int:
    """Bytes of the checkpoints that are in the folder `root` already."""
    folders = [checkpoints.step_folder(root, step) for step in checkpoints.steps(root)]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)
