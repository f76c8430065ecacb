"""What launch/perturb.py is asked: which genes, in which cells, compared with what.

options  ->  Question, checked  ->  its genes and groups by the names of a file  ->  Perturbations
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_mcore.downstream.perturbations import GeneNames, Perturbation, read_groups
from geneformer_mcore.downstream.variants import Mode
from geneformer_mcore.errors import ConfigError

ALL_GENES = -1


@dataclass(frozen=True)
class Question:
    """What is perturbed, in which cells, and what is asked of it.

    genes:      ids or symbols, each a perturbation;  groups: a file, or {name: genes}
    top:        so many of the genes in most cells, each a perturbation; ALL_GENES: all of them
    mode:       delete or overexpress;  truncated: delete from the sentence as it was cut
    start:      COLUMN=VALUE, the cells that are perturbed; "": all, but for those of the goal
    goal:       COLUMN=VALUE, the cells toward whose mean vector shifts are measured; "": none
    max_cells:  at most so many of either, drawn by `seed`; 0: all
    null:       random controls to compare each perturbation with, drawn by `seed`; 0: no p
    moved:      how many of the most moved genes are kept of each perturbation; 0: none
    """

    genes: Sequence[str] = ()
    groups: Path | Mapping[str, Sequence[str]] | None = None
    top: int | None = None
    mode: str = Mode.delete.value
    truncated: bool = False
    start: str = ""
    goal: str = ""
    max_cells: int = 0
    null: int = 100
    moved: int = 0
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for what cannot be asked, or not together."""
        if self.mode not in {mode.value for mode in Mode}:
            raise ConfigError(f"mode must be delete or overexpress, and is {self.mode}.")
        if self.truncated and self.mode != Mode.delete.value:
            raise ConfigError(
                "--truncated goes with --mode delete: what is put in front of a sentence that "
                "was cut is the same as of a whole one."
            )
        if not self.genes and self.groups is None and self.top is None:
            raise ConfigError(
                "nothing is to be perturbed: give --genes, --groups, --top N or --all-genes."
            )
        for name in ("max_cells", "null", "moved", "seed"):
            if getattr(self, name) < 0:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} must be at least 0, and is {getattr(self, name)}.")
        if self.top is not None and self.top != ALL_GENES and self.top < 1:
            raise ConfigError(f"--top must be at least 1, and is {self.top}.")

    def perturbations(self, names: GeneNames) -> tuple[list[Perturbation], list[str]]:
        """Its genes and groups, and lines on what was left out. DataError for unknown ones."""
        asked, twice = names.singles(self.genes)
        if self.groups is None:
            return asked, twice
        groups = self.groups
        named = read_groups(groups) if isinstance(groups, Path) else groups
        found, lines = names.groups(named)
        return asked + found, twice + lines

    def facts(self) -> dict[str, Any]:
        """What goes into uns: plain text and numbers."""
        names = ("mode", "truncated", "start", "goal", "max_cells", "null", "seed")
        return {name: getattr(self, name) for name in names}
