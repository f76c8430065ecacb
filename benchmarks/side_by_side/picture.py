"""Rates as horizontal bars, ours in another colour; and tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

OURS, THEIRS = "#1f6f5c", "#9aa5b1"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for what they hold; the first flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(text.rjust(w) for text, w in others)])

    return "\n".join([line(head), *map(line, rows)])


def save_bars(
    path: Path, panels: dict[str, list[tuple[str, float, bool]]], what: str, footer: str
) -> None:
    """A PNG with one panel of bars per entry: {title: [(label, rate, is ours)]}; log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    heights = [len(bars) + 1.5 for bars in panels.values()]
    figure, all_axes = pyplot.subplots(
        len(panels),
        figsize=(9, 0.32 * sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, bars) in zip(all_axes[:, 0], panels.items(), strict=True):
        ordered = sorted(bars, key=lambda bar: bar[1])
        rates = [rate for _, rate, _ in ordered]
        colours = [OURS if is_ours else THEIRS for _, _, is_ours in ordered]
        drawn = axes.barh([label for label, _, _ in ordered], rates, color=colours)
        axes.bar_label(drawn, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(min(rates) / 2, max(rates) * 3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel(what, fontsize=9)
    figure.text(0.01, -0.02, footer, fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
