"""`.status`: which daemon serves this mount, and how.

Everything in it the front knows by itself: no pager is asked, and nobody's object is looked
at.  So it can be read while pagers hang.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from typing import Final

from msharefsd.config import Allowance, Config
from msharefsd.front.pagers import Pagers
from msharefsd.linux.features import Capabilities
from msharefsd.mount.names import Names
from msharefsd.region.limits import Limits
from msharefsd.telemetry.labels import line

VERSION: Final = version("msharefs")

Row = tuple[str, object]


class Status:
    """The text, anew for each reader."""

    def __init__(
        self, config: Config, found: Capabilities, names: Names, limits: Limits, pagers: Pagers
    ) -> None:
        self._config = config
        self._found = found
        self._names = names
        self._limits = limits
        self._pagers = pagers
        self._since = time.time()
        self._began = time.monotonic()

    def text(self, uid: int) -> bytes:
        """One `key: value` a line, for that user; sizes in bytes, times in seconds.

        Limits of other users than the reader are told to root and the daemon's user.
        """
        rows = [*self._daemon(), *self._settings(), *self._limit_rows(uid), *self._others()]
        return os.fsencode("".join(f"{key}: {line(_word(value))}\n" for key, value in rows))

    def _daemon(self) -> Iterator[Row]:
        regions = [name for name in self._names.all() if name.size]
        yield "version", VERSION
        yield "pid", os.getpid()
        yield "uid", os.geteuid()
        yield "since", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._since))
        yield "uptime", f"{time.monotonic() - self._began:.0f}"
        yield "kernel", platform.release()
        yield "names", len(self._names)
        yield "regions", len(regions)
        yield "sharers", sum(name.shared() for name in regions)
        yield "memory", sum(name.allocated() for name in regions)

    def _settings(self) -> Iterator[Row]:
        for key in Config.__struct_fields__:
            if key != "limits":
                yield f"setting.{key}", getattr(self._config, key)

    def _limit_rows(self, uid: int) -> Iterator[Row]:
        limits = self._config.limits
        yield from _allowed("limit", limits)
        yield "limit.reserve", limits.reserve
        everybody = uid in (0, os.geteuid())
        told = {uid, *limits.users()} if everybody else {uid}
        for user in sorted(told):
            yield from _allowed(f"limit.user.{user}", self._limits.allowance(user))

    def _others(self) -> Iterator[Row]:
        for feature in fields(self._found):
            yield f"feature.{feature.name}", getattr(self._found, feature.name)
        for pager in sorted(self._pagers.all(), key=lambda pager: pager.uid):
            yield f"pager.{pager.uid}", f"{pager.pid} {pager.state.value} {pager.silent:.1f}"


def _allowed(key: str, allowance: Allowance) -> Iterator[Row]:
    for name in Allowance.__struct_fields__:
        yield f"{key}.{name}", getattr(allowance, name)


def _word(value: object) -> str:
    """A value as the configuration file has it, without its quotes."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case frozenset():
            return " ".join(sorted(map(str, value))) or "-"
    return str(value) if value != "" else "-"
