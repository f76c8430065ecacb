"""From settings to everything the loop needs: the one place that sees all parts.

store -> feeds        config -> model -> weights -> optimizer        checkpoint -> state
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from geneformer_mcore import backends
from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import state
from geneformer_mcore.checkpoint.record import (
    Identity,
    Record,
    check_continues,
    hidden_values,
)
from geneformer_mcore.config import Config, Plan
from geneformer_mcore.contracts import TokenSource, padded_vocabulary_size
from geneformer_mcore.errors import CheckpointError, DataError
from geneformer_mcore.feed.batch import truncate
from geneformer_mcore.feed.control import ShuffledGenes
from geneformer_mcore.feed.loader import Feed, Share
from geneformer_mcore.feed.masks import Masking
from geneformer_mcore.feed.order import Order
from geneformer_mcore.metrics import baselines
from geneformer_mcore.metrics.ceiling import measured_peak
from geneformer_mcore.metrics.meter import Meter
from geneformer_mcore.metrics.sinks import Sinks
from geneformer_mcore.model import attention, geneformer, initial_weights, settings
from geneformer_mcore.model.flops import ModelShape
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.parallel import collectives, groups
from geneformer_mcore.parallel.groups import Topology
from geneformer_mcore.store.reader import TokenStore
from geneformer_mcore.train.run_folder import RunFolder

BASELINE_CELLS = 20_000
"""Training cells that the baselines are counted on, at most."""


@dataclass
class Run:
    """A run, ready to go on. step and cells_seen say where it stands."""

    config: Config
    config_text: str
    plan: Plan
    folder: RunFolder
    device: torch.device
    topology: Topology
    store: TokenStore
    trainable: optim.Trainable
    feed: Feed
    validation: Feed | None
    control: Feed | None
    meter: Meter
    step: int = 0
    cells_seen: int = 0
    messages: list[str] = field(default_factory=list)
    sinks: Sinks | None = None

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank writes what the run writes once."""
        return self.topology.rank == 0

    def say(self, message: str) -> None:
        """A line on the console and in log.txt, from rank 0."""
        if self.sinks is not None:
            self.sinks.message(message)

    def identity(self) -> Identity:
        """What a start must have in common with the checkpoint it continues."""
        return Identity(
            config=self.config_text,
            hidden=hidden_values(self.config, self.config_text),
            vocabulary=self.store.vocabulary.checksum,
            content=self.store.manifest.content_hash,
        )

    def layout(self) -> dict[str, int]:
        """What random states depend on."""
        parallel = self.config.parallel
        return {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "data": self.plan.data_parallel,
        }


def open_store(config: Config) -> TokenStore:
    """The token store of a run. Raises DataError if it does not suit the settings."""
    store = TokenStore.open(config.data.store)
    longest = store.manifest.seq_length
    if config.data.seq_length > longest:
        raise DataError(
            f"data.seq_length ({config.data.seq_length}) exceeds the {longest} tokens to which "
            f"{store.path} cut its cells. Lower it, or build the store again with a longer "
            "--seq-length."
        )
    if _count(store, "train") == 0:
        raise DataError(f"{store.path} has no training cells, so there is nothing to train on.")
    if config.train.validate_every_steps and _count(store, "validation") == 0:
        raise DataError(
            f"{store.path} has no validation cells, and train.validate_every_steps is "
            f"{config.train.validate_every_steps}. Set it to 0, or build the store with a "
            "--validation-fraction."
        )
    return store


def prepare(
    config: Config,
    config_text: str,
    plan: Plan,
    folder: RunFolder,
    store: TokenStore,
    device: torch.device,
    topology: Topology,
) -> Run:
    """Builds the model, restores the newest checkpoint if there is one, opens the logs."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    groups.seed_dropout(config.train.seed, topology)
    validates = config.train.validate_every_steps > 0
    shuffled = ShuffledGenes(store, config.train.seed)
    run = Run(
        config=config,
        config_text=config_text,
        plan=plan,
        folder=folder,
        device=device,
        topology=topology,
        store=store,
        trainable=_trainable(config, store, device),
        feed=_feed(config, store, store, "train", topology),
        validation=_feed(config, store, store, "validation", topology) if validates else None,
        control=_feed(config, store, shuffled, "validation", topology) if validates else None,
        meter=_meter(config, store, device, topology),
    )
    _restore(run)
    if run.is_first_rank:
        _write_baselines(run)
        folder.write_config(config_text)
        run.sinks = Sinks(folder.path, config.train.steps, run.step, config_text)
    _announce(run)
    return run


def _trainable(config: Config, store: TokenStore, device: torch.device) -> optim.Trainable:
    core = settings.transformer_config(
        config.model, config.parallel, config.train.precision, device
    )
    size = store.vocabulary.size
    stages = geneformer.build(config.model, core, device, size, config.data.seq_length)
    for stage in stages:
        initial_weights.fill(stage, config.train.seed)
    return optim.wrap(stages, config.optim)


def _feed(
    config: Config, store: TokenStore, source: TokenSource, split: str, topology: Topology
) -> Feed:
    """The cells of a split, read from `source`: the store, or a view of it."""
    data, train = config.data, config.train
    start, stop = store.rows(split)
    masked, random, kept = data.mask_fractions
    return Feed(
        source,
        Order(start, stop - start, data.span_cells, data.window_spans, train.seed),
        Masking(data.mask_probability, (masked, random, kept), store.vocabulary.size, train.seed),
        Share(
            train.global_batch_size,
            train.micro_batch_size,
            topology.data_rank,
            topology.data_size,
        ),
        data.seq_length,
        # Under sequence parallel every tensor rank takes an equal share of the positions.
        int(np.lcm(data.pad_multiple, config.parallel.tensor)),
    )


def _meter(config: Config, store: TokenStore, device: torch.device, topology: Topology) -> Meter:
    model = config.model
    shape = ModelShape(
        model.num_layers, model.hidden_size, model.ffn_hidden_size, store.vocabulary.size
    )
    peak = measured_peak(device, settings.DTYPES[config.train.precision])
    return Meter(shape, config.data.seq_length, topology.world_size, peak)


def _restore(run: Run) -> None:
    """Continues from the newest checkpoint that verifies, if there is one."""
    source = _newest_checkpoint(run)
    if source is None:
        return
    record = Record.load(source)
    check_continues(record, run.identity())
    same_layout = record.layout == run.layout()
    state.load(run.trainable, source, run.topology.rank if same_layout else None)
    run.step, run.cells_seen = record.step, record.cells_seen
    run.meter.load_state_dict(record.meters)
    run.messages.append(
        f"continues from {source} (step {record.step}, {record.cells_seen} cells seen)"
        + ("" if same_layout else f"; its layout was {record.layout}: dropout is seeded anew")
    )


def _newest_checkpoint(run: Run) -> Path | None:
    """The checkpoint to continue from. Rank 0 looks; all ranks get its answer, or its error."""
    found: tuple[str | None, list[str], str] = (None, [], "")
    if run.is_first_rank:
        try:
            newest, damaged = checkpoints.newest_good(run.folder.checkpoints)
            found = (newest.name if newest else None, damaged, "")
        except CheckpointError as error:
            found = (None, [], str(error))
    name, run.messages, problem = collectives.from_first_rank(found)
    if problem:
        raise CheckpointError(problem)
    return run.folder.checkpoints / name if name else None


def _write_baselines(run: Run) -> None:
    """Scores the two baselines on the very positions that validation asks for."""
    if run.validation is None:
        return
    train = run.feed.order
    first, last = train.first_row, train.first_row + min(train.num_cells, BASELINE_CELLS)
    seen = truncate(run.store.read(first, last), run.config.data.seq_length)
    held_out = run.validation.validation_cells(run.config.train.validate_batches)
    labels, places = run.validation.masking.validation_positions(held_out)
    if len(labels) == 0:
        raise DataError(
            f"validation would predict no gene in its {len(held_out)} cell(s) with "
            f"data.mask_probability={run.config.data.mask_probability}. Raise that or "
            "train.validate_batches, or set train.validate_every_steps=0."
        )
    scores = baselines.score(seen, run.store.vocabulary.size, labels, places)
    run.folder.write_baselines(json.dumps(scores, indent=1) + "\n")


def _announce(run: Run) -> None:
    """Says what runs, on what, with which kernels."""
    config, store = run.config, run.store
    layout = ", ".join(f"{kind} {size}" for kind, size in run.layout().items())
    run.say(
        f"{config.data.store}: {_count(store, 'train')} training cells, "
        f"{_count(store, 'validation')} validation cells, {store.vocabulary.size} tokens "
        f"(embedding {padded_vocabulary_size(store.vocabulary.size)} rows)"
    )
    run.say(
        f"{run.topology.world_size} rank(s) on {run.device.type} ({layout}), "
        f"{run.plan.micro_batches} micro batch(es) of {config.train.micro_batch_size} per step, "
        f"precision {config.train.precision.value}, "
        f"attention {attention.choose(config.model, run.device).value}, "
        f"{torch.get_num_threads()} CPU thread(s) per rank"
    )
    run.say(", ".join(f"{name} {version}" for name, version in backends.describe().items()))
    for message in run.messages:
        run.say(message)


def _count(store: TokenStore, split: str) -> int:
    start, stop = store.rows(split)
    return stop - start
