"""Builds a store of tokenised cells from counts: h5ad, zarr and SOMA Experiments."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from geneformer_mcore.exit_codes import FINISHED, WRONG_INPUT, run

if TYPE_CHECKING:
    from geneformer_mcore.io.progress import ProgressLine
    from geneformer_mcore.store.split.table import SplitRule
    from geneformer_mcore.tokenizer.vocabulary import Vocabulary

EXAMPLE = """example:
  python data_prep/build_store.py --out stores/mine --vocabulary vocabulary.json a.h5ad b.h5ad

Without --vocabulary, the genes and their medians are those of the inputs: exact while all values
fit into --memory-gb, and within 0.1 % of exact beyond (see build_vocabulary.py).

Counts are looked for in layers["counts"], raw.X and X; gene ids in var's feature_id, ensembl_id,
gene_ids and index. Where there are symbols alone, they are mapped by --symbols, else by the
vocabulary's names and GENCODE's table; the variable GENEFORMER_GENCODE names another, or "off".

An input that cannot be read, or holds a value that is no count, is left out altogether: it is
reported at once, the others are stored, the manifest and the last lines on stderr name it again,
and the command exits with status 2. With --strict there is no store then.

A build that was killed resumes: start the same command again. Finished work stays in
.STORE.staging next to the store until that is complete. On a cluster, let every task of an array do
a part, and the same command without --part merge them:
  sbatch --array=0-7 --wrap 'python data_prep/build_store.py ... --part $SLURM_ARRAY_TASK_ID/8'

Exit status: 0; 2 if an input or an option is wrong, or a disk is full; 75 if a network failed, 1 if
a worker was killed or memory ran out (start it again: what is done is kept), or internal error.
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="h5ad or zarr, or path or URI of an Experiment")
    add("--out", required=True, metavar="STORE", help="the store's folder, which must not exist")
    add(
        "--vocabulary",
        metavar="FILE.json",
        help="genes and medians (import_dictionary.py makes one)",
    )
    add("--seq-length", type=int, default=2048, help="tokens per cell at most, [CLS] included")
    add("--layer", help="of the counts, raw.X, X, ms/NAME/X/LAYER (default: counts, raw.X, X)")
    add("--symbols", metavar="FILE", help="{symbol: gene id} JSON or GENCODE csv(.gz)")
    add("--validation-fraction", type=float, default=0.05, help="of the cells, at random")
    add("--test-fraction", type=float, default=0.05, help="of the cells, at random")
    add("--split", metavar="split.json", help="by data set instead (make_split.py makes one)")
    add("--workers", type=int, help="processes at most (default: one per core)")
    add(
        "--memory-gb",
        type=float,
        default=1.0,
        help="for values while the inputs' own vocabulary is made, in 10^9 bytes (default 1)",
    )
    add("--part", metavar="I/N", help="do part I of N (from 0), and no store; needs --vocabulary")
    add("--report", metavar="DIR", help="write report.json, report.md and plots (default: none)")
    add("--strict", action="store_true", help="no store unless every input can be used")
    add("--overwrite", action="store_true", help="replace a store that is there")
    add(
        "--allow-normalised",
        action="store_true",
        help="values may be counts scaled per cell (not logarithms)",
    )
    add(
        "--allow-low-overlap",
        action="store_true",
        help="take files with under 10%% of their genes in the vocabulary",
    )
    add("--allow-external", action="store_true", help="inputs may have parts in other files")
    arguments = parser.parse_args()
    if arguments.part and not arguments.vocabulary:
        parser.error("--part needs --vocabulary: the inputs' own one would take all of them")
    if arguments.part and arguments.report:
        parser.error("--report goes with the command that builds the store, not with --part")
    return arguments


def main() -> int:
    """Builds the store, or a part of it, and prints a report of each input."""
    arguments = _parse()
    from geneformer_mcore.store.ingest.staging import check_target

    check_target(arguments.out, arguments.overwrite)
    if arguments.report:
        from geneformer_mcore.report.store import check_folder

        check_folder(arguments.report)
    return _build(arguments)


def _build(arguments: argparse.Namespace) -> int:
    from geneformer_mcore.io.progress import ProgressLine
    from geneformer_mcore.store.ingest.build import build_store, tokenise_part
    from geneformer_mcore.store.ingest.plan import Part
    from geneformer_mcore.store.report import refused_lines, source_lines, summary

    started = time.monotonic()
    with ProgressLine("cells") as progress:
        settings = _settings(arguments, progress)
        if arguments.part:
            part = Part.parse(arguments.part)
            refusals = tokenise_part(arguments.inputs, arguments.out, part, **settings)
            refused = [refusal.describe() for refusal in refusals]
        else:
            manifest = build_store(arguments.inputs, arguments.out, **settings)
            refused = manifest.refused
    spent = ", ".join(f"{what} {seconds:.1f}" for what, seconds in progress.seconds.items())
    took = f"{time.monotonic() - started:.1f} s ({spent})"
    if arguments.part:
        print(f"{arguments.out}: part {arguments.part} is done, {took}")
    else:
        print("\n".join(source_lines(manifest)))
        print(f"{arguments.out}: {summary(manifest)}, {took}")
        if arguments.report:
            _write_report(arguments.report, arguments.out)
    for line in refused_lines(refused, len(arguments.inputs)):
        print(line, file=sys.stderr)
    return WRONG_INPUT if refused else FINISHED


def _settings(arguments: argparse.Namespace, progress: ProgressLine) -> dict[str, Any]:
    """Those arguments of ingest.build_store that it shares with tokenise_part."""
    from geneformer_mcore.store.split.table import RandomSplit, SplitTable
    from geneformer_mcore.tokenizer.gencode import load_symbols
    from geneformer_mcore.tokenizer.genes import InputOptions

    symbols = load_symbols(arguments.symbols) if arguments.symbols else {}
    options = InputOptions(
        arguments.layer,
        symbols,
        arguments.allow_normalised,
        arguments.allow_low_overlap,
        allow_external=arguments.allow_external,
    )
    workers = arguments.workers
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    split: SplitRule = RandomSplit(arguments.validation_fraction, arguments.test_fraction)
    if arguments.split:
        split = SplitTable.load(arguments.split)
    vocabulary = _vocabulary(arguments, options, workers, progress)
    return {
        "vocabulary": vocabulary,
        "seq_length": arguments.seq_length,
        "options": options if arguments.vocabulary else options.with_own_vocabulary(),
        "split_rule": split,
        "overwrite": arguments.overwrite,
        "progress": progress.update,
        "log": progress.print_line,
        "workers": workers,
        "strict": arguments.strict,
    }


def _vocabulary(
    arguments: argparse.Namespace, options: Any, workers: int, progress: ProgressLine
) -> Vocabulary:
    from geneformer_mcore.store.ingest.build import vocabulary_of_inputs
    from geneformer_mcore.tokenizer.genes import describe_other_ids
    from geneformer_mcore.tokenizer.vocabulary import Vocabulary

    if arguments.vocabulary:
        return Vocabulary.load(arguments.vocabulary)
    vocabulary = vocabulary_of_inputs(
        arguments.inputs,
        options,
        workers,
        arguments.strict,
        progress.update,
        arguments.memory_gb,
    )
    warning = describe_other_ids(vocabulary)
    if warning:
        progress.print_line(f"warning: {warning}")
    return vocabulary


def _write_report(folder: str, store: str) -> None:
    from geneformer_mcore.io.files import UnwritableError
    from geneformer_mcore.report.store import write_report

    try:
        write_report(store, folder)
    except UnwritableError as error:
        again = f"data_prep/check_store.py {store} --report DIR"
        raise UnwritableError(f"{error} The store is finished: {again} writes it.") from error
    print(f"report: {folder}/report.md")


if __name__ == "__main__":
    run(main, counts_layer="--layer")
