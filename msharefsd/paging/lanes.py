"""Userfaultfds of processes of other users: their calls go through lanes (threads/lane.py).

Who owns a region holds up only themselves, and root is trusted; anybody else could hold the
lock of an address space in which the owner's pager has something to do.  Each such user has
a lane.  What comes of a call that is not back in a moment:

- It is *late*, and so is whatever else is asked of that user's processes: nobody waits.
- A page that is to come into the process itself does not come, and is not asked for again
  before the lane has caught up.  Then all who wait there look again.  (That a page comes
  into the region's memory is made sure of in another way: populate.py.)
- What others rely on, that a window is registered and protected, is done when its turn comes.
  Until then the window is *behind*; what must not be before waits for it, for PATIENCE.
- Then the process that the lane hangs in is *given up*: it is killed, it is no sharer any
  more, and another thread goes on with what is asked of the user's other processes.
- What a call is to have done before it answers, and nobody relies on, is done *in turn*: waited
  for as long as the call waits for that user's processes at all (Waits).

Why that is right for everybody else: docs/concurrency.md.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import trio

from msharefsd.linux import syscalls, uffd
from msharefsd.linux.uffd import Fault, Guard, Outcome
from msharefsd.memory.buffers import Zeros
from msharefsd.paging.background import Background
from msharefsd.region.region import Sharer
from msharefsd.telemetry.seldom import Seldom
from msharefsd.threads.lane import Begun, Descriptors, Lane, LateError, Request

log = logging.getLogger(__name__)

T = TypeVar("T")

Dispose = Callable[[list[int]], None]
"""Closes descriptors of a lane's; nobody waits."""

PATIENCE: Final = 2.0
"""How long what others rely on may take in a process (seconds)."""
LITTLE_PATIENCE: Final = 0.1
"""The same for a user of whom somebody was given up within so many seconds:"""
REMEMBERED: Final = 60.0
LOOK_SECONDS: Final = 0.05
ASKED_SECONDS: Final = 10.0
"""How long a new sharer may wait behind what is late of its user's."""
FETCH_SECONDS: Final = 0.2
"""How long the next pager waits for a sharer's userfaultfd;"""
FETCH_ALL_SECONDS: Final = 0.5
"""and for all that are late, whosever they are."""
IDLE_SECONDS: Final = 10.0
"""How long a lane stays that nobody needs."""
MOST_LANES: Final = 512
"""How many other users may share a user's regions at one time: each has three threads."""
MOST_ARRIVED: Final = 16
"""How often something of a process is read before it is answered."""
MOST_UNCLOSED: Final = 256
"""How many userfaultfds of a user may wait to be closed, when there comes another one."""


class Waits:
    """How long one call waits for processes of other users, whatever these do.

    That is PATIENCE for all of a user's together, so that nobody has a part of another user's.
    """

    def __init__(self) -> None:
        self._left: dict[int, float] = {}
        """By user."""

    def left(self, uid: int) -> float:
        """How long it may still be waited for that user's (seconds)."""
        return self._left.get(uid, PATIENCE)

    @contextlib.contextmanager
    def on(self, uid: int) -> Iterator[None]:
        """What waits for that user's; it is cut off when their time is over."""
        left, since = self.left(uid), trio.current_time()
        try:
            with trio.move_on_after(left):
                yield
        finally:
            self._left[uid] = max(0.0, left - (trio.current_time() - since))


class Far:
    """The userfaultfd of a process of another user.

    Addresses are of that process.  Operations are uffd.py's, but for what is late.
    """

    def __init__(self, user: User, key: int) -> None:
        self._user = user
        self._lane = user.lane
        self._key = key
        self.sharer: Sharer | None = None
        self._greeting: Begun[uffd.Feature] | None = None
        self.in_line = False
        """Whether its handshake has to wait for what is late of its user's."""
        self.closed = False
        self.given_up = False
        self._wake: tuple[int, int] | None = None
        """Who waits there is to look again when the lane has caught up."""
        self._behind = 0
        """How many calls that others rely on are under way."""
        self._then: list[Callable[[], None]] = []
        self.under_way = False
        """Whether the last one that was late has been begun."""
        self._arrived: deque[list[Fault] | OSError] = deque()
        self._watched = False
        self._arrival = trio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing is asked of it any more."""
        return self.closed or self.given_up

    @property
    def is_late(self) -> bool:
        """Whether something that was asked of its user's processes is late."""
        return self._lane.is_late and not self.is_over

    def _on(self, function: Callable[..., T], *arguments: Any, **named: Any) -> Any:
        """The function of a descriptor, for the lane."""

        def call(table: Descriptors) -> T:
            if self.given_up:
                raise ProcessLookupError(errno.ESRCH, "it is gone")
            return function(table[self._key], *arguments, **named)

        return call

    # -- its beginning --

    def shake_hands(self, features: uffd.Feature) -> None:
        """As uffd.handshake, under way; `greeted` tells what comes of it."""
        self.in_line = self._lane.is_late
        self._greeting = self._lane.begin(self, self._on(uffd.handshake, features))

    async def greeted(self) -> None:
        """Wait for the handshake.  Raises its OSError, and EBUSY if it is late as well."""
        try:
            if self._greeting is not None:
                await self._greeting.result(ASKED_SECONDS)
        except LateError as late:
            raise OSError(errno.EBUSY, "a process of the user holds up calls on it") from late

    async def fetch(self, fetch: Callable[[], int], seconds: float) -> bool:
        """Have it from `fetch`, which is called in the lane; False if it was waited for in vain."""
        return await self._have(lambda _: fetch(), seconds)

    async def fetch_waiting(self, key: int, seconds: float) -> bool:
        """The same from a socket of the lane's, which is closed then."""

        def look(table: Descriptors) -> int:
            with socket.socket(fileno=os.dup(table[key])) as sock:
                fd = syscalls.receive_fd(sock, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            if fd < 0:
                raise ProcessLookupError(errno.ESRCH, "it is gone")
            os.set_blocking(fd, False)
            return fd

        try:
            return await self._have(look, seconds)
        finally:
            self._lane.close(self, key)

    async def _have(self, get: Callable[[Descriptors], int], seconds: float) -> bool:
        # One after the other waits, but not behind another that is late.
        if self._lane.is_late:
            seconds = 0.0
        try:
            await self._lane.ask(self, lambda table: table.put(self._key, get(table)), seconds)
        except LateError:
            return seconds <= 0.0
        return True

    # -- what may be left undone --

    def fill(
        self, function: Callable[..., tuple[int, Outcome]], *arguments: int, **named: bool
    ) -> tuple[int, Outcome]:
        """One of uffd.py that ends in (bytes done, outcome)."""
        if self.is_over:
            return 0, Outcome.GONE
        try:
            result: tuple[int, Outcome] = self._lane.call(
                self, self._on(function, *arguments, **named)
            )
        except LateError as late:
            self.under_way = late.under_way
            return 0, Outcome.LATE
        except OSError as error:
            return 0, uffd.outcome_of(error)
        return result

    def zeropage(self, start: int, length: int, *, protect: bool) -> tuple[int, Outcome]:
        """As uffd.zeropage; when it is late it does not happen any more.

        So they are copied: from memory that is gone then.
        """
        try:
            address = self._user.zeros.address(length)
        except OSError as error:
            return 0, uffd.outcome_of(error)
        done, outcome = self.fill(uffd.copy, start, address, length, protect=protect)
        if outcome is Outcome.LATE and self.under_way:
            self.keep(*self._user.zeros.withdraw())
        return done, outcome

    def keep(self, start: int, length: int) -> None:
        """Memory that a late call would copy from: unmap it when that has come back."""
        self._user.kept.append((start, length))
        self._user.unmap_kept()

    def attempt(self, function: Callable[..., object], *arguments: int, **named: bool) -> None:
        """One of uffd.py by which nothing is wrong if it does not happen.  Raises OSError."""
        if not self.is_over:
            try:
                self._lane.call(self, self._on(function, *arguments, **named))
            except LateError:
                return

    def ask_now(self, function: Callable[[], T]) -> T | None:
        """What is to be known of the process; None if it is not known in a moment."""
        if self.is_over:
            return None
        try:
            return self._lane.call(self, lambda _: function())
        except LateError:
            return None

    def is_gone(self) -> bool:
        """Whether its address space is known to exist no longer."""
        if self.is_over:
            return True
        try:
            return bool(self._lane.call(self, self._on(uffd.is_gone)))
        except LateError:
            return False
        except OSError:
            return True

    def look(self, then: Callable[[Guard], None], addresses: Sequence[int], page: int) -> None:
        """Find out, when its turn comes, what there is at these addresses, and tell `then`.

        Nobody waits for that.
        """

        def ask(table: Descriptors) -> None:
            try:
                found = {uffd.guard_at(table[self._key], each, page) for each in addresses}
            except OSError:
                found = {Guard.GONE}
            order = (Guard.WINDOW, Guard.NOTHING, Guard.GONE)
            self._lane.tell(then, next(each for each in order if each in found))

        if not self.is_over:
            self._lane.post(self, ask)

    def wake(self, start: int, length: int) -> None:
        """As uffd.wake, when its turn comes."""
        if not self._lane.is_late:
            self._lane.post(self, self._on(uffd.wake, start, length))
        elif self._wake is None:
            self._wake = start, length
        else:
            low, high = self._wake[0], sum(self._wake)
            low, high = min(low, start), max(high, start + length)
            self._wake = low, high - low

    async def in_turn(self, function: Callable[[int], T]) -> T:
        """What comes of `function` of its descriptor, when its turn comes: see Waits.

        Who does not wait for it any more has it done all the same.  Raises OSError.
        """
        return await self._lane.ask(self, self._on(function), math.inf)

    # -- what others rely on --

    def state(self, function: Callable[..., object], *arguments: int) -> bool:
        """One of uffd.py; whether it has been done.  Otherwise it is under way.  Raises OSError."""
        if self.is_over:
            return True
        try:
            self._lane.call(self, self._on(function, *arguments), self._done_late)
        except LateError:
            self._behind += 1
            return False
        return True

    def _done_late(self, request: Request) -> None:
        self._behind -= 1
        if request.error is not None and request.error.errno == errno.ENOMEM and not self.is_over:
            self._user.give_up(self)
        elif not self._behind:
            self._call_them()

    def then(self, function: Callable[[], None]) -> None:
        """Call `function` when all of that has been done, or it is given up."""
        if self._behind and not self.is_over:
            self._then.append(function)
            self._user.press()
        else:
            function()

    async def level(self) -> None:
        """Wait until what has been asked is done, or it is given up; not for ever."""
        done = True
        if self.is_late:
            with contextlib.suppress(OSError):
                done = self.state(lambda _: None)
        if not done:
            event = trio.Event()
            self.then(event.set)
            await event.wait()

    def _call_them(self) -> None:
        then, self._then = self._then, []
        for each in then:
            each()

    @property
    def is_needed(self) -> bool:
        """Whether anybody waits for it."""
        return bool(self._then)

    def caught_up(self) -> None:
        """Nothing is late any more."""
        if self._wake is not None and not self.is_over:
            self._lane.post(self, self._on(uffd.wake, *self._wake))
        self._wake = None

    # -- faults --

    async def faults(self) -> list[Fault]:
        """What is to be answered; nothing if it was over before, or stolen.  Raises OSError."""
        if not self._arrived and not self.is_over:
            if not self._watched:
                self._watched = True
                self._lane.post(self, lambda table: table.watch(self._key))
            self._arrival = trio.Event()
            await self._arrival.wait()
        found = self._arrived.popleft() if self._arrived else []
        if isinstance(found, OSError):
            raise found
        return found

    @property
    def has_room(self) -> bool:
        """Whether more may be read before what has arrived is answered."""
        return len(self._arrived) < MOST_ARRIVED

    def arrive(self, found: list[Fault] | OSError, *, watched: bool) -> None:
        """They have been read; `watched`: and more will be."""
        self._watched = watched
        self._arrived.append(found)
        self._arrival.set()

    # -- its end --

    def give_up(self) -> None:
        """Nothing more is asked of it."""
        self.given_up = True
        self._arrival.set()
        self._call_them()

    def close(self) -> None:
        """Let go of it; nobody waits for that."""
        if not self.closed:
            self.closed = True
            self._arrival.set()
            self._call_them()
            self._user.close(self, self._key)


class User:
    """Another user than the owner, and their lane."""

    def __init__(self, lanes: Lanes, uid: int, reader: uffd.Reader) -> None:
        self._lanes = lanes
        self.uid = uid
        self._reader = reader
        self.fars: dict[int, Far] = {}
        self.zeros = Zeros()
        self.kept: list[tuple[int, int]] = []
        """Memory that is out of reach, and that calls which did not come back would read."""
        self._pressed = False
        self._ends = False
        self._given_up_at = -REMEMBERED
        self.lane = Lane(self._read, self._has_room, self._readable, self._caught_up)
        lanes.background.start(self.lane.run)

    def _read(self, fd: int) -> list[Fault]:
        found = self._reader.faults(fd)
        if not found:
            os.set_blocking(fd, False)  # see PageServer: somebody may have changed that
        # A child's is not asked for (PageServer.adopt_far), and stays where it came.
        return [each for each in found if isinstance(each, Fault)]

    def _has_room(self, key: int) -> bool:
        """Called in another thread, as `_read` is."""
        far = self.fars.get(key)
        return far is not None and far.has_room

    def _readable(self, key: int, found: object, watched: bool) -> None:  # noqa: FBT001
        far = self.fars.get(key)
        if far is not None:
            assert isinstance(found, list | OSError)
            far.arrive(found, watched=watched)

    def unmap_kept(self) -> None:
        """If every call has come back."""
        if not self.lane.is_late and not self.lane.hung:
            for start, length in self.kept:
                if length:
                    syscalls.munmap(start, length)
            self.kept.clear()

    def _caught_up(self) -> None:
        self.unmap_kept()
        for far in list(self.fars.values()):
            far.caught_up()

    # -- giving up --

    def press(self) -> None:
        """Somebody waits for what is late."""
        if not self._pressed:
            self._pressed = True
            self._lanes.background.start(self._give_up_in_time)

    def _patience(self) -> float:
        lately = trio.current_time() - self._given_up_at < REMEMBERED
        return LITTLE_PATIENCE if lately else PATIENCE

    async def _give_up_in_time(self) -> None:
        try:
            while any(far.is_needed for far in self.fars.values()):
                hanging = self.lane.hanging(self._patience())
                if hanging is not None:
                    self._give_up_what_hangs(hanging)
                await trio.sleep(LOOK_SECONDS)
        finally:
            self._pressed = False

    def _give_up_what_hangs(self, hanging: Request) -> None:
        if isinstance(hanging.owner, Far):
            self.give_up(hanging.owner)
        self.lane.leave_behind(hanging)
        if self.lane.is_lost:
            for far in list(self.fars.values()):
                if far.is_needed:
                    self.give_up(far)

    def give_up(self, far: Far) -> None:
        """It is a sharer no more, and lives no more."""
        if not far.is_over:
            self._given_up_at = trio.current_time()
            far.give_up()
            if far.sharer is not None:
                self._lanes.give_up(far.sharer)

    def close(self, far: Far, key: int) -> None:
        """Of a userfaultfd that nobody uses any more."""
        self.fars.pop(key, None)
        self.lane.close(far, key)
        self.end_in_time()

    def end_in_time(self) -> None:
        """If nobody needs it any more."""
        if not self.fars and not self._ends:
            self._ends = True
            self._lanes.background.start(self._lanes.end_if_idle, self)

    def needed(self) -> None:
        """It does not end now, as it would have."""
        self._ends = False


class Lanes:
    """Who has a lane."""

    def __init__(
        self,
        owner: int | None,
        reader: uffd.Reader,
        background: Background,
        give_up: Callable[[Sharer], None],
    ) -> None:
        """`owner`: whose pager it is; None if nobody needs a lane.

        `give_up` ends a sharer that cannot be brought to what its region is.
        """
        self._owner = owner
        self._reader = reader
        self.background = background
        self._give_up = give_up
        self._users: dict[int, User] = {}
        self._seldom = Seldom()
        self._fetching = FETCH_ALL_SECONDS
        self.idle_seconds = IDLE_SECONDS

    def needs_one(self, uid: int) -> bool:
        """Whether calls on that user's processes are made by a lane."""
        return self._owner is not None and uid not in (0, self._owner)

    def _user(self, uid: int) -> User:
        user = self._users.get(uid)
        if user is None:
            if len(self._users) >= MOST_LANES:
                raise OSError(errno.EAGAIN, "processes of too many users")
            try:
                user = self._users[uid] = User(self, uid, self._reader)
            except RuntimeError as error:
                raise OSError(
                    errno.EAGAIN, "no thread for calls on the user's processes"
                ) from error
        return user

    def take(self, uid: int, fd: int) -> Far:
        """A new sharer's userfaultfd; it is closed here, and the lane has it.

        Raises OSError, and then it is not closed: EBUSY when the user's processes hold up
        the lane, EAGAIN without another thread.
        """
        user = self._user(uid)
        if user.lane.unclosed >= MOST_UNCLOSED or user.lane.is_lost:
            raise OSError(errno.EBUSY, "processes of the user hold up calls on them")
        os.set_blocking(fd, False)
        return self._far(user, user.lane.hand_in(fd))

    async def fetch(self, sharer: Sharer, fetch: Callable[[], int], waiting: int = -1) -> Far:
        """The userfaultfd of a sharer that another pager had; `fetch` gets it, in the lane.

        `waiting`: a socket in which it lies, and stays; that is taken over.
        If that is late it may still come to nothing: then its address space is gone.
        Raises OSError, and what `fetch` raises.
        """
        try:
            user = self._user(sharer.uid)
            there = user.lane.hand_in(waiting) if waiting >= 0 else None
        except OSError:
            if waiting >= 0:
                os.close(waiting)
            raise
        far = self._far(user, user.lane.new_key())
        try:
            seconds = min(FETCH_SECONDS, self._fetching)
            if there is not None:
                came = await far.fetch_waiting(there, seconds)
            else:
                came = await far.fetch(fetch, seconds)
            if not came:
                self._fetching = max(0.0, self._fetching - FETCH_SECONDS)
        except BaseException:
            far.close()
            raise
        return far

    def dispose(self, uid: int, fds: list[int]) -> list[int]:
        """Have descriptors closed that a user has sent; those that were not taken."""
        while fds:
            try:
                user = self._user(uid)
                user.lane.close(None, user.lane.hand_in(fds[-1]))
            except OSError:
                return fds
            fds.pop()
            user.end_in_time()
        return fds

    async def lend(
        self, uid: int, fds: list[int], function: Callable[[list[int], Dispose], T]
    ) -> T:
        """Call `function` in the user's lane with duplicates of `fds`.

        It is given their numbers there, and how what it receives is closed.  Raises OSError:
        EBUSY when it is late, and then it is done later; what it raises; others, and then it
        is never done.
        """
        user = self._user(uid)
        lane, keys = user.lane, list[int]()
        try:
            for fd in fds:
                own = os.dup(fd)
                try:
                    keys.append(lane.hand_in(own))
                except OSError:
                    os.close(own)
                    raise
            return await lane.ask(
                None,
                lambda table: function([table[key] for key in keys], lane.let_go),
                ASKED_SECONDS,
            )
        except LateError as late:
            raise OSError(errno.EBUSY, "a process of the user holds up calls on it") from late
        finally:
            for key in keys:
                lane.close(None, key)
            user.end_in_time()

    def unclosed(self, uid: int) -> int:
        """How many descriptors of a user's wait to be closed."""
        user = self._users.get(uid)
        return 0 if user is None else user.lane.unclosed

    def _far(self, user: User, key: int) -> Far:
        far = user.fars[key] = Far(user, key)
        return far

    def give_up(self, sharer: Sharer) -> None:
        """See User."""
        if self._seldom.now(sharer.uid):
            log.warning(
                "process %d of user %d holds up calls on its address space, which cannot be "
                "brought to what region %s is: it is killed",
                sharer.pid,
                sharer.uid,
                sharer.region.label(),
            )
        self._give_up(sharer)

    async def end_if_idle(self, user: User) -> None:
        """End a lane that nobody needs any more, when it has nothing to do."""
        await trio.sleep(self.idle_seconds)
        while not user.fars:
            if not (user.lane.is_late or user.lane.hung or user.lane.unclosed):
                del self._users[user.uid]
                user.lane.stop()
                user.kept.append(user.zeros.withdraw())
                user.unmap_kept()
                return
            await trio.sleep(self.idle_seconds)
        user.needed()
