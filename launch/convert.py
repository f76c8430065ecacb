#!/usr/bin/env python
"""Convert models from and to Hugging Face, and from BioNeMo.

python launch/convert.py from-hf|from-bionemo|to-hf ... --out FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from geneformer_mcore.backends import ignore_known_warnings
from geneformer_mcore.config.sections import Activation
from geneformer_mcore.exit_codes import run
from geneformer_mcore.inference import options

EXAMPLE = """examples:
  python launch/convert.py from-hf Geneformer/gf-6L-10M-i2048 --out runs/hf_10m \\
      --tokens token_dictionary_gc30M.pkl --medians gene_median_dictionary_gc30M.pkl
  python launch/convert.py to-hf runs/lung --out exported/lung
  python launch/convert.py from-bionemo geneformer_10m.pt --out runs/nvidia_10m \\
      --vocabulary gc30m.json

An existing --out is refused. from-... writes the folder of a run at step 0: it loads under any
layout, and pretraining continues from it with any cells and recipe.
"""


def main() -> None:
    """Convert, and print what was written."""
    arguments = _parse()
    ignore_known_warnings()
    from geneformer_mcore.convert import convert

    a = arguments
    if a.command == "from-hf":
        lines = convert.from_hf(a.folder, a.out, a.vocabulary, a.tokens, a.medians)
    elif a.command == "from-bionemo":
        activation = Activation(a.activation)
        lines = convert.from_bionemo(a.state_dict, a.out, a.vocabulary, activation, a.heads)
    else:
        lines = convert.to_hf(a.checkpoint, a.out, a.vocabulary, a.tokens)
    print("\n".join(lines))


def _parse() -> argparse.Namespace:
    parser = options.parser(__doc__, EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what, add_options in (
        ("from-hf", "a BertForMaskedLM, such as Geneformer V1 and V2", _from_hf),
        ("from-bionemo", "the state dict of a BioNeMo Geneformer", _from_bionemo),
        ("to-hf", "a folder that transformers loads", _to_hf),
    ):
        command = commands.add_parser(name, help=what, description=f"{name}: {what}.")
        command.epilog, command.formatter_class = parser.epilog, parser.formatter_class
        add_options(command)
    arguments = parser.parse_args()
    if arguments.command == "from-hf" and arguments.medians and not arguments.tokens:
        parser.error("--medians goes with --tokens")
    if arguments.command == "from-hf" and arguments.vocabulary and arguments.medians:
        parser.error("give --vocabulary, or --tokens and --medians")
    return arguments


def _from_hf(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=_folder, help="config.json and weights")
    add("--out", type=Path, required=True, help="the run folder to write")
    add("--vocabulary", type=Path, help="vocabulary of ours with the model's genes")
    add("--tokens", type=Path, help="{name: token id}, JSON or pickle")
    add("--medians", type=Path, help="{gene id: median}, JSON or pickle")


def _from_bionemo(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, [each.value for each in Activation]
    about = "default: gelu, which the published weights need"
    add("state_dict", type=Path, help="{name: tensor}, written by torch.save")
    add("--out", type=Path, required=True, help="the run folder to write")
    add("--vocabulary", type=Path, required=True, help="the model's vocabulary")
    add("--activation", choices=names, default=Activation.gelu.value, help=about)
    add("--heads", type=int, default=0, help="default: one per 64 of the width")


def _to_hf(parser: argparse.ArgumentParser) -> None:
    add, about = parser.add_argument, "{name: token id} to number tokens by; default: our numbers"
    add("checkpoint", type=_folder, help="the folder of a run or of one of its steps")
    add("--out", type=Path, required=True, help="the folder to write")
    add("--vocabulary", type=Path, help="default: next to the run, or in its store")
    add("--tokens", type=Path, help=about)


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} must be a folder, and is none")
    return path


if __name__ == "__main__":
    run(main)
