"""Everything that is measured beside peers, in one page: `make bench`.

    make bench
    make bench BENCH=--quick
    .venv/bin/python benchmarks/report.py --quick --only story --processes 10 20 50 --record
    .venv/bin/python benchmarks/report.py --from docs/measured --record

Runs run.py (peers), paths.py, images.py, collapsing.py and story.py one after the other.
Each prints its tables and writes its JSON; then all of it goes into one HTML file beside that,
which needs nothing else: tables, plots, the machine, the load while it ran.  What README.md and
the documents show is what is in docs/measured: --record puts it there, and draws their plots.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Final

# Behind what is installed: libmshare and msharefsd are the wheel's, not the source's.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import collapsing, images, paths, plot, results, run, story
from benchmarks.table import Table

BENCHMARKS: Final = Path(__file__).resolve().parent
DOCS: Final = BENCHMARKS.parent / "docs"
MEASURED: Final = "measured"
SCRIPTS: Final = {
    "peers": "run.py", "paths": "paths.py", "images": "images.py",
    "collapsing": "collapsing.py", "story": "story.py",
}  # fmt: skip
ROOTS: Final = frozenset({"paths", "collapsing"})
TABLES: Final[dict[str, Callable[[results.Document], list[Table]]]] = {
    "peers": run.tables,
    "paths": paths.tables,
    "images": images.tables,
    "collapsing": collapsing.tables,
    "story": story.tables,
}
PLOTS: Final[dict[str, tuple[Callable[[results.Document], str], ...]]] = {
    "peers": (plot.peers,),
    "paths": (plot.paths,),
    "images": (plot.images,),
    "collapsing": (),
    "story": (plot.page_tables, plot.faults),
}
SHOWN: Final = {"pagetables.svg": plot.page_tables, "faults.svg": plot.faults}
"""The plots that documents show, by where they are in docs/; counts, of the story."""
FACTS: Final = (
    "time", "seconds", "msharefs", "python", "libraries", "kernel", "machine", "processor",
    "processors", "memory", "transparent_huge_pages", "shmem_huge_pages",
)  # fmt: skip
STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 14px }
caption { text-align: left; white-space: pre-line; padding: .5em 0 }
th, td { padding: .15em .8em; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 }
.word { text-align: left }
div { overflow-x: auto }
svg { max-width: 100%; height: auto }
"""


def read(directory: Path) -> dict[str, results.Document]:
    """The parts whose JSON is there, as docs/measured has it, in their order."""
    return {
        part: json.loads(file.read_text())
        for part in SCRIPTS
        if (file := directory / f"{part}.json").exists()
    }


def printed(parts: dict[str, results.Document]) -> str:
    """All tables, as text."""
    return "\n\n".join(
        str(table) for part, document in parts.items() for table in TABLES[part](document)
    )


def plots(parts: dict[str, results.Document]) -> Iterator[tuple[str, str]]:
    """What the documents show: names of files in docs/, and what is in them."""
    if "story" in parts:
        for name, draw in SHOWN.items():
            yield name, draw(parts["story"])


def page(parts: dict[str, results.Document]) -> str:
    """The report, as HTML."""
    body = []
    for part, document in parts.items():
        body.append(f"<h2>{escape(part)}</h2>")
        body += [plot.inline(draw(document)) for draw in PLOTS[part]]
        body += [_table(table) for table in TABLES[part](document)]
    documents = list(parts.values())
    body += ["<h2>machine</h2>", _table(_facts(documents))]
    body += ["<h2>load</h2>", plot.inline(plot.load(documents))]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>msharefs: benchmarks</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        "<h1>msharefs: benchmarks</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _facts(documents: Sequence[results.Document]) -> Table:
    """The parts may have been measured at different times."""
    rows = [[fact, *(_words(each[fact]) for each in documents)] for fact in FACTS]
    rows.append(["plan", *(_words(each["plan"]) for each in documents)])
    return Table("", ["", *(each["part"] for each in documents)], rows, range(1 + len(documents)))


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_words, value))
    return str(value)


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=word' if place in table.words else ''}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(cells)
        )

    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    rows = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    head = f"<thead><tr>{line(table.head, 'th')}</tr></thead>"
    return f"<div><table>{caption}{head}\n<tbody>\n{rows}\n</tbody></table></div>"


def _run(part: str, words: Sequence[str], directory: Path) -> results.Document | None:
    """Run a script; what it found, or None if it failed, and has said why."""
    before = set(_written(part, directory))
    command = [sys.executable, str(BENCHMARKS / SCRIPTS[part]), *words, f"--results={directory}"]
    with subprocess.Popen(command) as process:
        try:
            process.wait()
        finally:
            # It takes down what it has set up.
            process.terminate()
    written = set(_written(part, directory)) - before
    if process.returncode != 0 or not written:
        return None
    document: results.Document = json.loads(written.pop().read_text())
    return document


def _written(part: str, directory: Path) -> Iterator[Path]:
    return directory.glob(f"*-{part}.json")


def _measure(arguments: argparse.Namespace) -> dict[str, results.Document]:
    words = [f"--{size}" for size in ("quick", "smoke") if getattr(arguments, size)]
    parts = {}
    for part in arguments.only:
        if part in ROOTS and os.geteuid() != 0:
            print(f"{part}: left out: takes root", file=sys.stderr)
            continue
        more = []
        if part == "story" and arguments.processes is not None:
            more = ["--processes", *map(str, arguments.processes)]
        document = _run(part, [*words, *more], arguments.results)
        if document is not None:
            parts[part] = document
    return parts


def record(parts: dict[str, results.Document], docs: Path) -> None:
    """Put them beside what was measured before, and draw the documents' plots."""
    measured = docs / MEASURED
    measured.mkdir(parents=True, exist_ok=True)
    for part, document in parts.items():
        (measured / f"{part}.json").write_text(json.dumps(document, indent=1) + "\n")
    for name, drawn in plots(read(measured)):
        (docs / name).write_text(drawn)
        print(docs / name)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer rounds, less memory")
    size.add_argument("--smoke", action="store_true", help="to see that everything runs")
    size.add_argument("--from", type=Path, metavar="DIRECTORY", dest="source",
                      help="measure nothing: a report of what is there")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS),
                        help="these parts")  # fmt: skip
    parser.add_argument("--processes", type=int, nargs="+", help="so many in the story")
    parser.add_argument("--record", action="store_true",
                        help="into docs/measured, and draw the documents' plots")  # fmt: skip
    parser.add_argument("--docs", type=Path, default=DOCS,
                        help="the directory that has measured/, and the plots")  # fmt: skip
    parser.add_argument("--results", type=Path, default=results.RESULTS,
                        help="directory for the report and the JSON")  # fmt: skip
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if arguments.source is not None:
        parts = {part: each for part, each in read(arguments.source).items()
                 if part in arguments.only}  # fmt: skip
        print(printed(parts))
    else:
        parts = _measure(arguments)
    if not parts:
        sys.exit("report: nothing was measured")
    if arguments.record:
        record(parts, arguments.docs)
    arguments.results.mkdir(parents=True, exist_ok=True)
    target = arguments.results / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.html"
    target.write_text(page(parts))
    print(target)
    if arguments.source is None and len(parts) < len(arguments.only) and os.geteuid() == 0:
        sys.exit("report: not everything was measured")


if __name__ == "__main__":
    main()
