"""Turns by user: who asks more often does not get more.

Trio runs tasks in turn, so a user with a hundred requests would have a hundred turns where
another has one.  Whoever works for a user's request says so here.  A user who has used up
a slice of the thread's time waits in line with other such users, one slice each in turn;
who has not goes first, without waiting.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterator
from functools import partial
from types import coroutine
from typing import Final, TypeVar, TypeVarTuple

import trio

R = TypeVar("R")
Ts = TypeVarTuple("Ts")

SLICE_SECONDS: Final = 0.002
"""How long one user goes on while others may wait.

Time as it passes: to ask for the thread's own would be a system call at each step.  Whose step
loses the processor meanwhile stands in line for it once.
"""


class _Turn:
    """`async with` it; a class, because each file-system request makes one."""

    __slots__ = ("_since", "_turns", "_uid")

    def __init__(self, turns: Turns, uid: int) -> None:
        self._turns = turns
        self._uid = uid
        self._since = 0.0

    async def __aenter__(self) -> None:
        if not self._turns.may_begin(self._uid):
            await self._turns.wait(self._uid)
        self._since = time.perf_counter()

    async def __aexit__(self, *_: object) -> None:
        self._turns.spent(self._uid, time.perf_counter() - self._since)


@coroutine
def _stepwise(
    work: Coroutine[object, object, R], spent: Callable[[float], None]
) -> Generator[object, object, R]:
    """Await `work`, and tell what each of its steps has used."""
    answer: object = None
    failure: BaseException | None = None
    while True:
        since = time.perf_counter()
        try:
            question = work.send(answer) if failure is None else work.throw(failure)
        except StopIteration as end:
            result: R = end.value
            return result
        finally:
            spent(time.perf_counter() - since)
        answer = failure = None
        try:
            answer = yield question
        except BaseException as error:  # noqa: BLE001 - it is for who works
            failure = error


class Turns:
    """The turns of one thread."""

    def __init__(self) -> None:
        self._spent: dict[int, float] = {}
        """Of those who have worked since nobody was in line."""
        self._line: dict[int, deque[trio.Event]] = {}
        self._work = trio.Event()

    def turn(self, uid: int) -> _Turn:
        """Work for a user when it is its turn.  Nothing in there may await."""
        return _Turn(self, uid)

    @contextlib.contextmanager
    def counted(self, uid: int) -> Iterator[None]:
        """As `turn`, for who has found out that it may begin."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self.spent(uid, time.perf_counter() - since)

    async def work(
        self,
        uid: int,
        function: Callable[[*Ts], Coroutine[object, object, R]],
        *args: *Ts,
    ) -> R:
        """Await `function(*args)` when it is the user's turn; all its time counts.

        It may await: others' time is not counted.
        """
        if not self.may_begin(uid):
            await self.wait(uid)
        return await _stepwise(function(*args), partial(self.spent, uid))

    def may_begin(self, uid: int) -> bool:
        """Whether the user has not to wait."""
        return uid not in self._line and self._spent.get(uid, 0.0) <= SLICE_SECONDS

    def spent(self, uid: int, seconds: float) -> None:
        """It has worked for so long."""
        self._spent[uid] = self._spent.get(uid, 0.0) + seconds

    async def wait(self, uid: int) -> None:
        """Stand in line."""
        event = trio.Event()
        line = self._line.setdefault(uid, deque())
        line.append(event)
        self._work.set()
        try:
            await event.wait()
        except BaseException:
            with contextlib.suppress(ValueError):
                line.remove(event)
            raise

    async def run(self) -> None:
        """Give turns; forever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while self._line:
                for uid in list(self._line):
                    await self._slice(uid)
            # Who is not in line has not asked for more than there was.
            self._spent.clear()

    async def _slice(self, uid: int) -> None:
        line = self._line[uid]
        self._spent[uid] = 0.0
        while line and self._spent[uid] <= SLICE_SECONDS:
            line.popleft().set()
            await trio.lowlevel.checkpoint()  # it works now, and who is new has asked
        if not line:
            del self._line[uid]
