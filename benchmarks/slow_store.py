"""A store that is as far away as real ones: it answers late, and each connection has its width.

    python slow_store.py PARTS PART_BYTES LATENCY_SECONDS BYTES_PER_SECOND

Prints its port, and then serves an image of so many parts by HTTP: `/r.img`, `/parts/...`; the same
bytes as one file in a directory, `/files/whole`; and at `/asked` how many of these requests there
were, which takes no time.  What is in a part is the same
but for its first eight bytes, its number counted from one: the memory of one serves them all.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

START: Final = 1 << 45
"""The region's address."""
SEED: Final = 1
_PIECE: Final = 256 << 10
"""So much is sent between two looks at the clock (bytes)."""
_RANGE: Final = re.compile(r"bytes=(\d+)-(\d*)")


class Store(ThreadingHTTPServer):
    """The parts, and what is said of them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, parts: int, length: int, latency: float, width: float) -> None:
        """`length`: of a part, in bytes; `latency`: seconds; `width`: bytes per second."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.latency, self.width, self.length = latency, width, length
        self.common = memoryview(random.Random(SEED).randbytes(length))[8:]
        rows, self.heads = [], {}
        for number in range(parts):
            head = (number + 1).to_bytes(8, "little")
            whole = hashlib.sha256(head)
            whole.update(self.common)
            name = whole.hexdigest()
            self.heads[f"/parts/{name[:2]}/{name}"] = head
            rows.append([number * length, length, name])
        self.manifest = _manifest(rows, parts * length)
        self._count = itertools.count()
        self.asked = 0

    def count(self) -> None:
        """There was a request."""
        self.asked = next(self._count) + 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is none of our affair."""


def _manifest(rows: list[list[object]], size: int) -> bytes:
    from libmshare.images.manifest import Manifest, Object, Part, dump  # noqa: PLC0415 - as a script

    parts = tuple(Part(int(str(at)), int(str(length)), str(name)) for at, length, name in rows)
    whole = (Object(0, size, 3, shared=True),)
    return dump(Manifest(START, size, os.uname().machine, "", "shm", whole, parts))


def _cut(pieces: Iterable[bytes | memoryview], start: int, end: int) -> Iterator[memoryview]:
    """What of them is from `start` to `end` of all."""
    at = 0
    for piece in pieces:
        yield memoryview(piece)[max(0, start - at) : max(0, end - at)]
        at += len(piece)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 0
    server: Store

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name
        pass

    def do_GET(self) -> None:
        store = self.server
        if self.path == "/asked":
            self._answer(str(store.asked).encode())
            return
        store.count()
        time.sleep(store.latency)
        if self.path == "/r.img":
            self._answer(store.manifest)
        elif self.path == "/files/":
            self._answer(b'<a href="whole">whole</a>', kind="text/html")
        elif self.path == "/files/whole":
            self._answer(
                *(piece for head in store.heads.values() for piece in (head, store.common))
            )
        elif (head := store.heads.get(self.path)) is not None:
            self._answer(head, store.common)
        else:
            self.send_error(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, *pieces: bytes | memoryview, kind: str = "application/octet-stream") -> None:
        size = sum(map(len, pieces))
        if (asked := _RANGE.fullmatch(self.headers.get("Range", ""))) is not None:
            start, end = int(asked[1]), min(int(asked[2] or size) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            pieces = tuple(_cut(pieces, start, end))
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(sum(map(len, pieces))))
        self.send_header("Content-Type", kind)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 02 Nov 2026 10:00:00 GMT")
        self.end_headers()
        if self.command == "HEAD":
            return
        begun, sent = time.monotonic(), 0
        for piece in pieces:
            for at in range(0, len(piece), _PIECE):
                part = memoryview(piece)[at : at + _PIECE]
                self.connection.sendall(part)
                sent += len(part)
                late = begun + sent / self.server.width - time.monotonic()
                if late > 0:
                    time.sleep(late)


def _main() -> None:
    parts, length = int(sys.argv[1]), int(sys.argv[2])
    with Store(parts, length, float(sys.argv[3]), float(sys.argv[4])) as store:
        print(store.server_address[1], flush=True)
        store.serve_forever()


if __name__ == "__main__":
    _main()
