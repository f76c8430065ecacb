"""Options that several commands have, and the settings made from them.

command line -> --checkpoint --precision ... parallel.KEY=N  (STANDARD)
             -> counts of a file (COUNTS) -> InputOptions

Light to import: `--help` must not wait for torch.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from geneformer_mcore.config.sections import Precision
    from geneformer_mcore.tokenizer.genes import InputOptions

# A parser, or a group of its options: argparse has no public name for both.
Options = argparse._ActionsContainer
Made = TypeVar("Made")

STANDARD: dict[str, dict[str, Any]] = {
    "--checkpoint": {
        "type": Path,
        "required": True,
        "help": "a run's folder, or one of its step folders",
    },
    "--vocabulary": {"type": Path, "help": "the model's, where its store has moved"},
    "--pooling": {
        "choices": ("mean", "cls"),
        "default": "mean",
        "help": "default: mean over genes",
    },
    "--precision": {
        "choices": ("fp32", "bf16", "fp16"),
        "default": "",
        "help": "of the arithmetic (default: fp32 on a CPU, the training's on a GPU)",
    },
    "--tokens-per-batch": {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "at most (default: by device)",
    },
    "--counts-layer": {
        "help": "of the counts, raw.X, X, ms/NAME/X/LAYER (default: counts, raw.X, X)"
    },
    "--symbols": {
        "metavar": "FILE",
        "help": "symbol -> Ensembl id: JSON, or a GENCODE table",
    },
    "--allow-normalised": {
        "action": "store_true",
        "help": "values may be counts scaled per cell",
    },
    "--allow-low-overlap": {
        "action": "store_true",
        "help": "few genes may be in the vocabulary",
    },
    "--allow-external": {
        "action": "store_true",
        "help": "parts of the cells may lie in other files: for files of your own",
    },
    "--overwrite": {"action": "store_true", "help": "replace outputs that are there"},
    "layout": {
        "nargs": "*",
        "metavar": "parallel.KEY=N",
        "help": "parallel.tensor, parallel.pipeline, parallel.sequence (default: data parallel)",
    },
    "settings": {"nargs": "*", "metavar": "section.key=value"},
}
COUNTS = (
    "--counts-layer",
    "--symbols",
    "--allow-normalised",
    "--allow-low-overlap",
    "--allow-external",
)


def parser(doc: str | None, examples: str) -> argparse.ArgumentParser:
    """A command's parser: the first line of its docstring, and examples as they are written."""
    return argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add(options: Options, *names: str) -> None:
    """Add options of STANDARD."""
    for name in names:
        options.add_argument(name, **STANDARD[name])


def build(kind: type[Made], arguments: argparse.Namespace, **values: Any) -> Made:
    """A dataclass: its fields are `values`, else the arguments of the same names, else defaults."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    same = {name: value for name, value in vars(arguments).items() if name in names}
    return kind(**same | values)


def precision_of(arguments: argparse.Namespace) -> Precision | None:
    """--precision, if given."""
    from geneformer_mcore.config.sections import Precision

    return Precision(arguments.precision) if arguments.precision else None


def input_options(arguments: argparse.Namespace) -> InputOptions:
    """The options COUNTS. Raises DataError for an invalid table of symbols."""
    from geneformer_mcore.tokenizer.gencode import load_symbols
    from geneformer_mcore.tokenizer.genes import InputOptions

    return InputOptions(
        arguments.counts_layer,
        load_symbols(arguments.symbols) if arguments.symbols else {},
        arguments.allow_normalised,
        arguments.allow_low_overlap,
        allow_external=arguments.allow_external,
    )
