"""The results of benchmarks/cell_types.py as tables: for the console, and for the pages."""

from __future__ import annotations

from typing import Any

from benchmarks.side_by_side.page_text import NOT_MEASURED, Measurement, origin, row_of

HEAD = [
    *("cells", "scheme", "features", "classifier", "macro F1 (95 %)", "accuracy (95 %)"),
    "F1 over PCA + forest",
]


def lines(content: Measurement) -> list[str]:
    """For the console: every method of every set, and the card's figures."""
    told = [row_of(HEAD), row_of(["---"] * len(HEAD)), *map(row_of, rows(content))]
    told += ["", *(sentence(each) for each in content["sets"]), "", *nvidia(content)]
    return told


def rows(content: Measurement | None) -> list[list[str]]:
    """One per method, scheme and set; what is not measured says so."""
    if not content:
        return [[NOT_MEASURED, *("" for _ in HEAD[1:])]]
    return [
        _row(each, scheme, row)
        for each in content["sets"]
        for scheme in each["schemes"]
        for row in scheme["rows"]
    ]


def below(content: Measurement) -> list[str]:
    """What stands under the table: the pretraining, the card's figures, and where all is from."""
    told = [*(sentence(each) for each in content["sets"]), *nvidia(content)]
    return [f"<sub>{line}</sub>" for line in [*told, origin(content, with_machine=True)]]


def _row(each: dict[str, Any], scheme: dict[str, Any], row: dict[str, Any]) -> list[str]:
    best = max(other["macro_f1"]["value"] for other in scheme["rows"])
    value = row["macro_f1"]["value"]
    score = _score(row["macro_f1"])
    return [
        f"{each['input'].removesuffix('.h5ad')}, {scheme['cells']:,} cells",
        f"{scheme['name']}, {len(scheme['labels'])} labels",
        row["features"],
        row["classifier"],
        f"**{score}**" if value == best else score,
        _score(row["accuracy"]),
        "-" if row is scheme["rows"][0] else _score(row["macro_f1_over_baseline"], "+.3f"),
    ]


def _score(interval: dict[str, float], form: str = ".3f") -> str:
    text = format(interval["value"], form)
    if "low" not in interval:
        return text
    return f"{text} ({interval['low']:{form}} to {interval['high']:{form}})"


def sentence(each: dict[str, Any]) -> str:
    """What the model of a set was trained on, and for how long."""
    run = each["pretraining"]
    left_out = "".join(
        f", not on {name} ({cells:,} of the cells)"
        for name, cells in each["not_trained_on"].items()
    )
    minutes = "" if run["wall_s"] is None else f", {run['wall_s'] / 60:.0f} minutes"
    loss = "" if run["val_loss"] is None else f", validation loss {run['val_loss']:.2f}"
    return (
        f"{each['input']}: {run['num_layers']} layers x {run['hidden_size']}, "
        f"{run['seq_length']:,} tokens, {run['steps']:,} steps of {run['cells_per_step']} cells"
        f"{minutes}{loss}; pretrained on {', '.join(each['trained_on'])}{left_out}."
    )


def nvidia(content: Measurement) -> list[str]:
    """The card's figures, for reference."""
    card = content["nvidia"]
    figures = "; ".join(
        f"{row['features']} {row['macro_f1']:.3f} / {row['accuracy']:.3f}" for row in card["rows"]
    )
    return [
        f"For reference, the card's macro F1 / accuracy (random forest) on other cells, "
        f"{card['data']}: {figures}."
    ]
