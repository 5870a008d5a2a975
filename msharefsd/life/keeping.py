"""Where descriptors of mapped files survive a pager.

A client's file can never be opened again: the daemon knows no path that it may trust,
and has not the client's rights.  So each mapped file's descriptor is also held by a
process that does not die with the pager: the user's keeper (keeper.py).  A descriptor is
handed over before the call that brought it is answered.

Not systemd's store (FDSTORE=1, sd_notify(3)): it has no answer, is full at some point
without a word, and drops a second descriptor of an open file that it has already, so
that a program that maps two parts of one file would lose one of them.  A service manager
has only to leave the keeper alone (KillMode=process).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import trio
from setproctitle import setproctitle

from msharefsd.errors import StartError
from msharefsd.life import keeper
from msharefsd.life.lookout import file_at
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

KEEPER_SOCKET: Final = "keeper"
ANSWER_SECONDS: Final = 10.0
AGAIN_SECONDS: Final = 1.0
REMOVE_SECONDS: Final = 0.01
"""How long what is to be removed gathers."""


class Keeper:
    """A process of our own, found by its socket in the run directory."""

    def __init__(self, directory: Path) -> None:
        """Find it, if there is one; it is started for the first file."""
        self._path = directory / KEEPER_SOCKET
        self._held: dict[int, int] = {}
        """What it should have: key to a descriptor of ours that stays open meanwhile, or -1."""
        self._process: subprocess.Popen[bytes] | None = None
        self._file: tuple[int, int] | None = None
        """Which file its socket's name was, by which the next pager finds it."""
        self._removed: list[int] = []
        self._work = trio.Event()
        self._sending = trio.Lock()
        self._sock = self._find()
        self._started = trio.Event()
        if self._sock is not None:
            self._started.set()

    def _find(self) -> socket.socket | None:
        sock = _socket()
        try:
            sock.connect(str(self._path))
        except OSError:  # there is none
            sock.close()
            return None
        self._file = file_at(self._path)
        return sock

    def _start(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        with _socket() as listener:
            listener.bind(str(self._path))  # in a directory that is ours alone
            self._file = file_at(self._path)
            listener.listen(1)
            try:
                # No file of the daemon's, the log neither: who reads it waits for its end.
                self._process = subprocess.Popen(  # noqa: S603 - our own script
                    [sys.executable, "-I", "-S", keeper.__file__, str(listener.fileno())],
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )
            except OSError as error:
                # Replaced while we run, or out of our user's reach.  What we are will do,
                # and takes more memory.
                log.debug("cannot execute %s: %s", sys.executable, error.strerror)
                _fork(listener)
            sock = _socket()
            try:
                sock.connect(str(self._path))
            except OSError:
                sock.close()
                raise
        return sock

    def lost(self) -> list[Path]:
        """Its socket, if that has been removed; a new one may just be on its way."""
        there = self._file is None or self._sending.locked() or file_at(self._path) == self._file
        return [] if there else [self._path]

    def take(self) -> dict[int, int]:
        """What it has; it keeps it."""
        found: dict[int, int] = {}
        if self._sock is None:
            return found
        self._sock.settimeout(ANSWER_SECONDS)
        try:
            keeper.send(self._sock, keeper.TAKE)
            while True:
                kind, key, fds = keeper.receive(self._sock)
                if kind != keeper.HELD or len(fds) != 1:
                    break
                found[key] = fds[0]
        except TimeoutError:
            raise StartError(
                f"the process that keeps descriptors for us ({self._path}) does not answer: "
                "continue it (SIGCONT), or kill it and lose what it keeps"
            ) from None
        except OSError as error:
            log.warning("the process that keeps descriptors has died: %s", error.strerror)
        finally:
            self._sock.setblocking(False)
        self._held = dict(found)
        return found

    async def put(self, key: int, fd: int, *, stays: bool = True) -> None:
        """A duplicate goes over; what is sent is there, whatever happens to us.

        What does not stay with us is not brought to another process when that one dies.
        Raises OSError when there is no keeper to be had.
        """
        if self._sock is None:
            async with self._sending:
                await self._begin()
        self._held[key] = fd if stays else -1
        try:
            if not self._send_now(keeper.STORE, key, fd):
                await self._send(keeper.STORE, key, fd)
        except OSError:
            # It has died.  run() sees that, too, and brings everything to a new one.
            self._work.set()

    def closes(self, key: int) -> None:
        """It is not ours any more; the keeper has it."""
        if key in self._held:
            self._held[key] = -1

    async def _begin(self) -> None:
        if self._sock is None:
            self._sock = await trio.to_thread.run_sync(self._start)
            self._sock.setblocking(False)
            self._started.set()

    def _send_now(self, kind: bytes, key: int, fd: int | None = None) -> bool:
        """Send it if that is possible at once, and nobody is in line.  Raises OSError."""
        if self._sock is None or self._sending.locked():
            return False
        with contextlib.suppress(BlockingIOError):
            keeper.send(self._sock, kind, key, fd)
            return True
        return False

    async def _send(self, kind: bytes, key: int, fd: int | None = None) -> None:
        async with self._sending:
            assert self._sock is not None
            while True:
                try:
                    keeper.send(self._sock, kind, key, fd)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._sock)
                else:
                    return

    def remove(self, key: int) -> None:
        """Soon: it may have its hands full."""
        if self._held.pop(key, None) is not None:
            self._removed.append(key)
            self._work.set()

    async def run(self) -> None:
        """Send what is to be removed; replace the process when it dies."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            breath = Breath()
            while True:
                await self._work.wait()
                await trio.sleep(REMOVE_SECONDS)
                self._work = trio.Event()
                while self._removed:
                    key = self._removed.pop()
                    with contextlib.suppress(OSError):
                        if not self._send_now(keeper.REMOVE, key):
                            await self._send(keeper.REMOVE, key)
                    await breath.take()

    async def _watch(self) -> None:
        await self._started.wait()
        while True:
            assert self._sock is not None
            await trio.lowlevel.wait_readable(self._sock)  # nothing comes but its end
            log.warning("the process that keeps descriptors has died: starting another")
            await self._replace()

    async def _replace(self) -> None:
        async with self._sending:
            assert self._sock is not None
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
            if self._process is not None:
                self._process.poll()
            while True:
                try:
                    self._sock = await trio.to_thread.run_sync(self._start)
                    break
                except OSError as error:
                    log.error("cannot start it: %s", error.strerror)
                    await trio.sleep(AGAIN_SECONDS)
            self._sock.setblocking(False)
        for key in list(self._held):
            if self._held.get(key, -1) >= 0:
                with contextlib.suppress(OSError):
                    await self._send(keeper.STORE, key, self._held[key])

    def close(self, *, for_good: bool) -> None:
        """It stays for the next pager, or ends."""
        if self._sock is None:
            return
        with self._sock:
            if for_good:
                with contextlib.suppress(OSError):
                    self._sock.setblocking(True)
                    self._sock.settimeout(ANSWER_SECONDS)
                    keeper.send(self._sock, keeper.STOP)
        if for_good:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        if self._process is not None:
            if for_good:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(ANSWER_SECONDS)
            # It is not ours any more: no complaint that it runs.
            self._process.returncode = self._process.returncode or 0


def _fork(listener: socket.socket) -> None:
    """A keeper that is a copy of this process, and nobody's child.  Raises OSError."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            setproctitle("msharefsd: keeper")
            keeper.alone(listener.detach())
    finally:
        os._exit(0)


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
