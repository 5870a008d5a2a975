"""`mshare web`: the server, from its address to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from typing import Final

import uvicorn

from libmshare.cli import output
from libmshare.cli.errors import CommandError
from libmshare.cli.web.page import application
from libmshare.cli.web.watching import Watch

_LOOPBACK: Final = "127.0.0.1"
_TOKEN_BYTES: Final = 24
"""192 bits: nobody guesses them."""


class _Server(uvicorn.Server):
    """Signals do what they do elsewhere: answers that are under way are not waited for.

    (Uvicorn waits, and what it does afterwards differs from version to version.)
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing."""
        yield

    def install_signal_handlers(self) -> None:
        """Nothing; before 0.29 this is what is called."""


def web(timeout: float, port: int, interval: float) -> None:
    """Serve the page until a signal; `port` 0: one that is free.  Raises CommandError."""
    try:
        listening = socket.create_server((_LOOPBACK, port))
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise CommandError(f"port {port}: {why}; --port=0 takes one that is free") from None
    with listening:
        asyncio.run(_serve(listening, timeout, interval))


async def _serve(listening: socket.socket, timeout: float, interval: float) -> None:
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    watch = Watch(timeout, interval)
    server = _Server(
        uvicorn.Config(
            application(watch, token, port),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,  # an address has the token
            proxy_headers=False,
            server_header=False,
        )
    )
    logging.getLogger("uvicorn.error").addFilter(_is_ours)
    output.write(f"http://{_LOOPBACK}:{port}/{token}/")
    sys.stdout.flush()
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch.run())
        await server.serve(sockets=[listening])
        watching.cancel()


def _is_ours(record: logging.LogRecord) -> bool:
    """A failure of this program's; not what others send, nor who is told to go at the end."""
    return record.exc_info is not None and isinstance(record.exc_info[1], Exception)
