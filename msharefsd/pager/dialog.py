"""A pager's side of what it and the front say to each other."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol

import trio

from msharefsd.errors import Refused
from msharefsd.link.board import Board
from msharefsd.link.channel import Channel
from msharefsd.link.messages import (
    MOST_NAMES,
    MOST_NUMBERS,
    Answer,
    Begin,
    Changed,
    Connection,
    Done,
    Emptied,
    Ended,
    Established,
    Forward,
    FromFront,
    Go,
    Gone,
    Listen,
    Moved,
    NameRecord,
    Question,
    Ready,
    Stop,
    Unlink,
)
from msharefsd.linux.syscalls import FileIdentity
from msharefsd.paging.pages import count
from msharefsd.paging.pagetables import PageTables
from msharefsd.region import texts
from msharefsd.region.region import Region
from msharefsd.region.registry import Regions
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

ENDED_SECONDS: Final = 0.02

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class FrontEndedError(Exception):
    """The front is gone: there is nobody to serve for."""


@dataclass(slots=True)
class _Waiting:
    done: trio.Event = field(default_factory=trio.Event)
    error: int = 0


class Door(Protocol):
    """Where clients come in: accepting.py."""

    async def accept(self, listener: socket.socket) -> None:
        """Serve who connects there; forever."""

    async def look(self, sock: socket.socket, ours: trio.Event) -> None:
        """See what a connection is about, and serve it or pass it on."""

    async def serve(
        self,
        sock: socket.socket,
        region: Region | None,
        refused: Refused | None,
        ours: trio.Event,
    ) -> None:
        """Serve a connection, or turn it down, to its end."""


@dataclass(frozen=True, slots=True)
class _WorkFor:
    """Those whom what the front says concerns."""

    nursery: trio.Nursery
    door: Door
    regions: Regions
    metrics: Metrics
    finish: Callable[[], Awaitable[None]]


class Dialog:
    """The channel to the front."""

    def __init__(self, channel: Channel[FromFront]) -> None:
        self._channel = channel
        self._seldom = Seldom()
        self._outgoing: deque[Ended | Emptied | Gone | Unlink] = deque()
        self._work = trio.Event()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._page_tables = PageTables()
        self._work_for: _WorkFor
        self._shared: list[trio.Event] = []
        """Of connections that the front may still have, too."""
        self._purge = False
        self._ended: list[int] = []
        self._end = trio.Event()

    # -- at the beginning --

    async def names(self) -> tuple[list[NameRecord], tuple[int, int], Board]:
        """What the front knows of our names, the mount's device, and the board.

        Raises FrontEndedError.
        """
        names: list[NameRecord] = []
        board: Board | None = None
        while True:
            got = await self._channel.receive()
            if got is None or not isinstance(got[0], Begin):
                raise FrontEndedError
            for fd in got[1]:
                board = Board(fd)
                os.close(fd)
            names += got[0].names
            if got[0].last:
                if board is None:
                    raise FrontEndedError
                return names, got[0].device, board

    async def ready(self, regions: list[Region]) -> None:
        """Say what has memory."""
        extents = [region.extent() for region in regions]
        for at in range(0, max(len(extents), 1), MOST_NAMES):
            last = at + MOST_NAMES >= len(extents)
            await self._channel.send(Ready(extents[at : at + MOST_NAMES], last))

    # -- what we say --

    def tell(self, message: Ended | Emptied | Gone | Unlink) -> None:
        """Send it when it can be sent; nobody waits."""
        self._outgoing.append(message)
        self._work.set()

    def _has_ended(self, number: int) -> None:
        """Told in a moment, with others: it is only counted, and waking the front costs."""
        self._ended.append(number)
        self._end.set()

    async def _tell_ended(self) -> None:
        while True:
            await self._end.wait()
            await trio.sleep(ENDED_SECONDS)
            self._end = trio.Event()
            ended, self._ended = self._ended, []
            for at in range(0, len(ended), MOST_NUMBERS):
                self.tell(Ended(ended[at : at + MOST_NUMBERS]))

    async def send_news(self) -> None:
        """Send what there is to tell; forever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._outgoing:
                with contextlib.suppress(OSError):  # it has ended, which run() sees
                    await self._channel.send(self._outgoing.popleft())

    async def flush(self) -> None:
        """What there was to tell is under way."""
        while self._outgoing:
            with contextlib.suppress(OSError):
                await self._channel.send(self._outgoing.popleft())

    async def _wait(self, number: int, message: Established | Unlink) -> int:
        waiting = self._waiting[number] = _Waiting()
        # What was to be told before goes before.
        with trio.CancelScope(shield=True):
            await self.flush()
            with contextlib.suppress(OSError):
                await self._channel.send(message)
        return await self._done_with(number, waiting)

    async def _done_with(self, number: int, waiting: _Waiting) -> int:
        try:
            await waiting.done.wait()
        finally:
            self._waiting.pop(number, None)
        return waiting.error

    def _done(self, message: Done) -> None:
        waiting = self._waiting.get(message.number)
        if waiting is not None:
            waiting.error = message.error
            waiting.done.set()

    async def established(self, region: Region) -> None:
        """A name has its range and memory; the front has written that down.

        Raises Refused(ENOTCONN) if the name is another user's meanwhile.
        """
        number = next(self._numbers)
        if await self._wait(number, Established(number, region.extent())) == errno.ENOTCONN:
            raise Refused(errno.ENOTCONN, "the region's file has another owner now: try again")

    async def forward(self, sock: socket.socket, identity: FileIdentity | None) -> None:
        """Pass on a connection, with the file that its message is about, if we have looked.

        Returns when the front has it: whoever closes it then, it is not the front.  Raises
        OSError when the front has no room for it.
        """
        number = next(self._numbers)
        message = Forward(number, looked=False)
        if identity is not None:
            message = Forward(number, True, identity.major, identity.minor, identity.inode)
        waiting = self._waiting[number] = _Waiting()
        try:
            await self._channel.send(message, [sock.fileno()])
        except BaseException:
            del self._waiting[number]
            raise
        error = await self._done_with(number, waiting)
        if error:
            raise OSError(error, os.strerror(error))

    async def unlink(self, region: Region) -> None:
        """The name is gone, for the front too."""
        number = next(self._numbers)
        await self._wait(number, Unlink(number, region.id))

    # -- what we are told --

    async def run(
        self,
        door: Door,
        regions: Regions,
        metrics: Metrics,
        finish: Callable[[], Awaitable[None]],
        leave: Callable[[], NoReturn],
    ) -> bool:
        """Serve the front until it wants us to end; returns whether to remove everything.

        `finish` is done before that, while everybody is still served; `leave` when the
        front has ended itself.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.send_news)
            nursery.start_soon(self._tell_ended)
            self._work_for = _WorkFor(nursery, door, regions, metrics, finish)
            breath = Breath()
            try:
                while (got := await self._channel.receive()) is not None:
                    self._heard(*got)
                    await breath.take()
            finally:
                self._nobody_shares()  # who ends waits for these, whatever has ended us
            leave()
        return self._purge

    def catch_up(self) -> None:
        """Hear what the front has said until now: a name is known before its maker connects."""
        while (got := self._channel.receive_now()) is not None and got[0] is not None:
            self._heard(*got)

    def _nobody_shares(self) -> None:
        while self._shared:
            self._shared.pop().set()

    def _heard(self, message: FromFront, fds: list[int]) -> None:
        to = self._work_for
        self._nobody_shares()
        match message:
            case Connection() | Listen() if not fds:
                self._no_room(message)
            case Connection():
                region = None if message.name is None else to.regions.learn(message.name)
                ours = trio.Event()
                to.nursery.start_soon(self._serve, _socket(fds), message, region, ours)
                self._shared.append(ours)
            case Listen():
                to.nursery.start_soon(to.door.accept, _socket(fds))
            case Changed():
                to.regions.changed(message.name)
            case Moved():
                to.regions.moved(message.id)
            case Question():
                to.nursery.start_soon(self._answer, message)
            case Done():
                self._done(message)
            case Stop():
                self._purge = message.purge
                to.nursery.start_soon(self._finish)
            case Go() | Begin():
                pass

    async def _finish(self) -> None:
        await self._work_for.finish()
        self._work_for.nursery.cancel_scope.cancel()

    def _no_room(self, message: Connection | Listen) -> None:
        """A connection came without its descriptor, and so is hung up on."""
        if self._seldom.now("no room"):
            log.error("turning clients away: %s", os.strerror(errno.EMFILE))
        if isinstance(message, Connection):
            self._has_ended(message.number)

    async def _serve(
        self, sock: socket.socket, first: Connection, region: Region | None, ours: trio.Event
    ) -> None:
        """One client's connection, to its end; `ours`: nobody else has it."""
        door = self._work_for.door
        try:
            if first.look:
                await door.look(sock, ours)
                return
            refused = Refused(first.error, first.reason) if first.error else None
            await door.serve(sock, region, refused, ours)
        finally:
            self._has_ended(first.number)

    # -- what we are asked --

    async def _answer(self, question: Question) -> None:
        regions, metrics = self._work_for.regions, self._work_for.metrics
        answer, text = Answer(question.number), b""
        try:
            if question.kind == "metrics":
                for region in regions.alive():
                    count(region)
                    region.show()
                answer = Answer(question.number, samples=metrics.samples())
            else:
                text = await self._text(regions, question)
                answer = Answer(question.number, size=len(text))
        except Refused as refused:
            answer = Answer(question.number, error=refused.code)
        with contextlib.suppress(OSError):
            if not text:
                await self._channel.send(answer)
                return
            fd = _sealed(text)
            try:
                await self._channel.send(answer, [fd])
            finally:
                os.close(fd)

    async def _text(self, regions: Regions, question: Question) -> bytes:
        region = regions.with_id(question.id)
        if region is None:
            return b""
        match question.kind:
            case "info":
                count(region)
                return os.fsencode(texts.info(region))
            case "pagetables":
                return os.fsencode(await self._page_tables.text(region))
        breath = Breath()
        lines = []
        for line in texts.maps(region) if question.kind == "maps" else texts.sharers(region):
            lines.append(os.fsencode(line))
            await breath.take()
        return b"".join(lines)


def _socket(fds: list[int]) -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fds.pop())


def _sealed(text: bytes) -> int:
    """Memory with that in it, which nobody changes or cuts any more.  Raises OSError."""
    fd = os.memfd_create("msharefsd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, text)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd
