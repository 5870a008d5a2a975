"""As much of FastCGI as it takes to have a PHP worker run a script."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Final

_BEGIN, _END, _PARAMS, _STDIN, _STDOUT = 1, 3, 4, 5, 6
_HEADER: Final = struct.Struct(">BBHHBx")


def _record(kind: int, content: bytes) -> bytes:
    return _HEADER.pack(1, kind, 1, len(content), 0) + content


def _pair(name: str, value: str) -> bytes:
    return struct.pack(">BI", len(name), len(value) | 1 << 31) + (name + value).encode()


def request(server: Path, script: Path, query: str = "") -> str:
    """What a script prints."""
    parameters = {
        "SCRIPT_FILENAME": str(script),
        "REQUEST_METHOD": "GET",
        "QUERY_STRING": query,
        "SERVER_PROTOCOL": "HTTP/1.1",
    }
    pairs = b"".join(_pair(*each) for each in parameters.items())
    responder = struct.pack(">HB5x", 1, 0)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(server))
        connection.sendall(
            _record(_BEGIN, responder)
            + _record(_PARAMS, pairs)
            + _record(_PARAMS, b"")
            + _record(_STDIN, b"")
        )
        with connection.makefile("rb") as answer:
            said = b""
            while header := answer.read(_HEADER.size):
                _, kind, _, length, padding = _HEADER.unpack(header)
                content = answer.read(length)
                answer.read(padding)
                said += content if kind == _STDOUT else b""
                if kind == _END:
                    break
    return said.partition(b"\r\n\r\n")[2].decode()
