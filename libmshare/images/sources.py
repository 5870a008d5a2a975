"""How stores are spoken to: what this user says, and what the administrator allows.

A user's settings and credentials are in sources.toml, which nobody else may read.  What is allowed
on this machine is in files of root's, in ALLOWED: which prefixes of URLs, and by which endpoint.
Without such files everything is.

This is no wall.  What fetches is the user's own process, which may do without this library; it
keeps those who use it from where they are not to go.
"""

from __future__ import annotations

import errno
import os
import stat
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from libmshare.errors import ImageError

if TYPE_CHECKING:
    from libmshare.images.store import Url

ALLOWED: Final = Path("/etc/msharefs/sources.d")
"""The administrator's: every .toml in it."""
_PRIVATE: Final = 0o077
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_ALLOW_KEYS: Final = {"prefix", "endpoint"}

Table = dict[str, str]


def sources_file() -> Path:
    """Where this user says how stores are spoken to."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "msharefs" / "sources.toml"


def settings(url: Url) -> Table:
    """What this user says of the store, by the longest prefix of the URL.

    Raises ImageError: EACCES if the administrator does not allow it, or others may read or write a
    file that only its owner may; EINVAL for a file that is wrong.
    """
    best = _longest([each for each in _own() if str(url).startswith(each["prefix"])])
    own = {key: value for key, value in best.items() if key != "prefix"}
    allowed = _allowed()
    if allowed is None:
        return own
    if {".", ".."} & set(unquote(str(url)).split("/")):
        raise ImageError(errno.EACCES, f"{ALLOWED} allows no . or .. in a URL", str(url))
    fitting = [each for each in allowed if str(url).startswith(each["prefix"])]
    if not fitting:
        raise ImageError(errno.EACCES, f"{ALLOWED} does not allow it", str(url))
    endpoints = {each.get("endpoint") for each in fitting}
    if None in endpoints or own.get("endpoint") in endpoints:
        return own
    if "endpoint" in own:
        raise ImageError(errno.EACCES, f"{ALLOWED} does not allow this endpoint", own["endpoint"])
    # (And not what the environment says.)
    return own | {"endpoint": _longest(fitting)["endpoint"]}


def _longest(tables: list[Table]) -> Table:
    return max(tables, key=lambda each: len(each["prefix"]), default={})


def _own() -> list[Table]:
    path = sources_file()
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & _PRIVATE:
                raise ImageError(
                    errno.EACCES, "it has credentials, and is not this user's alone", str(path)
                )
            return _tables(path, file.read(), "source")
    except FileNotFoundError:
        return []


def _allowed() -> list[Table] | None:
    """What the administrator allows; None if that is not said."""
    try:
        files = sorted(path for path in ALLOWED.iterdir() if path.suffix == ".toml")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ImageError(errno.EACCES, f"cannot be read: {error.strerror}", str(ALLOWED)) from error
    found: list[Table] = []
    for path in files:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                content = file.read()
        except OSError as error:
            raise ImageError(
                errno.EACCES, f"cannot be read: {error.strerror}", str(path)
            ) from error
        if status.st_uid != 0 or status.st_mode & _OTHERS_WRITE:
            raise ImageError(errno.EACCES, "only root may be able to write it", str(path))
        for each in _tables(path, content, "allow"):
            if each.keys() - _ALLOW_KEYS or not each["prefix"].endswith("/"):
                raise ImageError(
                    errno.EINVAL,
                    "[[allow]] has a prefix that ends with a slash, and may have an endpoint",
                    str(path),
                )
            found.append(each)
    return found if files else None


def _tables(path: Path, content: bytes, name: str) -> list[Table]:
    """The tables of a file.  Raises ImageError (EINVAL) for one that is wrong."""
    try:
        found: dict[str, Any] = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        # (Not what is in it.)
        raise ImageError(errno.EINVAL, "it is no TOML", str(path)) from None
    tables = found.get(name)
    good = found.keys() == {name} and isinstance(tables, list)
    if not good or any(
        not isinstance(each, dict)
        or not isinstance(each.get("prefix"), str)
        or any(not isinstance(value, str) for value in each.values())
        for each in tables or []
    ):
        raise ImageError(errno.EINVAL, f"it has [[{name}]] tables of texts, with prefix", str(path))
    return list(tables or [])
