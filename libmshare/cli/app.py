"""The command line of `mshare`: its words and options.

What each subcommand does is in a module of its own, imported when it is asked for.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from typing import Annotated, Any, Final

import typer

from libmshare.cli.errors import CommandError
from libmshare.cli.exits import Exit
from libmshare.cli.output import printable, printable_line
from libmshare.cli.views import For, Order, Sort, View
from libmshare.extras import cure

app = typer.Typer(
    name="mshare",
    help="Memory regions that many processes map at one address: list, create, remove, watch them.",
    epilog="See mshare(1).",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: errors on one line, and help that starts at once
    pretty_exceptions_enable=False,
)

DEFAULT_TIMEOUT: Final = 10.0
_LARGEST: Final = (1 << 64) - 1
_UsageError: Final[Any] = typer.BadParameter.__base__
"""typer has no public name for it."""


class Backing(StrEnum):
    """What can hold a region's pages."""

    SHM = "shm"
    HUGETLB = "hugetlb"


def _bytes(text: str) -> int:
    """A size or an address: 512G, 4096, 0x20000000000."""
    from msharefsd.config import ConfigError, parse_size

    try:
        value = int(text, 16) if text.lower().startswith("0x") else parse_size(text)
    except (ConfigError, ValueError):
        value = _LARGEST + 1
    if value > _LARGEST:
        raise typer.BadParameter(f"{printable(text)}: write 4096, 64M, 512G or 0x20000000000")
    return value


def _mode(text: str) -> int:
    """A file mode, octal."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        text = f"{printable(text)}: write an octal mode, 0600 or 0640"
        raise typer.BadParameter(text, param_hint="--mode")
    return mode


def _complete(incomplete: str) -> list[str]:
    """Names of regions, for the shell; none if the daemon is slow."""
    from libmshare.cli import regions
    from libmshare.cli.ask import bounded

    try:
        found = bounded(regions.names, 1.0)
    except CommandError:
        return []
    names = map(os.fsdecode, found)
    return [name for name in names if name.startswith(incomplete) and name.isprintable()]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mshare {version('msharefs')}")
        raise typer.Exit


Name = Annotated[
    str, typer.Argument(metavar="NAME", help="the region's name", autocompletion=_complete)
]
Url = Annotated[
    str, typer.Argument(metavar="URL", help="of the image: s3://bucket/name.img, file:///…")
]
Pids = Annotated[
    list[int] | None,
    typer.Option(metavar="PID", min=1, help="this process and its descendants; may be repeated"),
]
Json = Annotated[bool, typer.Option("--json", help="JSON, with sizes and addresses in bytes")]


@app.callback()
def options(
    ctx: typer.Context,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="DIRECTORY",
            help="where msharefs is mounted, instead of MSHARE_ROOT or what is found",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.1, max=86400, help="how long to wait for the daemon's answer"
        ),
    ] = DEFAULT_TIMEOUT,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="show it and exit"),
    ] = False,
) -> None:
    """Options of all commands."""
    del version
    if root is not None:
        # For libmshare, and for what `run` becomes, which may have another directory.
        os.environ["MSHARE_ROOT"] = os.path.abspath(root)
    ctx.obj = timeout


@app.command()
def ls(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="only these; * and ? are wildcards",
            autocompletion=_complete,
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    sort: Annotated[Order, typer.Option(help="what comes first")] = Order.NAME,
    reverse: Annotated[bool, typer.Option("--reverse", help="the other way round")] = False,
    user: Annotated[
        str | None, typer.Option(metavar="USER", help="only this user's, by name or number")
    ] = None,
    all_: Annotated[
        bool,
        typer.Option("--all", help="also removed ones that are still in use, and by whom"),
    ] = False,
) -> None:
    """List the regions."""
    from libmshare.cli import listing

    choice = listing.Choice(names or (), user, sort, reverse)
    listing.ls(ctx.obj, choice, json=json, removed=all_)


@app.command()
def status(ctx: typer.Context, json: Json = False) -> None:
    """Show which daemon serves the mount, with which settings and limits."""
    from libmshare.cli import status as status_

    status_.status(ctx.obj, json=json)


@app.command()
def info(ctx: typer.Context, name: Name, json: Json = False) -> None:
    """Show everything about one region, and who has attached it."""
    from libmshare.cli import listing

    listing.info(os.fsencode(name), ctx.obj, json=json)


@app.command()
def maps(ctx: typer.Context, name: Name, json: Json = False) -> None:
    """Show what is mapped in a region, as /proc/PID/maps does."""
    from libmshare.cli import listing

    listing.maps(os.fsencode(name), ctx.obj, json=json)


@app.command()
def ptes(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="a region; without one, all processes are looked at",
            autocompletion=_complete,
            show_default=False,
        ),
    ] = None,
    everybody: Annotated[
        bool, typer.Option("--all", help="all processes that may be looked at: the default")
    ] = False,
    pid: Pids = None,
    by: Annotated[View, typer.Option(help="what a line is about")] = View.OBJECT,
    sort: Annotated[Sort, typer.Option(help="what comes first")] = Sort.TABLES,
    top: Annotated[int, typer.Option(metavar="N", min=0, help="so many lines; 0: all")] = 20,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="update it live; q quits")] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=86400, help="between two looks")
    ] = 2.0,
) -> None:
    """Show where page tables go: on the whole machine, or those of a region's sharers."""
    from libmshare.cli import listing, output, tables

    if name is not None:
        if everybody or pid or json or watch:
            raise typer.BadParameter("a region's NAME stands alone", param_hint="NAME")
        listing.ptes(os.fsencode(name), ctx.obj)
        return
    if everybody and pid:
        raise typer.BadParameter("either --all or --pid", param_hint="--pid")
    wanted = tables.Wanted(tuple(pid or ()), by, sort, top)
    if watch and output.on_terminal() and not json:
        tables.live(wanted, interval)
    else:
        tables.ptes(wanted, json=json)


@app.command()
def collapse(
    everybody: Annotated[
        bool, typer.Option("--all", help="all processes that may be looked at")
    ] = False,
    pid: Pids = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="objects of this name in `mshare ptes`; * and ? are wildcards; may be repeated",
        ),
    ] = None,
    min_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="leave smaller objects alone [64M]")
    ] = None,
    min_filled: Annotated[
        str | None,
        typer.Option(metavar="PART", help="leave chunks of 2 MiB alone that are emptier [50%]"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="PART", help="how much of one processor to take from others [auto]"),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="keep running, and do it as memory is filled")
    ] = False,
    interval: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="between two looks of --watch [1]")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="settings; options take precedence")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="only print what would be done, and the time it would take"),
    ] = False,
    json: Json = False,
) -> None:
    """Free page tables of running programs: huge pages for their shared memory."""
    from libmshare.cli import collapse as collapse_
    from libmshare.cli.collapsing import load

    if not (everybody or pid or name or config):
        raise typer.BadParameter("of whom: --all, --pid PID or --name PATTERN?")
    if everybody and pid:
        raise typer.BadParameter("either --all or --pid", param_hint="--pid")
    options: dict[str, object] = {
        "names": name,
        "min_size": min_size,
        "min_filled": min_filled,
        "budget": budget,
        "interval": interval,
    }
    order = collapse_.Order(tuple(pid or ()), load(config, options), dry_run, json)
    if watch and not dry_run:
        collapse_.watch(order)
    elif not collapse_.collapse(order):
        raise typer.Exit(Exit.FAILED)


@app.command()
def top(
    ctx: typer.Context,
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="[PATTERN]", help="only regions whose names contain this", show_default=False
        ),
    ] = "",
    once: Annotated[bool, typer.Option("--once", help="print it once and exit")] = False,
    sort: Annotated[Order, typer.Option(help="what comes first")] = Order.MEMORY,
    json: Annotated[
        bool, typer.Option("--json", help="an object a line, until it is interrupted")
    ] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=86400, help="between two looks")
    ] = 2.0,
) -> None:
    """Watch regions and sharers; q quits."""
    from libmshare.cli import output
    from libmshare.cli import top as top_

    wanted = top_.Wanted(sort, pattern, interval)
    if json:
        top_.stream(ctx.obj, wanted, forever=not once)
    elif once or not output.on_terminal():
        top_.once(ctx.obj, wanted)
    else:
        top_.live(ctx.obj, wanted)


@app.command()
def web(
    ctx: typer.Context,
    port: Annotated[
        int,
        typer.Option(metavar="PORT", min=0, max=65535, help="of 127.0.0.1; 0: any that is free"),
    ] = 0,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=86400, help="between two looks")
    ] = 2.0,
) -> None:
    """Show regions and sharers live, on a page for this machine's browser; Ctrl-C ends it."""
    try:
        from libmshare.cli.web.server import web as web_
    except ModuleNotFoundError as error:
        missing = (error.name or "more").partition(".")[0]
        raise CommandError(f"the page needs {missing}: {cure('web')}") from None
    web_(ctx.obj, port, interval)


@app.command()
def create(
    ctx: typer.Context,
    name: Name,
    size: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=_bytes, help="its size: 64M")
    ] = None,
    start: Annotated[
        int | None,
        typer.Option(
            metavar="ADDRESS",
            parser=_bytes,
            help="its address: 2T, 0x20000000000; without it the daemon chooses",
        ),
    ] = None,
    mode: Annotated[str, typer.Option(metavar="MODE", help="the mode of its file, octal")] = "0600",
    backing: Annotated[
        Backing | None, typer.Option(help="what holds its pages, instead of the daemon's choice")
    ] = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="fill it with anonymous memory; else it is a hole")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="URL", help="begin with the bytes of this object: s3://bucket/key"
        ),
    ] = None,
) -> None:
    """Create a region that stays under its name."""
    from libmshare.cli import create as create_

    kind = None if backing is None else backing.value
    bits = _mode(mode)
    if source is not None:
        from libmshare.cli import images

        images.load(os.fsencode(name), source, start, size, bits, kind)
        return
    if size is None:
        raise typer.BadParameter("say how large the region is: --size 64M", param_hint="--size")
    create_.create(os.fsencode(name), start, size, bits, kind, ctx.obj, anonymous=anonymous)


@app.command()
def wait(
    ctx: typer.Context,
    name: Name,
    for_: Annotated[For, typer.Option("--for", help="what to wait for")] = For.CREATED,
    patience: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0, help="how long; without it for ever"),
    ] = None,
) -> None:
    """Wait until a region is created, used, unused, collapsed or gone."""
    from libmshare.cli import waiting

    waiting.wait(os.fsencode(name), for_, ctx.obj, patience)


@app.command()
def push(
    name: Name,
    url: Url,
    unsynchronized: Annotated[
        bool,
        typer.Option("--unsynchronized", help="even if other processes may write it meanwhile"),
    ] = False,
    abi: Annotated[
        str, typer.Option(metavar="TAG", help="how what is in it is laid out, for pull --abi")
    ] = "",
) -> None:
    """Write an image of a region to an object store."""
    from libmshare.cli import images

    images.push(os.fsencode(name), url, unsynchronized=unsynchronized, abi=abi)


@app.command()
def pull(
    url: Url,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="the region's name [the URL's last part, less .img]"),
    ] = None,
    mode: Annotated[str, typer.Option(metavar="MODE", help="the mode of its file, octal")] = "0600",
    backing: Annotated[
        Backing | None, typer.Option(help="what holds its pages, instead of the daemon's choice")
    ] = None,
    digest: Annotated[
        str | None,
        typer.Option(metavar="sha256:…", help="which image it has to be, as push told it"),
    ] = None,
    abi: Annotated[
        str | None, typer.Option(metavar="TAG", help="what the image has to say of its layout")
    ] = None,
    wait: Annotated[
        bool,
        typer.Option("--wait/--no-wait", help="until all of it is there, or in the background"),
    ] = True,
) -> None:
    """Make the region of an image, at its address, unless it is here already."""
    from libmshare.cli import images

    kind = None if backing is None else backing.value
    called = None if name is None else os.fsencode(name)
    images.pull(url, called, _mode(mode), kind, digest, abi, wait=wait)


@app.command()
def rm(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="the regions' names", autocompletion=_complete),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="all regions that nobody has")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="with --all: also those that somebody has")
    ] = False,
) -> None:
    """Remove regions; their memory goes with their last sharers."""
    from libmshare.cli.remove import remove, remove_all

    if all_ == bool(names):
        text = "either names or --all, not both" if all_ else "give names, or --all"
        raise typer.BadParameter(text, param_hint="NAME")
    if force and not all_:
        raise typer.BadParameter("is for --all", param_hint="--force")
    if all_:
        result = remove_all(ctx.obj, force=force)
        for gone in result.done:
            typer.echo(f"removed: {gone}")
    else:
        result = remove([os.fsencode(name) for name in names or []], ctx.obj)
    for note in result.notes:
        typer.echo(f"mshare: {note}", err=True)
    for failure in result.failures:
        failure.tell()
    if result.failures:
        raise typer.Exit(Exit.FAILED)


@app.command()
def doctor(
    ctx: typer.Context,
    json: Json = False,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="check this configuration of msharefsd, too"),
    ] = None,
) -> None:
    """Check what this kernel, these rights and this configuration allow."""
    from libmshare.cli import doctor as doctor_

    if not doctor_.doctor(ctx.obj, config, json=json):
        raise typer.Exit(Exit.FAILED)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(
    command: Annotated[list[str], typer.Argument(metavar="PROGRAM")],
    backing: Annotated[
        Backing, typer.Option(help="where large anonymous shared memory comes from")
    ] = Backing.SHM,
    min_size: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=_bytes, help="leave smaller mappings alone [64M]"),
    ] = None,
    no_watch: Annotated[
        bool, typer.Option("--no-watch", help="do not free its page tables")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only print what would be done")
    ] = False,
) -> None:
    """Run a program, free its page tables, and have its mmap() act on regions."""
    from libmshare.cli import run as run_

    smallest = run_.SMALLEST if min_size is None else max(min_size, 1)
    run_.run(command, run_.Manner(backing.value, smallest, not no_watch, dry_run))


def run_app() -> int:
    """Run it; returns the exit status.  Raises CommandError, for wrong usage, too."""
    try:
        status = app(prog_name="mshare", standalone_mode=False)
    except typer.Abort:  # Ctrl-C
        return Exit.SIGNAL + signal.SIGINT
    except _UsageError as error:
        raise _usage(error) from None
    return status if isinstance(status, int) else Exit.DONE


def _usage(error: Any) -> CommandError:
    """On one line, with where to look."""
    text = error.format_message()
    if "\n" in text:  # the page of help, for want of any word
        error.show()
        raise SystemExit(Exit.USAGE)
    where = "mshare" if error.ctx is None else error.ctx.command_path
    text = printable_line(text[:1].lower() + text[1:].removesuffix("."))
    text = text.replace("a valid int range", "a whole number").replace(
        "a valid int", "a whole number"
    )
    more = " " if text.endswith("?") else ": "
    return CommandError(f"{text}{more}see `{where} --help`", Exit.USAGE)
