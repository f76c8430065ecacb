"""Foreign weights as the run directory of a run at step 0.

weights, settings, vocabulary  ->  RUN/vocabulary.json
                                   RUN/config.yaml
                                   RUN/origin.json, ...                  their origin
                                   RUN/checkpoints/step_0000000000/      as training writes it

The checkpoint is complete, with optimizer moments of 0: it loads under any layout, as any other.
Pretraining continues from it with any cells and recipe (see record.check_continues).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore

from geneformer_mcore import backends
from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import state
from geneformer_mcore.checkpoint.record import Identity, Record
from geneformer_mcore.config import Config, dump
from geneformer_mcore.convert.hf_keys import Weights
from geneformer_mcore.distributed import device, groups
from geneformer_mcore.errors import ConfigError
from geneformer_mcore.io.files import whole_folder
from geneformer_mcore.model import geneformer, init, megatron_config
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.tokenizer.vocabulary import Vocabulary

VOCABULARY, CONFIG = "vocabulary.json", "config.yaml"
TOKENS = "token_dictionary.json"
"""{name: id} of the original model, where its ids are not ours."""


def write(
    out: Path,
    config: Config,
    vocabulary: Vocabulary,
    weights: Weights,
    files: dict[str, dict[str, Any]],
) -> None:
    """Write the run directory `out`.

    weights: {our name: whole tensor}, without padding rows;  files: {name: JSON content} of further
    files. Raises DataError if `out` exists, or cannot be written.
    """
    config.run.dir = str(out)
    text = dump(config)
    identity = Identity(text, {}, vocabulary.checksum, content="")
    versions = backends.describe()
    record = Record(0, 0, {}, identity, layout={}, versions=versions, guard={})
    with whole_folder(out) as partial, alone(config) as here:
        root = partial / "checkpoints"
        staging = checkpoints.make_staging(root, 0)
        state.save(_trainable(config, vocabulary.size, weights, here), staging, rank=0)
        record.save(staging)
        checkpoints.commit(staging, root, 0)
        vocabulary.save(partial / VOCABULARY)
        (partial / CONFIG).write_text(text)
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def alone(config: Config) -> Iterator[torch.device]:
    """Megatron's process groups of one process with the whole model."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"one process converts a model, and torchrun has started {os.environ['WORLD_SIZE']}. "
            "Remedy: start it by plain python."
        )
    here = device.start()
    topology = groups.join(groups.Rendezvous(HashStore(), 0, 1), here, config.parallel)
    groups.seed_dropout(config.train.seed, topology)
    try:
        yield here
    finally:
        groups.stop()
        gc.collect()  # the optimizer's cycles hold groups, each with threads of its own


def _trainable(
    config: Config, num_tokens: int, weights: Weights, here: torch.device
) -> optim.Trainable:
    """The model with `weights`, and its optimizer. Padding rows of the vocabulary become 0."""
    model, parallel, precision = config.model, config.parallel, config.train.precision
    core = megatron_config.transformer_config(model, parallel, precision, here)
    (stage,) = geneformer.build(model, core, here, num_tokens, config.data.seq_length)
    rest = dict(weights)
    with torch.no_grad():
        for entry in init.sharded_parameters(stage):
            whole = rest.pop(entry.key)
            padding = entry.global_shape[0] - len(whole)
            if padding:
                assert entry.key.startswith(("embedding.word", "output_layer"))
                whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
            assert tuple(whole.shape) == tuple(entry.global_shape), entry.key
            entry.data.copy_(whole)
    assert not rest, rest.keys()
    return optim.wrap([stage], config.optim, parallel)
