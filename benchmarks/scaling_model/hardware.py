"""What the model of a step knows beforehand: GPUs, networks, the two models, the card's runs.

Every number stands beside its unit and where it is from. Speeds of GPUs here are estimates, used
only where benchmarks/results holds no measurement of that GPU (see speed.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from geneformer_mcore.model.flops import ModelShape, num_parameters
from geneformer_mcore.types import padded_vocabulary_size

VOCABULARY = 25_429
SEQ_LENGTH = 2048
"""Tokens of a full cell, as the model card trains."""
STEPS = 115_430
"""Optimizer steps of the card's runs."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Model:
    """One of the card's two models and the run it made of it."""

    name: str
    shape: ModelShape
    nodes: int
    """Of 8 A100 each (model card, "Training diagnostics")."""
    micro_batch: int
    """Cells per GPU and pass (the same)."""
    global_batch: int
    """Cells per optimizer step (the same)."""
    card_wall_s: float
    """Wall clock of the card's 115,430 steps, in seconds (the same)."""

    @property
    def num_parameters(self) -> int:
        """With the embedding padded as it is trained."""
        shape = self.shape
        rows = padded_vocabulary_size(shape.vocabulary_size)
        padded = ModelShape(shape.num_layers, shape.hidden_size, shape.ffn_hidden_size, rows)
        return num_parameters(padded, SEQ_LENGTH)


MODELS = {
    # 1 day, 20 hours and 19 minutes.
    "10m": Model("10m", ModelShape(6, 256, 512, VOCABULARY), 8, 32, 2048, 44 * 3600 + 19 * 60),
    # 3 days, 18 hours and 55 minutes.
    "106m": Model("106m", ModelShape(12, 768, 3072, VOCABULARY), 16, 16, 2048, 90 * 3600 + 55 * 60),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU, with how many full cells (2,048 tokens, bf16, dropout on) it may train on in a second.

    The two Hopper anchors are the best of this project's three goals for its own step; they are
    below what the arithmetic allows (290 cells/s on an H200, 114 on an A100, for 106M).
    """

    name: str
    memory_bytes_s: float
    """Bandwidth of its memory, bytes/s (NVIDIA's data sheets, SXM, 80 GB and 141 GB)."""
    cells_per_s: dict[str, float]
    """Model -> full cells per second: an estimate."""
    origin: dict[str, str]
    """Model -> where the estimate is from."""


_A100, _H100, _H200 = 2.039e12, 3.35e12, 4.8e12
_GOAL = {"10m": 1750.0, "106m": 240.0}
_H200_GOAL = "best goal for the H200"

GPUS = {
    "A100": Gpu(
        "A100",
        _A100,
        # 10M is bound by memory: few FLOPs per byte at width 256.
        {"10m": _GOAL["10m"] * _A100 / _H200, "106m": 96.0},
        {
            "10m": "best goal for the H200 x memory bandwidth 2.039 / 4.8",
            "106m": "best goal for the A100",
        },
    ),
    "H100": Gpu(
        "H100",
        _H100,
        # Its matrix units are the H200's; so this is the pessimistic end.
        {name: goal * _H100 / _H200 for name, goal in _GOAL.items()},
        dict.fromkeys(_GOAL, "best goal for the H200 x memory bandwidth 3.35 / 4.8"),
    ),
    "H200": Gpu("H200", _H200, _GOAL, dict.fromkeys(_GOAL, _H200_GOAL)),
}

PUBLISHED_A100 = {"10m": 185.0, "106m": 58.0}
"""Full cells per second and A100 of NVIDIA's BioNeMo 2, read off its published chart of Geneformer
(35-37 TFLOPS at micro batch 120, about 103 TFLOPS at micro batch 16)."""


@dataclass(frozen=True)
class Network:
    """What gradients travel over. The defaults are those of 8 A100 with NVSwitch and a 200 Gbit/s
    InfiniBand card per GPU; they are kept for Hopper, whose networks are twice as fast."""

    nvlink_bytes_s: float = 230e9
    """Within a node, per GPU, as NCCL's all-reduce gets it of NVLink 3's 300 GB/s each way."""
    ib_bytes_s: float = 20e9
    """Between nodes, per GPU, of 25 GB/s."""
    latency_s: float = 8e-6
    """One hop of a ring: a kernel's start and the wire."""

    def slower(self, factor: float) -> Network:
        """Both bandwidths divided by `factor`."""
        return Network(self.nvlink_bytes_s / factor, self.ib_bytes_s / factor, self.latency_s)
