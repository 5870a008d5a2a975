"""A pager's side of what it and the front say to each other."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import math
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import trio

from msharefsd.control.connection import Connection as ClientConnection
from msharefsd.control.control import Control
from msharefsd.control.receiving import drain
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
    FromFront,
    Go,
    Gone,
    NameRecord,
    Question,
    Ready,
    Stop,
    Unlink,
)
from msharefsd.paging.pages import count
from msharefsd.paging.pagetables import PageTables
from msharefsd.region import texts
from msharefsd.region.region import Region
from msharefsd.region.registry import Regions
from msharefsd.telemetry.metrics import Metrics
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath
from msharefsd.threads.disposal import Disposal

log = logging.getLogger(__name__)

ENDED_SECONDS: Final = 0.02

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class FrontEndedError(Exception):
    """The front is gone: there is nobody to serve for."""


class Dialog:
    """The channel to the front."""

    def __init__(self, channel: Channel[FromFront]) -> None:
        self._channel = channel
        self._seldom = Seldom()
        self._outgoing: deque[Ended | Emptied | Gone | Unlink] = deque()
        self._work = trio.Event()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, trio.Event] = {}
        self._page_tables = PageTables()
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

    async def _wait(self, number: int, message: Established | Unlink) -> None:
        done = self._waiting[number] = trio.Event()
        # What was to be told before goes before.
        with trio.CancelScope(shield=True):
            await self.flush()
            with contextlib.suppress(OSError):
                await self._channel.send(message)
        try:
            await done.wait()
        finally:
            self._waiting.pop(number, None)

    async def established(self, region: Region) -> None:
        """A name has its range and memory; the front has written that down."""
        number = next(self._numbers)
        await self._wait(number, Established(number, region.extent()))

    async def unlink(self, region: Region) -> None:
        """The name is gone, for the front too."""
        number = next(self._numbers)
        await self._wait(number, Unlink(number, region.id))

    # -- what we are told --

    async def run(  # noqa: C901 - a case each
        self,
        control: Control,
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
            shared: list[trio.Event] = []  # of connections that the front may still have, too
            breath = Breath()
            try:
                while (got := await self._channel.receive()) is not None:
                    message, fds = got
                    while shared:
                        shared.pop().set()
                    match message:
                        case Connection() if not fds:
                            self._no_room(message.number)
                        case Connection():
                            sock = socket.socket(
                                socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fds.pop()
                            )
                            ours = trio.Event()
                            nursery.start_soon(self._serve, control, sock, message, ours)
                            shared.append(ours)
                        case Changed():
                            regions.changed(message.name)
                        case Question():
                            nursery.start_soon(self._answer, regions, metrics, message)
                        case Done():
                            self._waiting.get(message.number, trio.Event()).set()
                        case Stop():
                            self._purge = message.purge
                            nursery.start_soon(self._finish, finish, nursery.cancel_scope)
                        case Go() | Begin():
                            pass
                    await breath.take()
            finally:
                while shared:  # who ends waits for these, whatever has ended us
                    shared.pop().set()
            leave()
        return self._purge

    @staticmethod
    async def _finish(finish: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        await finish()
        scope.cancel()

    def _no_room(self, number: int) -> None:
        """A connection came without its descriptor, and so is hung up on."""
        if self._seldom.now("no room"):
            log.error("turning clients away: %s", os.strerror(errno.EMFILE))
        self._has_ended(number)

    async def _serve(
        self, control: Control, sock: socket.socket, first: Connection, ours: trio.Event
    ) -> None:
        """One client's connection, to its end; `ours`: nobody else has it."""
        region = None if first.name is None else control.regions.learn(first.name)
        try:
            try:
                connection = ClientConnection(control, sock, region, first.details)
            except OSError as error:
                log.error("no room for a sharer: %s", error.strerror)
                await ours.wait()
                await _turn_away(sock, control.disposal)
                return
            try:
                if first.error:
                    await connection.refuse(Refused(first.error, first.reason))
                else:
                    await connection.run()
            finally:
                # If it is we who end, what it would undo is the next pager's.
                if trio.current_effective_deadline() != -math.inf:
                    connection.leave()
                    with trio.CancelScope(shield=True):
                        await ours.wait()
                        await connection.close()
        except* OSError as group:
            # Reset by the peer, or the like: its own affair.
            log.debug("connection ended: %s", group.exceptions)
        except* Exception:
            log.exception("a connection failed")
        finally:
            self._has_ended(first.number)

    # -- what we are asked --

    async def _answer(self, regions: Regions, metrics: Metrics, question: Question) -> None:
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


async def _turn_away(sock: socket.socket, disposal: Disposal) -> None:
    await drain(sock, disposal.close_fds)
    sock.close()
