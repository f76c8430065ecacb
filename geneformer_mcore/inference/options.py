"""What the commands on a trained model ask for alike, and what becomes of it.

command line -> the arithmetic: --precision --tokens-per-batch --vocabulary
             -> counts: --counts-layer --symbols --allow-...  ->  InputOptions
             -> layout: parallel.KEY=N

Light to import: `--help` must come at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geneformer_mcore.config.sections import Precision
    from geneformer_mcore.tokenizer.genes import InputOptions

# A parser, or a group of its options: argparse has no public name for what both are.
Options = argparse._ActionsContainer


def parser(doc: str | None, examples: str) -> argparse.ArgumentParser:
    """A command's: the first line of its docstring, and examples as they are written."""
    return argparse.ArgumentParser(
        description=(doc or "").partition("\n")[0],
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_checkpoint(options: Options) -> None:
    """--checkpoint"""
    about = "a run's folder, or one of its step folders"
    options.add_argument("--checkpoint", type=Path, required=True, help=about)


def add_arithmetic(options: Options) -> None:
    """--precision and --tokens-per-batch."""
    options.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="",
        help="of the arithmetic (default: fp32 on a CPU, the training's on a GPU)",
    )
    add_tokens_per_batch(options)


def add_tokens_per_batch(options: Options) -> None:
    """--tokens-per-batch"""
    about = "at most (default: by device)"
    options.add_argument("--tokens-per-batch", type=int, default=0, metavar="N", help=about)


def precision_of(arguments: argparse.Namespace) -> Precision | None:
    """What --precision asks for; None if it is not said."""
    from geneformer_mcore.config.sections import Precision

    return Precision(arguments.precision) if arguments.precision else None


def add_vocabulary(options: Options) -> None:
    """--vocabulary"""
    about = "the model's, where its store has moved"
    options.add_argument("--vocabulary", type=Path, help=about)


def add_pooling(options: Options) -> None:
    """--pooling"""
    about = "default: mean over genes"
    options.add_argument("--pooling", choices=("mean", "cls"), default="mean", help=about)


def add_counts(options: Options) -> None:
    """How counts and genes are read from a file."""
    add = options.add_argument
    add("--counts-layer", help="layer of the counts (default: counts, raw.X, X, in that order)")
    add("--symbols", metavar="FILE", help="symbol -> Ensembl id: JSON, or a GENCODE table")
    add("--allow-normalised", action="store_true", help="values may be counts scaled per cell")
    add("--allow-low-overlap", action="store_true", help="few genes may be in the vocabulary")


def input_options(arguments: argparse.Namespace) -> InputOptions:
    """What `add_counts` asked for. Raises DataError for a table of symbols that is none."""
    from geneformer_mcore.tokenizer.gencode import load_symbols
    from geneformer_mcore.tokenizer.genes import InputOptions

    return InputOptions(
        arguments.counts_layer,
        load_symbols(arguments.symbols) if arguments.symbols else {},
        arguments.allow_normalised,
        arguments.allow_low_overlap,
    )


def add_layout(options: Options) -> None:
    """parallel.KEY=N, any number, as `layout`."""
    options.add_argument(
        "layout",
        nargs="*",
        metavar="parallel.KEY=N",
        help="parallel.tensor, parallel.pipeline, parallel.sequence (default: data parallel)",
    )
