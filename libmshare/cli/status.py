"""`mshare status`: which daemon serves the mount, and how."""

from __future__ import annotations

import os
from typing import Any, Final

from libmshare.cli import output, regions
from libmshare.cli.ask import bounded
from libmshare.cli.listing import user
from libmshare.cli.output import Column, printable, printable_line
from msharefsd.telemetry.figures import amount, duration, plural

_FLAGS: Final = {"yes": True, "no": False, "-": None}


def status(timeout: float, *, json: bool) -> None:
    """Tell it.  Raises CommandError."""
    root, told = bounded(lambda: (regions.root(), regions.daemon()), timeout)
    if json:
        output.write_json(record(told))
        return
    count = {key: int(told.get(key, 0)) for key in ("uid", "regions", "sharers", "memory")}
    output.write(
        f"msharefsd {told.get('version', '-')}, process {told.get('pid', '-')} of "
        f"{user(count['uid'])}, Linux {told.get('kernel', '-')}"
    )
    output.write(f"since {told.get('since', '-')}, for {duration(float(told.get('uptime', 0)))}")
    output.write(
        f"{printable(root)}: {plural(count['regions'], 'region')}, "
        f"{plural(count['sharers'], 'sharer')}, {amount(count['memory'])} of memory"
    )
    for title, rows in _tables(told):
        output.write("")
        heads = [Column(title), Column("")] if len(rows[0]) == 2 else _PAGERS
        output.write_table(heads, [list(map(printable_line, row)) for row in rows])


_PAGERS: Final = (
    Column("PAGER OF"),
    Column("PID", right=True),
    Column("STATE"),
    Column("SILENT", right=True),
)


def _tables(told: dict[str, str]) -> list[tuple[str, list[list[str]]]]:
    """Title and rows of each; what there is none of is left out."""
    grouped: dict[str, list[list[str]]] = {}
    for key, value in told.items():
        group, dot, name = key.partition(".")
        if dot:
            grouped.setdefault(group, []).append([name, value])
    pagers = [
        [user(int(uid)), pid, state, f"{silent} s"]
        for uid, (pid, state, silent) in _pagers(grouped.pop("pager", []))
    ]
    tables = [(group.upper(), rows) for group, rows in grouped.items()]
    return tables + ([("PAGER", pagers)] if pagers else [])


def _pagers(rows: list[list[str]]) -> list[tuple[str, tuple[str, str, str]]]:
    found = []
    for uid, value in rows:
        words = value.split()
        if uid.isdecimal() and len(words) == 3:
            found.append((uid, (words[0], words[1], words[2])))
    return found


def record(told: dict[str, str]) -> dict[str, Any]:
    """For JSON: a table of each kind of line, numbers as numbers."""
    found: dict[str, Any] = {
        key: _value(value) if key not in {"version", "kernel"} else value
        for key, value in told.items()
        if "." not in key
    }
    for group in ("setting", "limit", "feature"):
        found[f"{group}s"] = {}
    pagers = []
    for key, value in told.items():
        group, dot, name = key.partition(".")
        if group == "pager":
            pagers.append([name, value])
        elif dot:
            place = found.setdefault(f"{group}s", {})
            *path, last = name.split(".")
            for step in path:
                place = place.setdefault(step, {})
            place[last] = _value(value)
    found["pagers"] = [
        {"uid": int(uid), "pid": int(pid), "state": state, "silent": float(silent)}
        for uid, (pid, state, silent) in _pagers(pagers)
    ]
    return found


def _value(text: str) -> Any:
    if text in _FLAGS:
        return _FLAGS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return os.fsdecode(regions.unescaped(text))
