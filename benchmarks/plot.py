"""The plot of story.py: page tables against processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

MiB: Final = 1 << 20
GiB: Final = 1 << 30
COLOURS: Final = ("#888888", "#c1272d", "#e69f00", "#009e73", "#0072b2", "#56b4e9")
MARKERS: Final = ("", "o", "s", "^", "D", "v")


def draw(points: Sequence[tuple[str, int, int]], size: int, target: Path) -> None:
    """Draw (kind, processes, bytes of page tables) into `target`, SVG or PNG by its name.

    `size`: of the memory that they share, in bytes.
    """
    # The same picture for the same numbers, and text that is text.
    mpl.rcParams.update({"svg.hashsalt": "msharefs", "svg.fonttype": "none", "font.size": 10})
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(kind for kind, _, _ in points))
    for place, kind in enumerate(kinds):
        x = [processes for each, processes, _ in points if each == kind]
        y = [tables / MiB for each, _, tables in points if each == kind]
        axes.plot(
            x,
            y,
            label=kind,
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle="--" if place == 0 else "-",
            markersize=6,
            markerfacecolor="none",
        )
    axes.axhline(size / MiB, color="black", linewidth=0.8, linestyle=":")
    counts = sorted({processes for _, processes, _ in points})
    axes.annotate(
        "the memory that they share",
        (counts[0], size / MiB),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_yscale("log", base=4)
    axes.set_xticks(counts)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_size))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("processes that have touched all of the memory")
    axes.set_ylabel("growth of PageTables in /proc/meminfo")
    axes.set_title(f"Page tables of processes that share {size / GiB:g} GiB")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=150)


def _size(mebibytes: float, _: int) -> str:
    if mebibytes >= 1024:
        return f"{mebibytes / 1024:g} GiB"
    return f"{mebibytes:g} MiB"
