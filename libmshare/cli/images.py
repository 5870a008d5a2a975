"""`mshare push`, `mshare pull`, `mshare create --from`.

What is done is done in a child (ask.followed), which tells how it goes: on a terminal that is a
bar, and else a line of JSON now and then, with the result in the last one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from libmshare.cli import output, regions
from libmshare.cli.ask import followed
from libmshare.cli.errors import CommandError, DaemonGoneError
from libmshare.cli.output import printable, printable_line
from libmshare.errors import DAEMON_GONE, GONE

Tell = Callable[[tuple[int, int]], None]
Result = dict[str, Any]

_TOLD_EVERY: Final = 1.0
"""Between two lines of JSON, in seconds."""


def push(name: bytes, url: str, *, unsynchronized: bool, abi: str) -> None:
    """Write an image of the region.  Raises CommandError."""
    regions.check_name(name)
    call = partial(_push, name, url, unsynchronized=unsynchronized, abi=abi)
    done = _follow(f"pushing {printable(name)}", call)
    if output.on_terminal():
        sizes = f"{output.size(done['size'])}, {output.size(done['sent'])} of it sent"
        output.write(f"{sizes}: {done['digest']}")
    else:
        output.write_line_of_json(done)


def pull(
    url: str,
    name: bytes | None,
    mode: int,
    backing: str | None,
    digest: str | None,
    abi: str | None,
    *,
    wait: bool,
) -> None:
    """Make the region of an image.  Raises CommandError."""
    if name is not None:
        regions.check_name(name)
    call = partial(_pull, url, name, mode, backing, digest, abi, wait=wait)
    _tell_region(_follow("pulling", call))


def load(
    name: bytes, url: str, start: int | None, size: int | None, mode: int, backing: str | None
) -> None:
    """Make a region of an object's bytes.  Raises CommandError."""
    regions.check_name(name)
    _tell_region(_follow("loading", partial(_load, name, url, start, size, mode, backing)))


def _tell_region(done: Result) -> None:
    if output.on_terminal():
        where = f"{output.size(done['size'])} at {output.address(done['start'])}"
        output.write(f"{printable(done['name'])}: {where}")
    else:
        output.write_line_of_json(done)


# -- in the child --


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What is raised there, as one line."""
    try:
        yield
    except ValueError as error:
        raise CommandError(printable_line(str(error))) from None
    except OSError as error:
        if error.errno in GONE:
            raise DaemonGoneError(DAEMON_GONE) from None
        about = f"{printable(error.filename)}: " if error.filename else ""
        why = error.strerror or os.strerror(error.errno or 0)
        raise CommandError(f"{about}{printable_line(why)}") from None


def _push(name: bytes, url: str, tell: Tell, *, unsynchronized: bool, abi: str) -> Result:
    from libmshare.region import Region  # noqa: PLC0415 - in the child

    with _explained():
        regions.root()
        with Region.attach(os.fsdecode(name), readonly=True) as region:
            pushed = region.push(
                url,
                unsynchronized=unsynchronized,
                abi=abi,
                progress=lambda done, of: tell((done, of)),
            )
    return pushed._asdict()


def _pull(
    url: str,
    name: bytes | None,
    mode: int,
    backing: str | None,
    digest: str | None,
    abi: str | None,
    tell: Tell,
    *,
    wait: bool,
) -> Result:
    from libmshare.region import Region  # noqa: PLC0415 - in the child

    with _explained():
        regions.root()
        region = Region.pull(
            url,
            None if name is None else os.fsdecode(name),
            backing=backing,
            digest=digest,
            abi=abi,
            mode=mode,
            wait=wait,
            progress=(lambda done, of: tell((done, of))) if wait else None,
        )
        with region:
            return {"name": region.name, "start": region.start, "size": region.size}


def _load(
    name: bytes,
    url: str,
    start: int | None,
    size: int | None,
    mode: int,
    backing: str | None,
    tell: Tell,
) -> Result:
    from libmshare.images.load import load as load_  # noqa: PLC0415 - in the child

    with _explained():
        regions.root()
        region = load_(
            os.fsdecode(name),
            url,
            start=start,
            size=size,
            backing=backing,
            mode=mode,
            progress=lambda done, of: tell((done, of)),
        )
        with region:
            return {"name": region.name, "start": region.start, "size": region.size}


# -- how it goes --


def _follow(what: str, call: Callable[[Tell], Result]) -> Result:
    if output.on_terminal():
        return _with_bar(what, call)
    last = time.monotonic()

    def heard(progress: tuple[int, int]) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= _TOLD_EVERY:
            last = now
            output.write_line_of_json({"done": progress[0], "of": progress[1]})

    return followed(call, heard)


def _with_bar(what: str, call: Callable[[Tell], Result]) -> Result:
    from rich.progress import (  # noqa: PLC0415 - a pipe does not pay for it
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)
    with Progress(*columns, TransferSpeedColumn(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        return followed(call, lambda told: bar.update(task, completed=told[0], total=told[1]))
