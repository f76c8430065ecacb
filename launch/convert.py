#!/usr/bin/env python
"""Converts models: from Hugging Face and BioNeMo to a run folder, and from a run to Hugging Face.

python launch/convert.py from-hf|from-bionemo|to-hf ... --out FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from geneformer_mcore.config.sections import Activation
from geneformer_mcore.exit_codes import run

EXAMPLE = """examples:
  python launch/convert.py from-hf Geneformer/gf-6L-10M-i2048 --out runs/hf_10m \\
      --tokens token_dictionary_gc30M.pkl --medians gene_median_dictionary_gc30M.pkl
  python launch/convert.py to-hf runs/lung --out exported/lung
  python launch/convert.py from-bionemo geneformer_10m.pt --out runs/nvidia_10m \\
      --vocabulary gc30m.json

An existing --out is refused. What is written by from-... is the folder of a run that has made no
step: it loads under any layout, and pretraining goes on from it with any cells and recipe.
"""


def main() -> None:
    """Reads the arguments, converts, says what was written."""
    arguments = _parse()
    # Only now what takes seconds to import: --help and wrong arguments are answered at once.
    from geneformer_mcore.backends import ignore_known_warnings

    ignore_known_warnings()
    from geneformer_mcore.convert import convert

    if arguments.command == "from-hf":
        lines = convert.from_hf(
            arguments.folder,
            arguments.out,
            arguments.vocabulary,
            arguments.tokens,
            arguments.medians,
        )
    elif arguments.command == "from-bionemo":
        lines = convert.from_bionemo(
            arguments.state_dict,
            arguments.out,
            arguments.vocabulary,
            Activation(arguments.activation),
            arguments.heads,
        )
    else:
        lines = convert.to_hf(
            arguments.checkpoint, arguments.out, arguments.vocabulary, arguments.tokens
        )
    print("\n".join(lines))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert models from and to Hugging Face, and from BioNeMo.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _from_hf(_command(commands, "from-hf", "a BertForMaskedLM, such as Geneformer V1 and V2"))
    _from_bionemo(_command(commands, "from-bionemo", "the state dict of a BioNeMo Geneformer"))
    _to_hf(_command(commands, "to-hf", "a folder that transformers loads"))
    arguments = parser.parse_args()
    if arguments.command == "from-hf" and arguments.medians and not arguments.tokens:
        parser.error("--medians goes with --tokens")
    if arguments.command == "from-hf" and arguments.vocabulary and arguments.medians:
        parser.error("give --vocabulary, or --tokens and --medians")
    return arguments


def _command(commands: argparse._SubParsersAction, name: str, what: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=f"{name}: {what}.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _from_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=_folder, help="config.json and weights")
    parser.add_argument("--out", type=Path, required=True, help="the run folder to write")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary of ours with the model's genes")
    parser.add_argument("--tokens", type=Path, help="{name: token id}, JSON or pickle")
    parser.add_argument("--medians", type=Path, help="{gene id: median}, JSON or pickle")


def _from_bionemo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("state_dict", type=Path, help="{name: tensor}, written by torch.save")
    parser.add_argument("--out", type=Path, required=True, help="the run folder to write")
    parser.add_argument("--vocabulary", type=Path, required=True, help="the model's vocabulary")
    parser.add_argument(
        "--activation",
        choices=[each.value for each in Activation],
        default=Activation.gelu.value,
        help="default: gelu, which the published weights need",
    )
    parser.add_argument("--heads", type=int, default=0, help="default: one per 64 of the width")


def _to_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=_folder, help="the folder of a run or of one of its steps"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--vocabulary", type=Path, help="default: beside the run, or in its store")
    parser.add_argument(
        "--tokens", type=Path, help="{name: token id} to number tokens by; default: our numbers"
    )


def _folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} must be a folder, and is none")
    return path


if __name__ == "__main__":
    run(main)
