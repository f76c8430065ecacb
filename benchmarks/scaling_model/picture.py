"""cells/s against GPUs: a panel per model, a colour per GPU, the card's run as a point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.scaling_model.pages import LABELS
from benchmarks.scaling_model.speed import ESTIMATE

COLOURS = {"A100": "#1f6f5c", "H100": "#c7762b", "H200": "#4a5fa8"}
CARD = "#b3263a"
DASHES: dict[bool, Any] = {True: "-", False: (0, (4, 2))}


def save(path: Path, found: dict[str, Any]) -> None:
    """An SVG or PNG of `found` (see study), the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "scaling", "font.size": 9}):
        figure, all_axes = pyplot.subplots(
            1, 2, figsize=(9, 4.6), sharey=True, layout="constrained"
        )
        for axes, model in zip(all_axes, LABELS, strict=True):
            _lines(axes, [row for row in found["rows"] if row["model"] == model])
            _card(axes, next(each for each in found["card"] if each["model"] == model))
            _frame(axes, LABELS[model], sorted({row["gpus"] for row in found["rows"]}))
        all_axes[0].set_ylabel("cells/s, global batch 2,048")
        if any(row["cell_source"].startswith(ESTIMATE) for row in found["rows"]):
            figure.suptitle(
                "Modelled. Speeds of single GPUs: estimates, not measured",
                fontsize=10,
                x=0.01,
                ha="left",
            )
        _legend(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=130, metadata=metadata)
        pyplot.close(figure)


def _lines(axes: Any, rows: list[dict[str, Any]]) -> None:
    for gpu, colour in COLOURS.items():
        for is_packed, dashes in DASHES.items():
            here = [row for row in rows if row["gpu"] == gpu and row["packed"] == is_packed]
            axes.plot(
                [row["gpus"] for row in here],
                [row["cells_per_s"] for row in here],
                color=colour,
                linestyle=dashes,
                marker="o",
                markersize=3,
                linewidth=1.4,
            )


def _card(axes: Any, each: dict[str, Any]) -> None:
    place = (each["gpus"], each["card_cells_per_s"])
    axes.plot(*place, marker="D", markersize=6, color=CARD, linestyle="none")
    axes.annotate(
        f"card: {each['card_hours']:.1f} h",
        place,
        xytext=(-9, -3),
        textcoords="offset points",
        ha="right",
        color=CARD,
    )
    axes.annotate(
        f"A100: {each['padded']['hours']:.1f} h padded, {each['packed']['hours']:.1f} h packed",
        place,
        xytext=(4, 10),
        textcoords="offset points",
        ha="right",
        color=COLOURS["A100"],
    )


def _frame(axes: Any, title: str, gpus: list[int]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_title(f"{title} model", loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(y=0.08)
    axes.set_xticks(gpus, [str(number) for number in gpus])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="y", labelleft=True)
    axes.set_xlabel("GPUs")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=colour, label=gpu) for gpu, colour in COLOURS.items()]
    entries += [
        Line2D([], [], color="#444444", linestyle=DASHES[True], label="packed"),
        Line2D([], [], color="#444444", linestyle=DASHES[False], label="padded to 2,048"),
        Line2D([], [], color=CARD, marker="D", linestyle="none", label="model card, A100"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=6, frameon=False)
