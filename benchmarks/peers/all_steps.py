"""Every contestant of train_step.py, in the order of the table, ours first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.peers.step_contestant import StepContestant

HF_DYNAMIC, HF_PADDED = "hf_dynamic", "hf_padded"
"""Those that all others are compared with: Hugging Face as usual, and as NVIDIA's stack pads."""

NAMES = (
    *("ours_packed", "ours_padded"),
    *(HF_DYNAMIC, "hf_grouped", HF_PADDED),
    *("megatron", "te_layers"),
)


def contestants() -> dict[str, type[StepContestant]]:
    """{name: its class}. Imports Megatron-Core, and no other peer."""
    from benchmarks.peers import steps_hf, steps_megatron, steps_te

    kinds: tuple[type[StepContestant], ...] = (
        *(steps_megatron.OursPacked, steps_megatron.OursPadded),
        *(steps_hf.HFDynamic, steps_hf.HFGrouped, steps_hf.HFPadded),
        *(steps_megatron.PlainMegatron, steps_te.TELayers),
    )
    return dict(zip(NAMES, kinds, strict=True))
