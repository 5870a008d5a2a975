"""The log: for people, as JSON, or for journald with fields of its own.

What a line is about, region, user or process, is taken from the message's format ("region %s:
..."), so no name in it can pretend to be another field, and no line has to say it twice.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
import sys
import time
from typing import Final, Literal

Format = Literal["text", "json", "journal"]

_JOURNAL: Final = "/run/systemd/journal/socket"
_PLACE: Final = re.compile(
    r"%(?:%|[-#0 +]*\d*(?:\.\d+)?[a-z])|(?P<what>region|user|process|sharer) (?=%[sd])"
)
_FIELDS: Final = {"region": "region", "user": "uid", "process": "pid", "sharer": "pid"}
_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
"""Of syslog(3)."""
_DEBUG: Final = 7


def fields(record: logging.LogRecord) -> dict[str, str | int]:
    """What it is about, by the first argument of each kind: region, uid, pid."""
    arguments = record.args if isinstance(record.args, tuple) else (record.args,)
    found: dict[str, str | int] = {}
    place, next_is = 0, ""
    for match in _PLACE.finditer(str(record.msg)):
        if match["what"]:
            next_is = _FIELDS[match["what"]]
        elif match[0] != "%%":
            value = arguments[place] if place < len(arguments) else None
            if next_is and isinstance(value, str | int):
                found.setdefault(next_is, value)
            place, next_is = place + 1, ""
    return found


class _Json(logging.Formatter):
    """An object a line."""

    def __init__(self, uid: int | None = None) -> None:
        """`uid`: whose pager it is, and so whom a line is about that says nothing else."""
        super().__init__()
        self._usual = _usual(uid)

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **self._usual,
            **fields(record),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


class Journal(logging.Handler):
    """To journald by its own protocol, with the fields MSHAREFS_REGION, _UID and _PID.

    It does not wait: what journald has no room for goes to standard error.
    """

    def __init__(self, path: str = _JOURNAL, uid: int | None = None) -> None:
        """`uid`: as for _Json.  Raises OSError if there is no journald."""
        super().__init__()
        self._usual = _usual(uid)
        self._path = path
        self._send(b"")
        self._fallback = logging.StreamHandler()
        self._fallback.setFormatter(logging.Formatter(_TEXT.format("")))

    def _send(self, data: bytes) -> None:
        # A socket for each line: pagers and keepers close what they did not ask for.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto(data, self._path)

    def emit(self, record: logging.LogRecord) -> None:
        """Send it."""
        text = self.format(record)
        told = {
            "MESSAGE": text,
            "PRIORITY": str(_priority(record.levelno)),
            "SYSLOG_IDENTIFIER": "msharefsd",
            "CODE_FUNC": record.funcName or "",
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
        }
        about = self._usual | fields(record)
        told |= {f"MSHAREFS_{key.upper()}": str(value) for key, value in about.items()}
        data = b"".join(_field(key, value) for key, value in told.items())
        try:
            self._send(data)
        except OSError:
            self._fallback.emit(record)


def _priority(level: int) -> int:
    return next((number for least, number in _PRIORITIES if level >= least), _DEBUG)


def _field(key: str, value: str) -> bytes:
    """One field: systemd.io/JOURNAL_NATIVE_PROTOCOL."""
    data = value.encode("utf-8", "surrogateescape")
    return key.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"


def _usual(uid: int | None) -> dict[str, str | int]:
    return {} if uid is None else {"uid": uid}


_TEXT: Final = "msharefsd{}: %(levelname)s: %(message)s"


def set_up(level: str, form: Format, uid: int | None = None, name: str = "") -> None:
    """Log to standard error, or to journald where there is one.

    `uid`, `name`: the user whose pager this process is.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter(_TEXT.format(f"[{name}]" if name else ""))
    handler.setFormatter(_Json(uid) if form == "json" else text)
    complaint = ""
    if form == "journal":
        try:
            handler = Journal(uid=uid)
        except OSError as error:
            complaint = error.strerror or str(error)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if complaint:
        logging.getLogger(__name__).warning("no journald (%s): standard error it is", complaint)
