"""What `mshare collapse` works by: its options, and the file that a service has."""

from __future__ import annotations

import fnmatch
import functools
import os
import re
from pathlib import Path
from typing import Annotated, Final

import msgspec

from libmshare.cli import listing
from libmshare.cli.errors import CommandError
from libmshare.cli.exits import Exit
from libmshare.cli.output import printable, printable_line
from msharefsd.config import ConfigError, parse_size
from msharetables.pace import moderate
from msharetables.proc import Status
from msharetables.survey import Object, unit
from msharetables.watch import Limits

AUTO: Final = "auto"
_PART: Final = re.compile(r"(\d{1,3}(?:\.\d+)?)%")


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """By their names in the file.  Sizes are text, "64M"; parts are "50%"."""

    users: list[str] = []
    """Whose processes: names or numbers, with * and ?; none: everybody's."""
    units: list[str] = []
    """In which units or containers: as `mshare ptes --by unit` has them, with * and ?."""
    names: list[str] = []
    """Which objects: as `mshare ptes` has them, with * and ?."""
    min_size: str = "64M"
    min_filled: str = "50%"
    min_sharers: Annotated[int, msgspec.Meta(ge=1)] = 2
    budget: str = AUTO
    """Of one processor."""
    interval: Annotated[float, msgspec.Meta(ge=0.05, le=86400)] = 1.0
    metrics: str = ""
    """A file to write figures to, for Prometheus's node exporter."""

    def limits(self) -> Limits:
        """What is worth it.  Raises CommandError."""
        return Limits(size(self.min_size), part(self.min_filled), self.min_sharers)

    def share(self) -> float:
        """Of one processor.  Raises CommandError."""
        share = moderate() if self.budget == AUTO else part(self.budget)
        if not share:
            raise CommandError("a budget of 0% does nothing: write 1% to 100%, or auto", Exit.USAGE)
        return share

    def of(self, status: Status, cgroup: str) -> bool:
        """Whether a process is one of those that are meant."""
        if self.users and not any(
            fnmatch.fnmatchcase(name, pattern)
            for pattern in self.users
            for name in (listing.user(status.uid), str(status.uid))
        ):
            return False
        return not self.units or any(_is_in(cgroup, pattern) for pattern in self.units)

    def means(self, each: Object) -> bool:
        """Whether an object is one of those that are meant."""
        label = printable_line(each.label)
        return not self.names or any(fnmatch.fnmatchcase(label, name) for name in self.names)


@functools.lru_cache(maxsize=1024)
def _is_in(cgroup: str, pattern: str) -> bool:
    names = [unit(cgroup), *cgroup.split("/")]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def load(path: str | None, options: dict[str, object]) -> Settings:
    """The file's settings, those of the command line over them.  Raises CommandError."""
    given = {key: value for key, value in options.items() if value is not None}
    settings: dict[str, object] = {}
    try:
        if path is not None:
            settings = msgspec.toml.decode(Path(path).read_bytes(), type=dict[str, object])
        made = msgspec.convert({**settings, **given}, Settings)
        made.limits(), made.share()
    except OSError as error:
        raise CommandError(f"cannot read {printable(path or '')}: {error.strerror}") from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        where = printable(path) if path else "options"
        raise CommandError(f"{where}: {error}", Exit.USAGE) from None
    return made


def size(text: str) -> int:
    """Bytes.  Raises CommandError."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise CommandError(str(error), Exit.USAGE) from None


def part(text: str) -> float:
    """A part of one from "50%".  Raises CommandError."""
    match = _PART.fullmatch(text.strip())
    if match is None or float(match[1]) > 100:
        raise CommandError(f"{printable(text)}: write 0% to 100%", Exit.USAGE)
    return float(match[1]) / 100


def write_metrics(
    path: str, figures: dict[str, tuple[str, str, float]], chunks: dict[str, int]
) -> None:
    """Figures in the text format of Prometheus, in one step.  Raises OSError.

    `figures`: name → (help, type, value).
    """
    lines = []
    for name, (text, kind, value) in figures.items():
        lines += [
            f"# HELP mshare_collapse_{name} {text}",
            f"# TYPE mshare_collapse_{name} {kind}",
            f"mshare_collapse_{name} {value:g}",
        ]
    name = "mshare_collapse_chunks_total"
    lines += [f"# HELP {name} Chunks of 2 MiB, by what came of them", f"# TYPE {name} counter"]
    lines += [f'{name}{{outcome="{outcome}"}} {count}' for outcome, count in sorted(chunks.items())]
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    os.replace(temporary, path)
