"""Having memory there before it is touched, without holding up the interpreter."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import Final

from libmshare import core, errors, waiting

_EHWPOISON: Final = 133
_STEP: Final = 16 << 20
"""So much at one time: a timeout takes effect after it at the latest (bytes)."""


class _Populating:
    """One call, which a thread makes: a page that does not come cannot be interrupted."""

    def __init__(self, memory: object, address: int, length: int) -> None:
        self._memory: object = memory  # stays mapped
        self._at = address
        self._end = address + length
        self.error = 0
        self.failure: BaseException | None = None
        self.done = threading.Event()
        self.stop = False

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - raised where it was called
            self.failure = error
        finally:
            self._memory = None
            self.done.set()

    def _run(self) -> None:
        page = os.sysconf("SC_PAGESIZE")
        self._at -= self._at % page
        while self._at < self._end and not self.stop and not self.error:
            step = min(_STEP, self._end - self._at)
            code = core.mshare_populate(self._at, step)
            if code == 0:
                self._at += step
            elif code not in (errno.EAGAIN, errno.EINTR):
                self.error = code


def populate(
    memory: object,
    address: int,
    length: int,
    timeout: float | None,
    root: str,
    name: str,
) -> None:
    """Populate [address, address + length) of a region, in at most `timeout` seconds.

    Raises MemoryError, TimeoutError, OSError; see Region.populate().
    """
    work = _Populating(memory, address, length)
    threading.Thread(target=work.run, name="mshare populate", daemon=True).start()
    try:
        in_time = work.done.wait(timeout)
    finally:
        work.stop = True
    if not in_time:
        raise TimeoutError(
            errno.ETIMEDOUT, f"the memory was not there after {timeout} seconds", name
        )
    if work.failure is not None:
        raise work.failure
    if work.error:
        raise _why(work.error, address, length, root, name)


def _why(code: int, address: int, length: int, root: str, name: str) -> OSError:
    """A page cannot be had: because of what is mapped there, or because there is no memory."""
    if code not in (errno.EFAULT, _EHWPOISON, errno.ENOMEM):
        return errors.of(code, "", name)
    whose = waiting.interruptible(lambda: _mapped(address, length, root))
    if whose == "nothing":
        return errors.MshareError(errno.EFAULT, "nothing is mapped in a part of it", name)
    if whose == "file":
        return errors.MshareError(errno.EIO, "a file that is mapped there cannot be read", name)
    if whose == "awaited":
        return errors.ImageError(
            errno.EIO,
            "a part of its contents is missing, and nobody fetches it any more: pull it again",
            name,
        )
    if whose == "nobody's":
        return errors.AccessDenied(
            errno.EACCES, "a part of it is PROT_NONE: protect() it otherwise first", name
        )
    return errors.NoMemory(
        errno.ENOMEM, "there is no memory for it, or more than this user may have", name
    )


def _lines(path: str) -> list[str]:
    with open(path, errors="surrogateescape") as file:
        return file.read().split("\n")


def directory_of(address: int, root: str) -> str | None:
    """Where the mount tells of the region, whether or not it has its name still."""
    memory = ""
    for line in _lines("/proc/self/maps"):
        low, high = (
            (int(word, 16) for word in line.partition(" ")[0].split("-")) if line else (0, 0)
        )
        if low <= address < high:
            memory = os.path.basename(line.split(None, 5)[-1]).removesuffix(" (deleted)")
    for each in os.listdir(f"{root}/.regions"):
        with contextlib.suppress(OSError):
            for line in _lines(f"{root}/.regions/{each}/info"):
                words = line.split()
                if words[:1] == ["backing:"] and os.path.basename(words[-1]) == memory:
                    return f"{root}/.regions/{each}"
    return None


def _mapped(address: int, length: int, root: str) -> str:
    """What is in the way in the range, as far as that can be told.

    "nothing" is mapped in a part of it, a part is "nobody's" to touch or still "awaited", there is
    a "file", or else it is "memory".
    """
    try:
        directory = directory_of(address, root)
        lines = _lines(f"{directory}/maps") if directory else None
    except OSError:
        lines = None
    if lines is None:
        return "memory"
    at, end, kind = address, address + length, "memory"
    for line in lines:
        if not line:
            continue
        words = line.split(None, 5)
        low, high = (int(word, 16) for word in words[0].split("-"))
        if high <= at or low >= end:
            continue
        if low > at:
            return "nothing"
        if words[1].startswith("---"):
            return "nobody's"
        if words[5:] and words[5].startswith("[awaited:"):
            return "awaited"
        if words[4] != "0":
            kind = "file"
        at = high
    return kind if at >= end else "nothing"
