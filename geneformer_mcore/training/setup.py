"""Set-up of a run: from settings to everything the loop needs.

task -> cells -> feeds        task -> stages -> optimizer        checkpoint -> state
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from geneformer_mcore import backends
from geneformer_mcore.checkpoint import folder as checkpoints
from geneformer_mcore.checkpoint import state, weights_reader
from geneformer_mcore.checkpoint.manager import CheckpointManager
from geneformer_mcore.checkpoint.record import (
    Identity,
    Record,
    check_continues,
    interpolated_values,
)
from geneformer_mcore.config import Config, Plan, from_anywhere
from geneformer_mcore.data.loader import Feed
from geneformer_mcore.distributed import collectives, groups
from geneformer_mcore.distributed.groups import Topology
from geneformer_mcore.distributed.watchdog import Watchdog
from geneformer_mcore.errors import CheckpointError
from geneformer_mcore.metrics.meter import Meter
from geneformer_mcore.metrics.peak_flops import measured_peak
from geneformer_mcore.metrics.sinks import Sinks
from geneformer_mcore.model import fused, megatron_config
from geneformer_mcore.model.attention import select, selftest
from geneformer_mcore.optim import optimizer as optim
from geneformer_mcore.training import sizes
from geneformer_mcore.training.run_folder import RunFolder
from geneformer_mcore.training.spike_guard import SpikeGuard
from geneformer_mcore.training.task import HeldOut, Task
from geneformer_mcore.types import padded_vocabulary_size


@dataclass
class Run:
    """A run and its state."""

    config: Config
    config_text: str
    plan: Plan
    folder: RunFolder
    device: torch.device
    topology: Topology
    task: Task
    trainable: optim.Trainable
    feed: Feed
    held_out: HeldOut | None
    meter: Meter
    guard: SpikeGuard
    saver: CheckpointManager
    watch: Watchdog
    step: int = 0
    cells_seen: int = 0
    messages: list[str] = field(default_factory=list)
    sinks: Sinks | None = None

    @property
    def is_first_rank(self) -> bool:
        return self.topology.rank == 0

    def log(self, message: str) -> None:
        """Log a line on the console and in log.txt, on rank 0."""
        if self.sinks is not None:
            self.sinks.message(message)

    def identity(self) -> Identity:
        """Settings and cells that must equal those of the checkpoint it continues."""
        return Identity(
            config=self.config_text,
            hidden=interpolated_values(self.config, self.config_text),
            vocabulary=self.task.cells.vocabulary.checksum,
            content=self.task.cells.content_hash,
            task=self.task.facts,
        )

    def layout(self) -> dict[str, int]:
        """Ranks per kind of parallelism, which random states depend on."""
        parallel = self.config.parallel
        return {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "data": self.plan.data_parallel,
        }


def prepare(
    config: Config,
    config_text: str,
    plan: Plan,
    folder: RunFolder,
    task: Task,
    device: torch.device,
    topology: Topology,
    watch: Watchdog,
) -> Run:
    """Build the model, restore the latest valid checkpoint if there is one, open the logs."""
    peak = measured_peak(device, megatron_config.DTYPES[config.train.precision])
    sizes.check(config, plan, task.cells, device, peak)
    watch.doing("building the model")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    groups.seed_dropout(config.train.seed, topology)
    stages = task.stages(device)
    run = Run(
        config=config,
        config_text=from_anywhere(config_text, config),
        plan=plan,
        folder=folder,
        device=device,
        topology=topology,
        task=task,
        trainable=optim.wrap(stages, config.optim, config.parallel),
        feed=task.feed(topology, device),
        held_out=task.held_out(topology, device),
        meter=Meter(task.shape, config.data.seq_length, topology.world_size, peak),
        guard=SpikeGuard(config.train),
        saver=CheckpointManager(
            folder.checkpoints, config.checkpoint, topology.rank, device, lambda line: run.log(line)
        ),
        watch=watch,
    )
    _check_attention(run)
    watch.doing("looking for a checkpoint", limit_s=config.checkpoint.deadline_s)
    _restore(run)
    watch.doing("opening the logs")
    if run.is_first_rank:
        run.messages += task.describe(folder, run.feed, run.held_out)
        folder.write_config(run.config_text)
        folder.write_vocabulary(task.cells.vocabulary)
        run.sinks = Sinks(folder.path, config.train.steps, run.step, run.config_text)
    _announce(run)
    return run


def _check_attention(run: Run) -> None:
    """Raises ConfigError if the chosen attention does not compute what it should."""
    worst = max(
        selftest.check(stage, run.device, run.config.data.packing) for stage in run.trainable.stages
    )
    chosen = _chosen_attention(run)
    run.messages.append(
        f"attention {chosen}: within {worst:.1g} of the plain computation, gradients included"
    )


def _chosen_attention(run: Run) -> str:
    config = run.config
    packed, precision = config.data.packing, config.train.precision
    return select.choose(config.model, run.device, precision, packed).value


def _restore(run: Run) -> None:
    """Continue from the latest valid checkpoint, if there is one."""
    source = _newest_checkpoint(run)
    if source is None:
        return
    record = Record.load(source)
    check_continues(record, run.identity())
    if record.is_converted:
        state.load(run.trainable, source, rank=None)
        run.messages.append(f"begins with the converted weights in {source}, and moments of 0")
        return
    same_layout = record.layout == run.layout()
    state.load(run.trainable, source, run.topology.rank if same_layout else None)
    run.step, run.cells_seen = record.step, record.cells_seen
    run.meter.load_state_dict(record.meters)
    run.guard.load_state_dict(record.guard)
    run.messages.append(
        f"continues from {source} (step {record.step}, {record.cells_seen} cells seen)"
        + ("" if same_layout else f"; its layout was {record.layout}: dropout is seeded again")
    )


def _newest_checkpoint(run: Run) -> Path | None:
    """The checkpoint to continue from, found by rank 0; all ranks get it, or its error."""
    found: tuple[str | None, list[str], str] = (None, [], "")
    if run.is_first_rank:
        try:
            newest, damaged = checkpoints.newest_good(run.folder.checkpoints)
            if newest is not None:
                weights_reader.read_weights(newest)  # refuses numbers that are not finite
            found = (newest.name if newest else None, damaged, "")
        except CheckpointError as error:
            found = (None, [], str(error))
        except OSError as error:
            why = f"the checkpoints in {run.folder.checkpoints} cannot be looked at: {error}"
            found = (None, [], f"{why}. Fix that, and start the same command again.")
    name, damaged, problem = collectives.from_first_rank(found)
    run.messages += damaged
    if problem:
        raise CheckpointError(problem)
    return run.folder.checkpoints / name if name else None


def _announce(run: Run) -> None:
    """Log cells, layout, kernels and versions."""
    config, cells, plan = run.config, run.task.cells, run.plan
    size = config.train.micro_batch_size
    micro = f"{plan.micro_batches} micro batch(es) of {size} cells per step"
    if plan.tokens_per_micro_batch:
        micro = f"cells packed into micro batches of at most {plan.tokens_per_micro_batch} tokens"
    layout = ", ".join(f"{kind} {size}" for kind, size in run.layout().items())
    is_compiled = fused.is_compiled(config.model.compile, run.device)
    run.log(
        f"{cells.name}: {cells.count('train')} training cells, "
        f"{cells.count('validation')} validation cells, {cells.vocabulary.size} tokens "
        f"(embedding {padded_vocabulary_size(cells.vocabulary.size)} rows)"
    )
    run.log(
        f"{run.topology.world_size} rank(s) on {run.device.type} ({layout}), "
        f"{micro}, precision {config.train.precision.value}, attention {_chosen_attention(run)}, "
        f"elementwise parts {'compiled' if is_compiled else 'not compiled'}, "
        f"{torch.get_num_threads()} CPU thread(s) per rank"
    )
    run.log(", ".join(f"{name} {version}" for name, version in backends.describe().items()))
    for message in run.messages:
        run.log(message)
