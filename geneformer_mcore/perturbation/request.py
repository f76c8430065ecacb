"""Perturbation requests: of launch/perturb.py and of `geneformer_mcore.perturb`.

Request  ->  paths of all outputs checked  ->  Answer on the first rank  ->  files  ->  lines
AnnData  ->  Answer  ->  AnnData
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from geneformer_mcore.errors import ConfigError
from geneformer_mcore.inference import pretrained
from geneformer_mcore.inference.embed import Choices, check_target
from geneformer_mcore.io.files import together
from geneformer_mcore.io.memory import require
from geneformer_mcore.perturbation import outputs
from geneformer_mcore.perturbation.perturb import Answer, perturb
from geneformer_mcore.perturbation.question import Question
from geneformer_mcore.tokenizer.genes import InputOptions

TABLES = (".csv", ".tsv")
OUTPUTS = {
    "table": (TABLES, outputs.write_table),
    "output": ((".h5ad",), outputs.write_cells),
    "gene_effects": (TABLES, outputs.write_moved_genes),
    "plot": ((".png",), outputs.save),
}
"""{field of a request: endings of its name, the function that writes it}."""


@dataclass(frozen=True)
class PerturbRequest:
    """Arguments of launch/perturb.py; at least one of the four outputs."""

    checkpoint: Path
    source: str
    question: Question
    table: Path | None = None
    output: Path | None = None
    plot: Path | None = None
    gene_effects: Path | None = None
    choices: Choices = field(default_factory=Choices)
    vocabulary: Path | None = None
    options: InputOptions = field(default_factory=InputOptions)
    layout: Sequence[str] = ()
    overwrite: bool = False


def run(request: PerturbRequest, is_first: bool) -> list[str]:
    """Perturb on all ranks and write from the first one. Returns the lines to print there.

    Raises a GeneformerError for the user's mistakes, those in output paths before any work.
    """
    _check(request)
    model = pretrained.find(request.checkpoint, request.vocabulary, request.layout)
    started_s = time.monotonic()
    answer = perturb(
        model, request.source, request.question, request.choices, request.options, is_first
    )
    if answer is None:
        return []
    lines = list(answer.lines)
    with together():
        for name, (_, write) in OUTPUTS.items():
            path = getattr(request, name)
            if path is not None:
                write(path, answer)
                lines.append(f"{path}: written")
    return [*lines, *_summary(answer, time.monotonic() - started_s)]


def _check(request: PerturbRequest) -> None:
    named = [(getattr(request, name), suffixes) for name, (suffixes, _) in OUTPUTS.items()]
    targets = [(path, suffixes) for path, suffixes in named if path is not None]
    if not targets:
        raise ConfigError(
            "nothing is to be written: give `table=`, `output=`, `plot=` or `gene_effects=`."
        )
    if request.gene_effects is not None and request.question.moved < 1:
        raise ConfigError(
            f"`gene_effects=` lists the most moved genes, and `moved=` is "
            f"{request.question.moved}. Remedy: `moved=` of at least 1, or no `gene_effects=`."
        )
    resolved = [path.resolve() for path, _ in targets]
    if len({*resolved, Path(request.source).resolve()}) <= len(resolved):
        raise ConfigError(
            "input and outputs must be different files: no output may take another's place, and "
            "the input is never changed."
        )
    for path, suffixes in targets:
        check_target(path, suffixes, request.overwrite)


def _summary(answer: Answer, seconds: float) -> list[str]:
    rows = answer.table
    lines = [
        f"{len(answer.obs):,} cells x {len(rows):,} perturbations ({rows['n_cells'].sum():,} "
        f"variants, and those of {answer.facts['perturb']['num_controls']:,} controls), "
        f"{seconds:.1f} s; {(rows['q'] < 0.05).sum():,} with q < 0.05"
    ]
    absent = rows.index[rows["n_cells"] == 0].tolist()
    if absent:
        more = " ..." if len(absent) > 10 else ""
        lines.append(f"in none of the cells: {', '.join(absent[:10])}{more}")
    return lines


def perturb_adata(
    adata: Any,
    checkpoint: str | Path,
    question: Question,
    choices: Choices,
    vocabulary: str | Path | None,
    counts_layer: str | None,
) -> Any:
    """Perturb an AnnData in memory, in this process alone. Returns an AnnData."""
    require(adata)
    question.check()
    model = pretrained.find(checkpoint, vocabulary)
    options = InputOptions(layer=counts_layer)
    answer = perturb(model, adata, question, choices, options, shows_progress=True)
    if answer is None:
        raise ConfigError(
            "geneformer_mcore.perturb works in one process, and this is one of several. Remedy: "
            "torchrun launch/perturb.py."
        )
    return outputs.as_anndata(replace(answer, obs=adata.obs.iloc[answer.rows_N]))
