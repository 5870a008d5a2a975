"""Where descriptors of mapped files survive the daemon.

A client's file can never be opened again: the daemon knows no path that it may trust,
and has not the client's rights.  So each mapped file's descriptor is also held by a
process that does not die with the daemon: systemd, if it keeps descriptors for this
service (FileDescriptorStoreMax=, sd_notify(3) on FDSTORE=1), else one of our own
(keeper.py).  A descriptor is handed over before the call that brought it is answered.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final, Protocol

import trio

from msharefsd.errors import StartError
from msharefsd.life import keeper
from msharefsd.life.notify import Manager

log = logging.getLogger(__name__)

KEEPER_SOCKET: Final = "keeper"
ANSWER_SECONDS: Final = 10.0
AGAIN_SECONDS: Final = 1.0
BUSY_SECONDS: Final = 0.02
_FIRST_PASSED: Final = 3  # sd_listen_fds(3)
_NAME: Final = re.compile(r"msharefs-(\d+)\Z")


class FdStore(Protocol):
    """Holds descriptors by their keys."""

    def take(self) -> dict[int, int]:
        """What a daemon before us stored, duplicates of it: key to descriptor.

        Called once, first.  Raises StartError.
        """

    async def put(self, key: int, fd: int) -> None:
        """Store a duplicate of `fd`; returns when it would survive us.  Raises OSError."""

    def remove(self, key: int) -> None:
        """Let go of it, soon."""

    async def run(self) -> None:
        """What has to be done meanwhile; forever."""

    def close(self, *, for_good: bool) -> None:
        """We end; with `for_good` nobody comes after us."""


def open_store(kind: str, directory: Path, manager: Manager) -> FdStore:
    """The store for a daemon with that run directory.

    `kind`: "systemd", "keeper", or "auto" for what there is.  systemd tells of its store
    in $FDSTORE since version 254; before, it has to be asked for.  Raises StartError.
    """
    here = bool(os.environ.get("NOTIFY_SOCKET"))
    if kind == "systemd" and not here:
        raise StartError("--fd-store=systemd, and $NOTIFY_SOCKET is not set: use Type=notify")
    if kind == "systemd" or (kind == "auto" and here and os.environ.get("FDSTORE", "0") != "0"):
        return SystemdStore(manager)
    try:
        return Keeper(directory)
    except OSError as error:
        log.warning(
            "cannot start the process that keeps descriptors (%s): files that are mapped will not "
            "survive the daemon",
            error.strerror,
        )
        return NoStore()


class NoStore:
    """Nobody."""

    def take(self) -> dict[int, int]:
        """Nothing."""
        return {}

    async def put(self, key: int, fd: int) -> None:
        """In vain."""

    def remove(self, key: int) -> None:
        """It was not there."""

    async def run(self) -> None:
        """Nothing to do."""

    def close(self, *, for_good: bool) -> None:
        """Nothing to do."""


class SystemdStore:
    """The service manager's."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._removed: list[int] = []
        self._work = trio.Event()

    def take(self) -> dict[int, int]:
        """As sd_listen_fds_with_names(3)."""
        count = os.environ.pop("LISTEN_FDS", "0")
        names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
        if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or not count.isdigit():
            return {}
        found: dict[int, int] = {}
        for place in range(int(count)):
            fd = _FIRST_PASSED + place
            os.set_inheritable(fd, False)
            match = _NAME.match(names[place]) if place < len(names) else None
            if match is None or int(match[1]) in found:
                # Not ours, or stored twice: it must not come back each time.
                os.close(fd)
                continue
            found[int(match[1])] = fd
        return found

    async def put(self, key: int, fd: int) -> None:
        """A regular file cannot be polled, so systemd must not try (FDPOLL)."""
        name = f"FDNAME=msharefs-{key}"
        while not self._manager.send("FDSTORE=1", name, "FDPOLL=0", fds=[fd]):
            await trio.sleep(BUSY_SECONDS)

    def remove(self, key: int) -> None:
        """FDSTOREREMOVE."""
        self._removed.append(key)
        self._work.set()

    async def run(self) -> None:
        """Send what is to be removed."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._removed:
                name = f"FDNAME=msharefs-{self._removed[-1]}"
                if self._manager.send("FDSTOREREMOVE=1", name):
                    self._removed.pop()
                else:
                    await trio.sleep(BUSY_SECONDS)

    def close(self, *, for_good: bool) -> None:
        """Nothing: systemd drops its store when a service stops for good."""


class Keeper:
    """A process of our own, found by its socket in the run directory."""

    def __init__(self, directory: Path) -> None:
        """Find it or start it.  Raises OSError."""
        self._path = directory / KEEPER_SOCKET
        self._held: dict[int, int] = {}
        """What it should have: key to a descriptor of ours that stays open meanwhile."""
        self._process: subprocess.Popen[bytes] | None = None
        self._removed: list[int] = []
        self._work = trio.Event()
        self._sending = trio.Lock()
        self._sock = self._find() or self._start()

    def _find(self) -> socket.socket | None:
        sock = _socket()
        try:
            sock.connect(str(self._path))
        except OSError:  # there is none
            sock.close()
            return None
        return sock

    def _start(self) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        with _socket() as listener:
            listener.bind(str(self._path))  # in a directory that is ours alone
            listener.listen(1)
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
            sock = _socket()
            try:
                sock.connect(str(self._path))
            except OSError:
                sock.close()
                raise
        return sock

    def take(self) -> dict[int, int]:
        """What it has; it keeps it."""
        found: dict[int, int] = {}
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

    async def put(self, key: int, fd: int) -> None:
        """A duplicate goes over; what is sent is there, whatever happens to us."""
        self._held[key] = fd
        try:
            await self._send(keeper.STORE, key, fd)
        except OSError:
            # It has died.  run() sees that, too, and brings everything to a new one.
            self._work.set()

    async def _send(self, kind: bytes, key: int, fd: int | None = None) -> None:
        async with self._sending:
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
            while True:
                await self._work.wait()
                self._work = trio.Event()
                while self._removed:
                    with contextlib.suppress(OSError):
                        await self._send(keeper.REMOVE, self._removed.pop())

    async def _watch(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._sock)  # nothing comes but its end
            log.warning("the process that keeps descriptors has died: starting another")
            await self._replace()

    async def _replace(self) -> None:
        async with self._sending:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
            if self._process is not None:
                self._process.poll()
            while True:
                try:
                    self._sock = self._start()
                    break
                except OSError as error:
                    log.error("cannot start it: %s", error.strerror)
                    await trio.sleep(AGAIN_SECONDS)
            self._sock.setblocking(False)
        for key in list(self._held):
            if key in self._held:
                with contextlib.suppress(OSError):
                    await self._send(keeper.STORE, key, self._held[key])

    def close(self, *, for_good: bool) -> None:
        """It stays for the next daemon, or ends."""
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


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
