"""What Prometheus scrapes: `.metrics` by HTTP, from a process that has nothing else.

Who connects may be anybody on the machine, hang, and come again: so it is not the front that
answers.  This process has its socket and no rights, reads `.metrics` as every user of the mount
can, at most once in FRESH_SECONDS however many ask, and gives nobody more than SECONDS; of too
many connections the oldest goes.  It ends with the front, and is started again if it ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from collections import OrderedDict
from collections.abc import Iterator
from http import HTTPStatus
from typing import Final, NoReturn

import trio
from setproctitle import setproctitle

from msharefsd.config import Listen
from msharefsd.front.starter import Kind, Starter
from msharefsd.linux import priority
from msharefsd.security import privileges
from msharefsd.telemetry.labels import line

log = logging.getLogger(__name__)

SECONDS: Final = 5.0
"""How long one connection has for its request and its answer."""
FRESH_SECONDS: Final = 1.0
AGAIN_SECONDS: Final = 2.0
"""Until it is tried again to listen, or to start."""
MOST_CONNECTIONS: Final = 64
MOST_REQUEST: Final = 8 << 10
_BACKLOG: Final = 64
_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


async def keep(starter: Starter, where: Listen | None) -> None:
    """Have one, forever, if metrics are served at all."""
    while where is not None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with ours:
            try:
                with theirs:
                    pid, pidfd = await starter.start(os.geteuid(), theirs, Kind.EXPORTER)
                os.close(pidfd)
                await trio.lowlevel.wait_readable(ours)
                log.error("the process that serves metrics, %d, has ended", pid)
            except OSError as error:
                log.error("no process for metrics: %s", error.strerror)
        await trio.sleep(AGAIN_SECONDS)


def main(where: Listen, mountpoint: str, _uid: int, channel: socket.socket) -> NoReturn:
    """Be it; called in a process of its own."""
    try:
        setproctitle("msharefsd: metrics")
        priority.give_back()
        privileges.drop(())
        trio.run(_Exporter(where, f"{mountpoint}/.metrics").run, channel)
    finally:
        os._exit(0)


class _Exporter:
    def __init__(self, where: Listen, file: str) -> None:
        self._where = where
        self._file = file
        self._text = b""
        self._read_at = -FRESH_SECONDS
        self._turn = trio.Lock()
        self._thread = trio.CapacityLimiter(1)  # a mount that hangs has one thread, not many
        self._connections: OrderedDict[int, trio.CancelScope] = OrderedDict()

    async def run(self, channel: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            await trio.lowlevel.wait_readable(channel)  # the front has ended
            nursery.cancel_scope.cancel()

    async def _listen(self) -> None:
        said = ""
        while True:
            try:
                with _listening(self._where) as sock:
                    log.info("metrics: %s", line(str(self._where)))
                    await self._accept(trio.socket.from_stdlib_socket(sock))
            except OSError as error:
                # An upgrade's predecessor may have the address for a moment still.
                why = error.strerror or str(error)
                if why != said:
                    log.warning("cannot serve metrics on %s: %s", line(str(self._where)), why)
                said = why
            await trio.sleep(AGAIN_SECONDS)

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            number = 0
            while True:
                connection, _ = await listener.accept()
                number += 1
                if len(self._connections) >= MOST_CONNECTIONS:
                    self._connections.popitem(last=False)[1].cancel()
                scope = self._connections[number] = trio.CancelScope()
                nursery.start_soon(self._serve, number, connection, scope)

    async def _serve(
        self, number: int, connection: trio.socket.SocketType, scope: trio.CancelScope
    ) -> None:
        try:
            with connection, scope, trio.move_on_after(SECONDS), contextlib.suppress(OSError):
                status, body = await self._answer(await _request(connection))
                head = (
                    f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {_TYPE}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                left = memoryview(head.encode() + body)
                while left:
                    left = left[await connection.send(left) :]
        finally:
            self._connections.pop(number, None)

    async def _answer(self, request: bytes) -> tuple[HTTPStatus, bytes]:
        words = request.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return HTTPStatus.BAD_REQUEST, b""
        if words[0] != b"GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, b""
        if words[1].split(b"?", 1)[0] != b"/metrics":
            return HTTPStatus.NOT_FOUND, b""
        try:
            return HTTPStatus.OK, await self._metrics()
        except OSError as error:
            if error.errno is not None:
                log.debug("no metrics: %s", error.strerror)
            return HTTPStatus.SERVICE_UNAVAILABLE, b""

    async def _metrics(self) -> bytes:
        async with self._turn:
            if trio.current_time() - self._read_at >= FRESH_SECONDS:
                self._text = await trio.to_thread.run_sync(
                    self._read, limiter=self._thread, abandon_on_cancel=True
                )
                self._read_at = trio.current_time()
        return self._text

    def _read(self) -> bytes:
        with open(self._file, "rb") as file:
            return file.read()


async def _request(connection: trio.socket.SocketType) -> bytes:
    """As far as it says what is wanted; what does not end in time or size is not answered."""
    request = b""
    while b"\r\n\r\n" not in request and len(request) < MOST_REQUEST:
        part = await connection.recv(MOST_REQUEST)
        if not part:
            break
        request += part
    return request


@contextlib.contextmanager
def _listening(where: Listen) -> Iterator[socket.socket]:
    """Raises OSError."""
    if where.path:
        _remove_left(where.path)
        with socket.socket(socket.AF_UNIX) as sock:
            mask = os.umask(0o177)
            try:
                sock.bind(where.path)
            finally:
                os.umask(mask)
            sock.setblocking(False)
            sock.listen(_BACKLOG)
            try:
                yield sock
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(where.path)
        return
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((where.host, where.port))
        sock.setblocking(False)
        sock.listen(_BACKLOG)
        yield sock


def _remove_left(path: str) -> None:
    """A socket that nobody listens on any more.  Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(17, "something else is there")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            try:
                sock.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
