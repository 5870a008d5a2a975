"""The plots of the report, two of which README.md and the documents show, as SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.results import Document

PEER: Final = "SharedMemory"
"""As paths.py names it."""
MiB: Final = 1 << 20
GiB: Final = 1 << 30
COLOURS: Final = ("#888888", "#c1272d", "#e69f00", "#009e73", "#0072b2", "#56b4e9", "#cc79a7")
MARKERS: Final = ("", "o", "s", "^", "D", "v", "P")
TELLING: Final = (
    "attach + detach: Region.attach(), Python",
    "attach + detach: mshare(), C",
    "Region.create() + unlink(), Python",
    "fault at a random place, median",
    "first touch (write) of",
    "second sharer's touch (write) of",
    "a further sharer's touch (write) of",
    "page tables (VmPTE) of a sharer of",
    "munmap() of 2 MiB, one sharer",
)
"""What measures begin with that everybody meets, of those beside a peer."""


def page_tables(story: Document) -> str:
    """Page tables against processes."""
    figure, axes = _figure(8, 5.8)
    size = story["plan"]["size"]
    points = story["points"]
    kinds = list(dict.fromkeys(point["kind"] for point in points))
    for place, kind in enumerate(kinds):
        ours = [point for point in points if point["kind"] == kind]
        axes.plot(
            [point["processes"] for point in ours],
            [point["tables"] / MiB for point in ours],
            label=kind,
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle="--" if place == 0 else "-",
            markersize=6,
            markerfacecolor="none",
        )
    axes.axhline(size / MiB, color="black", linewidth=0.8, linestyle=":")
    counts = sorted({point["processes"] for point in points})
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
    figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=2)
    return _svg(figure, "tables")


def _size(mebibytes: float, _: int) -> str:
    if mebibytes >= 1024:
        return f"{mebibytes / 1024:g} GiB"
    return f"{mebibytes:g} MiB"


def faults(story: Document) -> str:
    """How often the kernel is needed until a process has touched all that is there."""
    last = {point["kind"]: point for point in story["points"] if point["faults"]}
    figure, axes = _figure(8, 1 + 0.36 * len(last))
    places = range(len(last), 0, -1)
    axes.barh(places, [point["faults"] for point in last.values()], height=0.6, color="#0072b2")
    for place, point in zip(places, last.values(), strict=True):
        axes.annotate(
            f"{point['faults']:,.0f}",
            (point["faults"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(places, list(last))
    axes.set_xscale("log")
    axes.set_xlim(1, 5 * max(point["faults"] for point in last.values()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    size = story["plan"]["size"] / GiB
    axes.set_xlabel(f"minor faults of a process that touches all of {size:g} GiB that is there")
    return _svg(figure, "faults")


def telling(document: Document) -> list[dict[str, Any]]:
    """The rows of run.py that are in the plot."""
    rows = document["rows"]
    return [row for start in TELLING for row in rows if row["measure"].startswith(start)]


def peers(document: Document) -> str:
    """What things cost beside what they cost the peer, of run.py."""
    return _beside(
        [Bar(row["measure"], row["unit"], row["ours"], row["peer_value"])
         for row in telling(document)],
        "times what it takes with plain shared memory",
    )  # fmt: skip


def images(document: Document) -> str:
    """What pulling takes beside plain downloads, of images.py."""
    return _beside(
        [Bar(row["measure"], row["unit"], row["ours"], row["peer_value"])
         for row in document["rows"] if row["limit"] is None],
        "times what it takes with a download",
    )  # fmt: skip


def paths(document: Document) -> str:
    """What a process waits for, of paths.py."""
    bars = [
        Bar(row["measure"], row["unit"], row["medians"]["ours"], row["medians"][PEER])
        for row in document["rows"]
        if PEER in row["medians"]
    ]
    return _beside(bars, f"times what it takes with multiprocessing's {PEER}")


class Bar(NamedTuple):
    """A measure, and medians in `unit`."""

    measure: str
    unit: str
    ours: float
    peer: float


def _beside(bars: Sequence[Bar], label: str) -> str:
    figure, axes = _figure(8, 0.9 + 0.42 * len(bars))
    places = range(len(bars), 0, -1)
    ratios = [bar.ours / bar.peer for bar in bars]
    # From 1: what is better goes to the left.
    axes.barh(
        places,
        [ratio - 1 for ratio in ratios],
        left=1,
        height=0.6,
        color=["#009e73" if ratio <= 1 else "#e69f00" for ratio in ratios],
    )
    for place, ratio in zip(places, ratios, strict=True):
        axes.annotate(
            f"{ratio:.2g}",
            (ratio, place),
            xytext=(-4 if ratio <= 1 else 4, 0),
            textcoords="offset points",
            va="center",
            ha="right" if ratio <= 1 else "left",
            fontsize=9,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *ratios) / 3, max(2, *ratios) * 3)
    axes.set_yticks(
        places,
        [f"{bar.measure}\n{bar.ours:,.3g} : {bar.peer:,.3g} {bar.unit}" for bar in bars],
        fontsize=9,
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    return _svg(figure, label)


def load(parts: Sequence[Document]) -> str:
    """What the machine did while each part ran."""
    figure, axes = _figure(8, 2.6)
    # Parts follow each other; what lies between them is not shown.
    start = 0.0
    for place, part in enumerate(parts):
        looks = part["load"]
        at = [start + look["seconds"] for look in looks]
        colour = COLOURS[1 + place % (len(COLOURS) - 1)]
        axes.plot(at, [look["average"] for look in looks], color=colour, label=part["part"])
        processors = part["processors"]
        busy = [look["busy"] * processors for look in looks]
        axes.plot(at, busy, color=colour, linestyle=":", linewidth=1)
        start += part["seconds"]
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("load average; busy\nprocessors (dotted)")
    axes.legend(fontsize=9, frameon=False)
    return _svg(figure, "load")


def inline(svg: str) -> str:
    """As an element of HTML, where ids that nothing refers to would be there twice."""
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r"""#([\w-]+)""", svg))
    return re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    # Text is text.
    mpl.rcParams.update({"svg.fonttype": "none", "font.size": 10})
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    # The same picture for the same numbers; ids of plots in one page differ.
    mpl.rcParams["svg.hashsalt"] = name
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", text.getvalue(), flags=re.MULTILINE)
