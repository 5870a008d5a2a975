"""Calls on what another user's processes hold: in threads that can be left behind.

A process can hold the lock of its own address space for as long as it likes, and a system
call that takes this lock does not come back before, whatever signal comes.  Nor does the
last close of a descriptor that has to do with it.  So such calls are made by a thread, and
nobody waits for that for more than a moment.

- A lane has a descriptor table of its own (CLOSE_RANGE_UNSHARE).  When the pager is killed
  its own table goes at once, with the connections of everybody, whatever hangs in a lane.
  Descriptors come in over a socket, whose other end is in the lane's table alone: from then
  on the pager's own close of them is not the last one, even if nobody has taken them out.
- Three threads share that table.  One makes the calls, in order.  One closes what is let go
  of.  One waits for what can be read, which takes no lock, and starts the others, and
  another one in place of one that hangs: a thread shares the table of who starts it.
- Functions that run in a lane name a descriptor by its key; the number is the lane's.

Everything but `_look`, `_work`, `_close`, `let_go` and what they call is for the trio thread.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar, cast

import trio

from msharefsd.linux import processes, syscalls
from msharefsd.threads.breath import Breath

log = logging.getLogger(__name__)

T = TypeVar("T")

MOMENT: Final = 0.01
"""How long the pager's thread waits for a call at the most (seconds)."""
CREDIT: Final = 0.03
"""And for all calls of one lane together, of which it has CREDIT_PER_SECOND more each second."""
CREDIT_PER_SECOND: Final = 0.03
FREE: Final = 0.001
"""A call that takes no longer costs no credit: it did not wait for a lock."""
MOST_HUNG: Final = 4
"""How many threads of one lane may hang."""
MOST_NEWS: Final = 64
"""How much may be on its way to the pager's thread while more is read."""
_FIRST: Final = 3
_ONCE: Final = select.EPOLLIN | select.EPOLLONESHOT


class LateError(Exception):
    """The call has not come back in time."""

    def __init__(self, *, under_way: bool) -> None:
        """`under_way`: it may come back yet; otherwise it is not made at all."""
        super().__init__()
        self.under_way = under_way


class Descriptors:
    """A lane's table, for the functions that run in it."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._keys: dict[int, int] = {}
        self._watched: set[int] = set()
        self._poll: select.epoll | None = None
        self._socket: socket.socket | None = None

    def open(self, end: int) -> None:
        """`end`: of the socket over which descriptors come."""
        self._poll = select.epoll()
        self._socket = socket.socket(fileno=end)

    @property
    def poll(self) -> select.epoll:
        """What is waited for."""
        assert self._poll is not None
        return self._poll

    def __getitem__(self, key: int) -> int:
        """The number that it has in this table.  Raises OSError(ESRCH) if it has none."""
        try:
            return self._numbers[key]
        except KeyError:
            raise ProcessLookupError(errno.ESRCH, "it is gone") from None

    def take(self, key: int) -> None:
        """The next one that was handed in is called `key`."""
        assert self._socket is not None
        fd = syscalls.receive_fd(self._socket, socket.MSG_DONTWAIT)
        if fd >= 0:
            self.put(key, fd)

    def put(self, key: int, fd: int) -> None:
        """A descriptor of this table is called `key`."""
        self._numbers[key], self._keys[fd] = fd, key

    def watch(self, key: int) -> None:
        """Tell once when it can be read."""
        fd = self[key]
        if fd in self._watched:
            self.poll.modify(fd, _ONCE)
        else:
            self._watched.add(fd)
            self.poll.register(fd, _ONCE)

    def key_of(self, fd: int) -> int | None:
        """What a number of this table is called, if it is known still."""
        return self._keys.get(fd)

    def forget(self, key: int) -> int:
        """It has no name any more; its number, or -1.  To close it may take long."""
        fd = self._numbers.pop(key, -1)
        if fd >= 0:
            del self._keys[fd]
            if fd in self._watched:
                # It would be waited for as long as its process has it.
                self._watched.discard(fd)
                self.poll.unregister(fd)
        return fd

    def close_all(self) -> None:
        """Nothing more is done here.  This may wait."""
        # Python's objects close a number in whatever thread they are freed.
        self.poll.close()
        if self._socket is not None:
            self._socket.close()
        while self._numbers:
            os.close(self._numbers.popitem()[1])


Function = Callable[[Descriptors], T]


@dataclass(eq=False, slots=True)
class Request:
    """A call that a lane is to make."""

    owner: object
    """On whom; None if that is no matter."""
    function: Callable[[Descriptors], object]
    late: bool = False
    """Nobody waits for it any more: when it is done, `after` is called."""
    after: Callable[[Request], None] | None = None
    value: object = None
    error: OSError | None = None
    done: threading.Lock = field(default_factory=threading.Lock)
    """Held until it is done."""

    def __post_init__(self) -> None:
        self.done.acquire()

    def result(self) -> object:
        """What it came to.  Raises its OSError."""
        if self.error is not None:
            raise self.error
        return self.value


class Begun(Generic[T]):
    """A call that is under way: see Lane.ask."""

    def __init__(self, request: Request, event: trio.Event) -> None:
        self._request = request
        self._event = event

    async def result(self, seconds: float) -> T:
        """What it comes to within so many seconds.  Raises LateError, or what it raises."""
        if not self._event.is_set():
            with trio.move_on_after(seconds):
                await self._event.wait()
        if not self._event.is_set():
            raise LateError(under_way=True)
        return cast("T", self._request.result())


class Lane:
    """The lane of one user."""

    def __init__(
        self,
        read: Callable[[int], object],
        has_room: Callable[[int], bool],
        readable: Callable[[int, object, bool], None],
        caught_up: Callable[[], None],
    ) -> None:
        """`read` is called, in a thread of the lane, for what is watched and can be read.

        `readable` is told of which key, what came of it, and whether that is watched still: it
        is if something came and there is room for more, which `has_room` is asked in the same
        thread.  `caught_up` is told when no call is late any more.
        """
        self._read = read
        self._has_room = has_room
        self._readable = readable
        self._caught_up = caught_up
        self._table = Descriptors()
        self._queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._closing: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.unclosed = 0
        """How many descriptors are to be closed."""
        self._late: set[Request] = set()
        self._generation = 0
        self._current: Request | None = None
        self._lock = threading.Lock()
        """Of these two: a thread that has come back knows whether it was left behind."""
        self._begun = 0.0
        self._thread = 0
        self.hung = 0
        """How many threads have been left behind and are not back."""
        self._credit = CREDIT
        self._credit_since = time.monotonic()
        self._keys = itertools.count(1)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Rung here, for the thread that looks."""
        self._news: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self._chime = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Rung there, for these: trio's own way needs trio's descriptors."""
        self._their_chime = self._chime
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._stopped = False
        self._is_through = False
        threading.Thread(target=self._look, args=(theirs.detach(),), daemon=True).start()

    async def run(self) -> None:
        """Tell what the threads tell, until it is stopped and they are through."""
        breath = Breath()
        while True:
            await trio.lowlevel.wait_readable(self._chime)
            os.eventfd_read(self._chime)
            while self._news:
                function, arguments = self._news.popleft()
                function(*arguments)
                await breath.take()
            if self._is_through:
                for fd in (self._bell, self._chime):
                    os.close(fd)
                return

    # -- asking --

    @property
    def is_late(self) -> bool:
        """Whether it has not come back from what was asked of it."""
        return bool(self._late)

    def hanging(self, seconds: float = 0.0) -> Request | None:
        """The call that has not come back for so many seconds.

        None if its thread could go on, and only has to wait for a processor.
        """
        with self._lock:
            current, begun, thread = self._current, self._begun, self._thread
        if current is None or time.monotonic() - begun < seconds:
            return None
        return None if processes.state(os.getpid(), thread) == "R" else current

    @property
    def is_lost(self) -> bool:
        """Whether so many threads hang that no more are started."""
        return self.hung >= MOST_HUNG

    def hand_in(self, fd: int) -> int:
        """Give a descriptor to the lane; what it is called.  `fd` is closed.

        Raises OSError: ENOBUFS, EAGAIN (there are too many that were not taken), and then
        it is not closed.
        """
        socket.send_fds(self._ours, [b"x"], [fd])
        os.close(fd)
        key = next(self._keys)
        self.post(None, lambda table: table.take(key))
        return key

    def new_key(self) -> int:
        """For a descriptor that is made in the lane."""
        return next(self._keys)

    def close(self, owner: object, key: int) -> None:
        """Let go of a descriptor, after what has been asked before."""
        self.unclosed += 1
        self.post(owner, lambda table: self._closing.put(table.forget(key)))

    def post(self, owner: object, function: Callable[[Descriptors], object]) -> None:
        """Have it done; what comes of it is nobody's."""
        self._queue.put(Request(owner, function))

    def tell(self, function: Callable[..., object], *arguments: object) -> None:
        """Have the trio thread call `function`: for functions that run in the lane."""
        self._soon(function, *arguments)

    def call(
        self,
        owner: object,
        function: Function[T],
        after: Callable[[Request], None] | None = None,
    ) -> T:
        """Have it done, and wait for that a moment.

        Raises LateError: it is still to be done then, and `after` is called when it is; or
        without `after` it was perhaps not begun.  Raises what it raises.
        """
        moment = 0.0 if self._late else min(MOMENT, self._left())
        request = Request(owner, function, late=moment <= 0.0, after=after)
        if request.late:
            if after is not None:
                self._is_late(request)
                self._queue.put(request)
            raise LateError(under_way=after is not None)
        self._queue.put(request)
        if not self._wait(request, moment):
            request.late = True
            if not request.done.acquire(blocking=False):  # nor has it been done just now
                self._is_late(request)
                raise LateError(under_way=True)
        return cast("T", request.result())

    def _wait(self, request: Request, moment: float) -> bool:
        since = time.monotonic()
        try:
            return request.done.acquire(timeout=moment)
        finally:
            took = time.monotonic() - since
            if took > FREE:
                # For longer than a moment only we were kept from running (SIGSTOP, a machine
                # that was paused): that is nobody's debt.
                self._credit -= min(took, MOMENT)

    def _left(self) -> float:
        now = time.monotonic()
        more = (now - self._credit_since) * CREDIT_PER_SECOND
        self._credit, self._credit_since = min(CREDIT, self._credit + more), now
        return self._credit

    async def ask(self, owner: object, function: Function[T], seconds: float) -> T:
        """Have it done, and wait for that while others are served.

        Raises LateError after so many seconds: it is still to be done then.  Raises what it
        raises.
        """
        return await self.begin(owner, function).result(seconds)

    def begin(self, owner: object, function: Function[T]) -> Begun[T]:
        """As `ask`, for who has something else to do meanwhile."""
        event = trio.Event()
        request = Request(owner, function, late=True, after=lambda _: event.set())
        self._is_late(request)
        self._queue.put(request)
        return Begun(request, event)

    def _is_late(self, request: Request) -> None:
        self._late.add(request)

    def _came_back(self, request: Request) -> None:
        if request not in self._late:
            return  # its thread was given up
        self._late.discard(request)
        if request.after is not None:
            request.after(request)
        if not self._late:
            self._caught_up()

    # -- what hangs --

    def leave_behind(self, hanging: Request) -> None:
        """Go on without the thread that hangs in that call, with what is asked after it."""
        with self._lock:
            if self.is_lost or self._current is not hanging:
                return
            self._generation += 1
            self._current = None
        self.hung += 1
        self._late.discard(hanging)
        os.eventfd_write(self._bell, 1)
        if not self._late:
            self._caught_up()

    def _is_back(self) -> None:
        self.hung -= 1

    def _to_close(self, count: int) -> None:
        self.unclosed += count

    def _is_closed(self) -> None:
        self.unclosed -= 1

    def _through(self) -> None:
        self._is_through = True

    def stop(self) -> None:
        """Nothing more is asked of it."""
        self._stopped = True
        self._queue.put(None)
        self._closing.put(None)
        os.eventfd_write(self._bell, 1)
        self._ours.close()

    # -- in its threads --

    def _look(self, end: int) -> None:
        bell = -1
        try:
            end, bell, self._their_chime = self._apart(end)
            self._table.open(end)
            self._table.poll.register(bell, select.EPOLLIN)
            self._start()
            threading.Thread(target=self._close, daemon=True).start()
            self._serve(bell)
        except Exception:
            log.exception("a lane has failed")
        finally:
            self._soon(self._through)
            for fd in (bell, self._their_chime):
                os.close(fd)
            self._table.close_all()

    def _apart(self, end: int) -> tuple[int, int, int]:
        """Have a descriptor table of our own, with the three that are needed there."""
        shared = os.pidfd_open(os.getpid())
        try:
            # What a container's filter does not allow must be found out before.
            os.close(syscalls.pidfd_getfd(shared, end))
            syscalls.close_range(_FIRST, syscalls.CLOSE_RANGE_UNSHARE)
        except OSError:
            os.close(shared)
            return end, os.dup(self._bell), os.dup(self._chime)  # then the risk is there
        own = os.pidfd_open(os.getpid())
        first, second, third = (
            syscalls.pidfd_getfd(own, each) for each in (end, self._bell, self._chime)
        )
        os.close(own)
        self._news.extend((os.close, (fd,)) for fd in (end, shared))
        return first, second, third

    def _serve(self, bell: int) -> None:
        started = self._generation
        while True:
            for fd, _ in self._table.poll.poll():
                if fd == bell:
                    os.eventfd_read(bell)
                    if self._stopped:
                        return
                    if started != self._generation:
                        started = self._generation
                        self._start()
                else:
                    self._can_be_read(fd)

    def _can_be_read(self, fd: int) -> None:
        key = self._table.key_of(fd)
        if key is not None:
            watched = False
            try:
                found = self._read(fd)
                if found and len(self._news) < MOST_NEWS and self._has_room(key):
                    # Here, and not by a call: who faults again does not wait for a thread more.
                    with contextlib.suppress(OSError):
                        self._table.poll.modify(fd, _ONCE)
                        watched = True
            except OSError as error:
                found = error
            self._soon(self._readable, key, found, watched)

    def _start(self) -> None:
        threading.Thread(target=self._work, args=(self._generation,), daemon=True).start()

    def _work(self, mine: int) -> None:
        thread = threading.get_native_id()
        while (request := self._queue.get()) is not None:
            with self._lock:
                self._current, self._begun, self._thread = request, time.monotonic(), thread
            try:
                request.value = request.function(self._table)
            except OSError as error:
                request.error = error
            except Exception:
                log.exception("a call in a lane has failed")
                request.error = OSError()
            with self._lock:
                left_behind = mine != self._generation
                if not left_behind:
                    self._current = None
            request.done.release()
            if left_behind:
                self._soon(self._is_back)
                return
            if request.late:
                self._soon(self._came_back, request)

    def let_go(self, fds: list[int]) -> None:
        """Close descriptors of this table; who calls, in a thread of the lane, does not wait."""
        self._soon(self._to_close, len(fds))
        for fd in fds:
            self._closing.put(fd)

    def _close(self) -> None:
        while (fd := self._closing.get()) is not None:
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._soon(self._is_closed)

    def _soon(self, function: Callable[..., object], *arguments: object) -> None:
        self._news.append((function, arguments))
        os.eventfd_write(self._their_chime, 1)
