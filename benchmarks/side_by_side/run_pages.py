"""The rows that tell of a training run, by what launch/report.py --json wrote of it."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.side_by_side.page_text import Measurement, nats, number, share


def _model(run: Measurement) -> str:
    model, settings = run["settings"]["model"], run["settings"]
    return (
        f"{model['num_layers']} layers x {model['hidden_size']}, "
        f"{settings['seq_length']:,} tokens, {settings['train']['precision']}"
    )


def _steps(run: Measurement) -> str:
    batch = run["settings"]["train"]["global_batch_size"]
    return f"{run['logged_step']:,} of {batch:,} cells"


def _baseline(run: Measurement, name: str) -> str:
    return nats((run["baselines"] or {}).get(name))


def _both_tflops(run: Measurement) -> str:
    kinds = (run["tflops_padded_equivalent"], run["tflops_executed"])
    return " / ".join(number(kind, ".3g") for kind in kinds)


def _wall(run: Measurement) -> str:
    return f"{number(run['wall_s'], ',.0f')} s"


RUN_ROWS: list[tuple[str, Callable[[Measurement], str]]] = [
    ("model", _model),
    ("steps", _steps),
    ("training loss, nats per masked gene", lambda run: nats(run["train_loss"])),
    ("**validation loss**", lambda run: f"**{nats(run['val_loss'])}**"),
    ("control: genes of each cell shuffled", lambda run: nats(run["val_loss_shuffled_genes"])),
    ("baseline: unigram", lambda run: _baseline(run, "unigram")),
    ("baseline: gene given rank", lambda run: _baseline(run, "gene_given_rank")),
    ("cells/s", lambda run: number(run["cells_per_s"], ",.1f")),
    ("tokens/s, padding not counted", lambda run: number(run["tokens_per_s"], ",.0f")),
    ("TFLOPS per rank, padded-equivalent / executed", _both_tflops),
    ("MFU, executed / measured peak", lambda run: share(run["mfu"])),
    ("share of time waiting for data", lambda run: share(run["data_wait_fraction"])),
    ("wall time", _wall),
]
"""(label, its text) of every row."""
