"""A pull that goes on when who asked for it has its region: a process of its own does it.

It is this user's, with what this process has in its environment, and no child of it: whatever
becomes of this one, the region is filled.  Killed, it leaves what has come; the next pull goes
on with the rest.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from libmshare import errors
from libmshare.errors import ImageError
from libmshare.images.patience import patiently

if TYPE_CHECKING:
    from libmshare.region import Region


def begin(
    url: str,
    name: str,
    backing: str | None,
    digest: str | None,
    abi: str | None,
    mode: int,
) -> str:
    """Have it pulled; returns, when the region has its name, which image it is of.

    Raises what pull() raises until then.
    """
    from libmshare import core  # noqa: PLC0415 - its root is asked for here alone

    order: dict[str, Any] = {"url": url, "name": name, "backing": backing, "digest": digest}
    order |= {"abi": abi, "mode": mode, "root": patiently(core.mshare_root)}
    reader, writer = os.pipe()
    with open(reader, "rb") as answers:
        try:
            with subprocess.Popen(  # noqa: S603 - ourselves
                [sys.executable, "-P", "-m", "libmshare.images.fetcher", str(writer)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(writer,),
                start_new_session=True,
            ) as process:
                # It forks, and ends: what is left is nobody's child here.
                process.communicate(json.dumps(order).encode("ascii", "strict"))
        finally:
            os.close(writer)
        answer = answers.readline()
    if not answer:
        raise ImageError(errno.EIO, "the process that fetches it has ended", name)
    told: dict[str, Any] = json.loads(answer)
    if "digest" in told:
        return str(told["digest"])
    raise _raised(told)


def _raised(told: dict[str, Any]) -> Exception:
    if told["errno"] is None:
        return ValueError(told["text"])
    kind = getattr(errors, told["kind"], OSError)
    arguments = [told["errno"], told["text"], *([told["file"]] if told["file"] else [])]
    return kind(*arguments)


def _tell(writer: int, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(writer, json.dumps(what).encode() + b"\n")


def _main(writer: int) -> None:
    order = json.load(sys.stdin)
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 2):
        os.dup2(null, fd)
    os.close(null)
    os.environ["MSHARE_ROOT"] = order.pop("root")

    told = False

    def begun(digest: str) -> None:
        nonlocal told
        if not told:
            told = True
            _tell(writer, {"digest": digest})
            os.close(writer)

    from libmshare.images.pull import pull  # noqa: PLC0415 - after the fork

    try:
        order["called"] = order.pop("name")
        pull(**order, begun=begun).close()
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        file = error.filename if isinstance(error, OSError) else None
        code = error.errno if isinstance(error, OSError) else None
        kind = type(error).__name__
        if not told:
            _tell(writer, {"kind": kind, "errno": code, "text": text, "file": file})
        sys.exit(1)


def attach(
    url: str, name: str, backing: str | None, digest: str | None, abi: str | None, mode: int
) -> Region:
    """The region, as soon as it can be attached; see Region.pull()."""
    from libmshare.images import unnamed  # noqa: PLC0415 - it imports Region

    found = unnamed.attach_image(name, begin(url, name, backing, digest, abi, mode))
    if found is None:
        raise ImageError(errno.EIO, "it could not be filled, and is gone", name)
    return found


if __name__ == "__main__":
    _main(int(sys.argv[1]))
