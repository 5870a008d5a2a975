"""The pagers as the front sees them: started, spoken to, given up on.

The front waits for no pager.  What it sends goes when the pager reads; what it asks is
answered within a deadline or from what was known before; and a pager that hangs in the
kernel, because of what its user does, keeps that user waiting and nobody else.  When it has
not answered for SILENT_SECONDS it is killed, so that another can take its place as soon as
the kernel lets it end.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final

import trio

from msharefsd.errors import Refused, StartError, StateError, leaves
from msharefsd.front.starter import Starter
from msharefsd.link import board
from msharefsd.link.board import Board
from msharefsd.link.channel import Channel, ChannelError, pair
from msharefsd.link.messages import (
    MOST_NAMES,
    Answer,
    Begin,
    Changed,
    Connection,
    Done,
    Emptied,
    Ended,
    Established,
    Extent,
    Forward,
    FromPager,
    Go,
    Gone,
    Held,
    Kind,
    Listen,
    Moved,
    Question,
    Ready,
    Stop,
    Unlink,
)
from msharefsd.linux.processes import read_proc
from msharefsd.memory.names import users
from msharefsd.mount.asking import Text
from msharefsd.mount.names import Name, Names
from msharefsd.pager.pager import DIRECTORY as USERS
from msharefsd.pager.pager import HUGE
from msharefsd.telemetry.metrics import COUNTED, Sample
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

SILENT_SECONDS: Final = 30.0
"""After how long without an answer a pager is killed."""
LOOK_SECONDS: Final = 2.0
AGAIN_SECONDS: Final = 0.2
PATIENCE: Final = 8
GO_SECONDS: Final = 0.01
MOST_TEXT: Final = 256 << 20


class State(Enum):
    """Where in its life a pager is."""

    STARTING = "starting"
    READY = "ready"
    ENDING = "ending"
    GONE = "gone"


@dataclass(eq=False, slots=True)
class _Handed:
    """A connection that waits for its pager, or is served by it."""

    sock: socket.socket
    name: Name | None
    over: Callable[[], None]
    refused: Refused | None = None
    look: bool = False


Forwarded = Callable[[socket.socket, "Forward"], None]
"""Take a connection that a pager has passed on."""


def leave_open(sock: socket.socket, _: Forward) -> None:
    """We end: its client begins anew with the next daemon, and nothing of it is closed here."""
    sock.detach()


_News = Changed | Done | Go | Listen | Moved


@dataclass(eq=False, slots=True)
class _Asked:
    """A question that was put."""

    since: float
    answered: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None
    text: bytes = b""


class Pager:
    """One pager."""

    def __init__(
        self,
        uid: int,
        names: Names,
        device: tuple[int, int],
        forwarded: Forwarded = leave_open,
    ) -> None:
        self.uid = uid
        self._device = device
        self._forwarded = forwarded
        self.state = State.STARTING
        self._begun = False
        """Whether it has been sent the names that there were: nothing may come before."""
        self.listens = False
        """Whether it accepts its user's connections."""
        self.pid = 0
        self.pidfd = -1
        self.ready = trio.Event()
        self.gone = trio.Event()
        self.failed: Held | None = None
        """Why it could not begin."""
        self.samples: list[Sample] = []
        """What it had counted when it was asked last."""
        self.heard = trio.current_time()
        self.used = trio.current_time()
        self._names = names
        self._channel: Channel[FromPager] | None = None
        self._board: Board | None = None
        self._connections: dict[int, _Handed] = {}
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._served = 0
        self._outgoing: deque[tuple[_News, tuple[int, ...]]] = deque()
        self._work = trio.Event()
        self._gave = trio.Event()
        self.extents: set[int] = set()
        """Regions of which it has said that they have memory."""

    # -- life --

    async def run(self, starter: Starter) -> None:
        """From its start to its end."""
        try:
            ours, theirs = pair()
            with theirs:
                self._channel = Channel(ours, FromPager)
                self.pid, self.pidfd = await starter.start(self.uid, theirs)
            log.debug("pager of user %d: process %d", self.uid, self.pid)
            await self._begin()
            self._begun = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_changes)
                nursery.start_soon(self._say_go)
                await self._listen()
                nursery.cancel_scope.cancel()
        except* (OSError, ChannelError) as group:
            if self.state is not State.ENDING:
                for error in leaves(group):
                    log.error("pager of user %d is given up: %s", self.uid, error)
        finally:
            self.kill()
            self._end()

    async def _begin(self) -> None:
        assert self._channel is not None
        names = [name.record() for name in self._names.of_home(self.uid)]
        memory = board.make()
        try:
            self._board = Board(memory)
            for at in range(0, max(len(names), 1), MOST_NAMES):
                last = at + MOST_NAMES >= len(names)
                begin = Begin(names[at : at + MOST_NAMES], last, self._device)
                with contextlib.suppress(OSError):  # it has ended, and said why
                    await self._channel.send(begin, [memory] if at == 0 else [])
        finally:
            os.close(memory)

    def _end(self) -> None:
        self.state = State.GONE
        if self._channel is not None:
            self._channel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        for handed in self._connections.values():
            handed.over()
        self._connections.clear()
        for asked in self._asked.values():
            asked.answered.set()
        self._asked.clear()
        for name in self._names.of_home(self.uid):
            name.let_go()
            if not name.linked and not name.size:
                self._names.gone(name.id)
        if self._board is not None:
            self._board.close()
        self.ready.set()
        self.gone.set()

    def kill(self) -> None:
        """SIGKILL; whether it ends is the kernel's affair."""
        if self.pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def where(self) -> str:
        """What it does, for people: its state, and where in the kernel it waits."""
        status = read_proc(self.pid, "stat").rpartition(")")[2].split()
        wchan = read_proc(self.pid, "wchan")
        return f"{status[0] if status else '?'} {wchan or '?'}"

    @property
    def silent(self) -> float:
        """For how long something that it was asked has not been answered, in seconds."""
        if not self._asked or self.state is not State.READY:
            return 0.0
        return trio.current_time() - max(
            self.heard, min(asked.since for asked in self._asked.values())
        )

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do and nothing to keep."""
        if self._connections or self.extents or self.state is not State.READY:
            return False
        there, ever = (0, 0) if self._board is None else self._board.connections()
        if ever != self._served:
            self._served, self.used = ever, trio.current_time()
        return there == 0

    # -- what it says --

    async def _listen(self) -> None:
        assert self._channel is not None
        breath = Breath()
        while (got := await self._channel.receive()) is not None:
            message, fds = got
            self.heard = trio.current_time()
            try:
                self._heard(message, fds)
            except Refused as refused:
                log.error("pager of user %d: %s", self.uid, refused.message)
            finally:
                for fd in fds:
                    os.close(fd)
            await breath.take()

    def _heard(  # noqa: C901, PLR0912 - a case each
        self, message: FromPager, fds: list[int]
    ) -> None:
        match message:
            case Ready():
                self._is_ready(message)
            case Held():
                self.failed = message
            case Forward():
                self._forward(message, fds)
            case Ended():
                for number in message.numbers:
                    handed = self._connections.pop(number, None)
                    if handed is not None:
                        handed.over()
                self.used = trio.current_time()
            case Established():
                self._established(message)
            case Emptied():
                if self._is_its(message.id):
                    self.extents.discard(message.id)
                    self._names.emptied(message.id)
            case Unlink():
                self._unlink(message)
            case Gone():
                if self._is_its(message.id):
                    self.extents.discard(message.id)
                    self._names.gone(message.id)
                self.used = trio.current_time()
            case Answer():
                self._answered(message, fds)

    def _is_its(self, number: int) -> bool:
        name = self._names.with_id(number)
        if name is None or name.home == self.uid:
            return name is not None
        if name.size:
            raise ChannelError(f"speaks of a region of user {name.home}")
        return False  # chown(2), which it has not heard of

    def _forward(self, message: Forward, fds: list[int]) -> None:
        error = 0 if fds else errno.EMFILE
        if fds:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fds.pop())
            sock.setblocking(False)
            self._forwarded(sock, message)
        self.tell(Done(message.number, error))

    def _is_ready(self, message: Ready) -> None:
        for extent in message.extents:
            if self._names.with_id(extent.id) is None:
                name = self._names.recover(extent, self.uid)
                if name is None:
                    continue
                log.warning(
                    "region %d of user %d was in no list of names: it has its name again",
                    extent.id,
                    self.uid,
                )
                self.tell(Changed(name.record()))
            if self._is_its(extent.id):
                self._has_memory(extent)
        if message.last:
            for name in self._names.of_home(self.uid):
                if name.id not in self.extents:
                    self._names.gone(name.id)
            self.state = State.READY
            self.ready.set()

    def _has_memory(self, extent: Extent) -> None:
        self.extents.add(extent.id)
        name = self._names.with_id(extent.id)
        if name is not None and self._board is not None:
            name.look = partial(self._board.get, extent.slot)
            name.count = partial(self._board.sharers, extent.slot)
            name.tell = partial(self._board.counts, extent.slot)
        self._names.established(extent)

    def _established(self, message: Established) -> None:
        error = errno.ENOTCONN
        if self._is_its(message.extent.id):
            error = 0
            try:
                self._has_memory(message.extent)
            except Refused as refused:
                error = refused.code
        self.tell(Done(message.number, error))

    def _unlink(self, message: Unlink) -> None:
        error = 0
        if self._is_its(message.id):
            name = self._names.with_id(message.id)
            assert name is not None
            try:
                self._names.unlink(name)
            except Refused as refused:
                error = refused.code
        if message.number:
            self.tell(Done(message.number, error))

    # -- what it is told --

    def tell(self, message: _News, *fds: int) -> None:
        """Send it when it can be sent; nobody waits.  Descriptors have to stay open."""
        if self.state is State.GONE or self._channel is None:
            return
        if self._begun and not self._outgoing:
            with contextlib.suppress(OSError):
                if self._channel.send_now(message, fds):
                    return
        self._outgoing.append((message, fds))
        self._work.set()

    async def _send_changes(self) -> None:
        assert self._channel is not None
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._outgoing:
                try:
                    await self._channel.send(*self._outgoing[0])
                except OSError:
                    return  # it has ended, which _listen() sees
                self._outgoing.popleft()

    def listen(self, listener: socket.socket) -> None:
        """Have it accept from that socket, if it is ready and does not yet."""
        if self.state is State.READY and not self.listens:
            self.listens = True
            self.tell(Listen(), listener.fileno())

    def _message(self, handed: _Handed) -> Connection:
        number = next(self._numbers)
        record = None if handed.name is None else handed.name.record()
        code, reason = 0, ""
        if handed.refused is not None:
            code, reason = handed.refused.code, handed.refused.message
        self._connections[number] = handed
        return Connection(number, record, code, reason, handed.look)

    def serve_now(self, handed: _Handed) -> bool:
        """As `serve`, if that is possible at once; else False, and the connection is ours."""
        if self.state is not State.READY or self._channel is None or self._outgoing:
            return False
        message = self._message(handed)
        try:
            if self._channel.send_now(message, [handed.sock.fileno()]):
                self._go(handed)
                return True
        except OSError:
            pass
        self._connections.pop(message.number, None)
        return False

    async def serve(self, handed: _Handed) -> bool:
        """Hand over a connection; False if the pager has ended, and the connection is ours."""
        assert self._channel is not None
        message = self._message(handed)
        try:
            await self._channel.send(message, [handed.sock.fileno()])
        except OSError:
            self._connections.pop(message.number, None)
            return False
        self._go(handed)
        return True

    def _go(self, handed: _Handed) -> None:
        # The pager has a descriptor of it, or the message to it: this is not the last close.
        handed.sock.close()
        self.used = trio.current_time()
        self._gave.set()

    async def _say_go(self) -> None:
        """In a moment, with others: it is needed when a connection ends, and waking costs."""
        while True:
            await self._gave.wait()
            await trio.sleep(GO_SECONDS)
            self._gave = trio.Event()
            self.tell(Go())

    # -- what it is asked --

    async def ask(self, kind: Kind, number_of: int, seconds: float) -> tuple[Answer, bytes] | None:
        """Its answer, and the text that came with it; None if there was none in time.

        A pager that has not been heard of for `seconds` since is not waited for; one that
        has much to do, and says other things meanwhile, is, up to PATIENCE times as long.
        """
        if self._channel is None or self.state is State.GONE:
            return None
        number = next(self._numbers)
        asked = self._asked[number] = _Asked(trio.current_time())
        try:
            with trio.move_on_after(PATIENCE * seconds) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_silence, asked, seconds, scope)
                    await self.ready.wait()
                    await self._channel.send(Question(number, kind, number_of))
                    await asked.answered.wait()
                    nursery.cancel_scope.cancel()
        except* OSError:  # it has ended
            self._asked.pop(number, None)
        return None if asked.answer is None else (asked.answer, asked.text)

    async def _watch_silence(self, asked: _Asked, seconds: float, scope: trio.CancelScope) -> None:
        while (left := max(self.heard, asked.since) + seconds - trio.current_time()) > 0:
            await trio.sleep(left)
        scope.cancel()

    def _answered(self, message: Answer, fds: list[int]) -> None:
        asked = self._asked.pop(message.number, None)
        if asked is None:
            return
        asked.answer = message
        if fds and 0 < message.size <= MOST_TEXT:
            # Made by the pager and sealed: it cannot be cut, or changed.
            asked.text = os.pread(fds[0], message.size, 0)
        elif message.size:
            asked.answer = Answer(message.number, error=errno.EMFILE)
        asked.answered.set()

    async def stop(self, *, purge: bool = False) -> None:
        """Have it write back and end; with `purge` it removes all that is written back."""
        self.state = State.ENDING
        if self._channel is not None:
            with contextlib.suppress(OSError):
                await self._channel.send(Stop(purge))


async def homes(directory: Path, identity: str, names: Names) -> list[int]:
    """The users of whom something was left: a journal, memory, or regions in the front's."""
    found = names.homes()
    found |= await trio.to_thread.run_sync(users, directory, identity, directory / HUGE)
    with contextlib.suppress(FileNotFoundError):
        found |= {int(name) for name in os.listdir(directory / USERS) if name.isdecimal()}
    return sorted(found)


async def adopt(pagers: Pagers, whose: list[int], seconds: float) -> list[Pager]:
    """Have users' pagers take over what was left; waits so long.

    Raises StateError if one cannot and never will.
    """
    pagers.adopting = True  # what fails now is told by who starts
    started = [pagers.start(home) for home in whose]
    with trio.move_on_after(seconds):
        for pager in started:
            await pager.ready.wait()
    for pager in started:
        if pager.failed is not None and pager.failed.for_good:
            raise StateError(pager.failed.reason)
    pagers.adopting = False
    return started


class Pagers:
    """All of them, by user."""

    def __init__(
        self, starter: Starter, names: Names, device: tuple[int, int], idle_seconds: float = 10.0
    ) -> None:
        """`device`: of the mount; how long a pager stays without memory and connections."""
        self._device = device
        self._idle_seconds = idle_seconds
        self._starter = starter
        self._names = names
        self._pagers: dict[int, Pager] = {}
        self._nursery: trio.Nursery | None = None
        self._seldom = Seldom()
        self._stopping = False
        self.adopting = False
        """Whether somebody takes over what was left, and says what comes of it."""
        self._listeners: dict[int, socket.socket] = {}
        self.forwarded: Forwarded = leave_open
        """Told of connections that a pager has passed on."""
        self.departed: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        """What pagers had counted that have ended."""
        names.changed = self._changed
        names.moved = self._moved

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look after them, forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(LOOK_SECONDS)
                await self.look(LOOK_SECONDS)
                for pager in self.all():
                    self._look_after(pager)

    def _look_after(self, pager: Pager) -> None:
        assert self._nursery is not None
        idle = trio.current_time() - pager.used > self._idle_seconds
        if pager.idle and idle:
            self._nursery.start_soon(pager.stop)
        elif pager.state is State.READY and pager.silent > SILENT_SECONDS:
            if self._seldom.now(pager.pid):
                log.error(
                    "pager of user %d, process %d, does not answer (%s): killed; its user's "
                    "regions wait for its end",
                    pager.uid,
                    pager.pid,
                    pager.where(),
                )
            pager.kill()

    def all(self) -> list[Pager]:
        """Those that live."""
        return list(self._pagers.values())

    def of(self, uid: int) -> Pager | None:
        """A user's, if it lives."""
        return self._pagers.get(uid)

    def start(self, uid: int) -> Pager:
        """A user's pager; a new one, if there is none."""
        pager = self._pagers.get(uid)
        if pager is None or pager.state is State.GONE:
            assert self._nursery is not None, "run() is not running"
            pager = self._pagers[uid] = Pager(uid, self._names, self._device, self._forwarded)
            self._nursery.start_soon(self._run, pager)
            self._nursery.start_soon(self._give_listener, pager)
        return pager

    async def listen(self, uid: int, listener: socket.socket) -> None:
        """Have a user's pager accept from that socket; forever.

        Who connects waits in its line until there is a pager.  Each gets it when it is ready
        and accepts as long as it lives, and nobody else does.
        """
        self._listeners[uid] = listener
        try:
            lives = self._pagers.get(uid)
            if lives is not None:
                lives.listen(listener)
            while True:
                await trio.lowlevel.wait_readable(listener)
                pager = self.start(uid)
                await pager.gone.wait()
                if not pager.listens:
                    await trio.sleep(AGAIN_SECONDS)
        finally:
            del self._listeners[uid]

    async def _give_listener(self, pager: Pager) -> None:
        await pager.ready.wait()
        listener = self._listeners.get(pager.uid)
        if listener is not None:
            pager.listen(listener)

    async def _run(self, pager: Pager) -> None:
        try:
            await pager.run(self._starter)
        except StartError as error:
            log.error("%s", error)
            raise
        finally:
            if self._pagers.get(pager.uid) is pager:
                del self._pagers[pager.uid]
                self._starter.ended(pager.uid)
            for name, labels, value in pager.samples:
                if name.endswith(COUNTED):
                    key = name, tuple(sorted(labels.items()))
                    self.departed[key] = self.departed.get(key, 0.0) + value
        quiet = self.adopting and pager.failed is not None and pager.failed.for_good
        if pager.failed is not None and not quiet and self._seldom.now((pager.uid, "failed")):
            log.error("user %d's regions cannot be served: %s", pager.uid, pager.failed.reason)
        # Who left memory behind is not left alone with it.
        if self._names_have_memory(pager.uid) and not self._stopping:
            await trio.sleep(AGAIN_SECONDS)
            self.start(pager.uid)

    def _names_have_memory(self, uid: int) -> bool:
        return any(name.size for name in self._names.of_home(uid))

    def _changed(self, name: Name) -> None:
        pager = self._pagers.get(name.home)
        if pager is not None:
            pager.tell(Changed(name.record()))
        elif not name.linked and not name.size:
            # Nobody has ever had memory for it.
            self._names.gone(name.id)

    def _forwarded(self, sock: socket.socket, message: Forward) -> None:
        self.forwarded(sock, message)

    def _moved(self, name: Name, home: int) -> None:
        pager = self._pagers.get(home)
        if pager is not None:
            pager.tell(Moved(name.id))

    async def hand_over(
        self,
        sock: socket.socket,
        home: int,
        name: Name | None,
        over: Callable[[], None],
        *,
        look: bool = False,
    ) -> None:
        """Have a user's pager serve a connection; `over` is called when it ends.

        With `look` it sees for itself what the connection is about.  Waits for a pager that
        starts, or that cannot start yet: that user's clients wait, and nobody else.
        """
        await self._serve(home, _Handed(sock, name, over, look=look))

    def hand_over_now(
        self,
        sock: socket.socket,
        home: int,
        name: Name | None,
        over: Callable[[], None],
        *,
        look: bool = False,
    ) -> bool:
        """As `hand_over`, if nothing has to be waited for; else False, and nothing is done."""
        pager = self._pagers.get(home)
        return pager is not None and pager.serve_now(_Handed(sock, name, over, look=look))

    async def _serve(self, uid: int, handed: _Handed) -> None:
        while True:
            pager = self.start(uid)
            if pager.serve_now(handed):
                return
            await pager.ready.wait()
            if pager.state is State.READY and await pager.serve(handed):
                return
            await pager.gone.wait()
            await trio.sleep(AGAIN_SECONDS)

    async def turn_down(
        self, sock: socket.socket, uid: int, refused: Refused, over: Callable[[], None]
    ) -> None:
        """Have a connection told why it is not served, by the pager of its own user."""
        await self._serve(uid, _Handed(sock, None, over, refused))

    # -- what the mount shows: see mount/asking.py --

    async def text(self, home: int, kind: Text, number: int, seconds: float) -> bytes | int | None:
        """A text, or the errno that the pager gave; None if it did not answer in time."""
        pager = self._pagers.get(home)
        got = None if pager is None else await pager.ask(kind, number, seconds)
        if got is None:
            return None
        answer, text = got
        return answer.error or text

    async def look(self, seconds: float) -> None:
        """Have each tell what it has counted, if it does in time."""

        async def ask(pager: Pager) -> None:
            got = await pager.ask("metrics", 0, seconds)
            if got is not None:
                pager.samples = got[0].samples

        async with trio.open_nursery() as nursery:
            for pager in self.all():
                if pager.state is State.READY and pager.silent < seconds:
                    nursery.start_soon(ask, pager)

    def samples(self) -> list[Sample]:
        """What all have counted, those that have ended too."""
        departed = [(name, dict(labels), value) for (name, labels), value in self.departed.items()]
        return departed + [sample for pager in self.all() for sample in pager.samples]

    def sharers(self) -> int:
        """How many there were when pagers were asked last."""
        return int(sum(value for name, _, value in self.samples() if name == "msharefs_sharers"))

    async def stop(self, seconds: float, *, purge: bool = False) -> list[Pager]:
        """Have all write back and end; those that have not after so many seconds.

        With `purge` they remove everything that their files have taken.
        """
        self._stopping = True
        async with trio.open_nursery() as nursery:
            for pager in self.all():
                nursery.start_soon(partial(pager.stop, purge=purge))
        with trio.move_on_after(seconds):
            for pager in self.all():
                await pager.gone.wait()
        return self.all()
