"""Questions that may never be answered.

A process can hold the lock of its own address space for as long as it likes, and whoever
reads its `maps` waits in the kernel, where only SIGKILL ends that.  So whatever waits for
a process's lock is done by a thread, with a deadline.  A thread that has neither come back by
then nor done anything is left behind; when the lock is released it ends by itself, and if
the program ends first, the kernel ends it.  There are never more than `MOST_LEFT` of those, nor
more than `MOST_OF_ONE` for the same user's processes, so that others are still looked at.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

MOST_LEFT: Final = 16
MOST_OF_ONE: Final = 4
WORKING: Final = 0.05
"""A thread that has used less than so much of the time that it had waits for something."""


class NoAnswerError(OSError):
    """It took too long; the thread that asked is left behind."""


class NotAskedError(NoAnswerError):
    """Too many threads are left behind already."""


class Patience:
    """Has functions called by a thread of its own, one after the other.

    Synchronization: for one thread.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds`: how long a call may take that does nothing; work may take longer."""
        self.seconds = seconds
        self._questions: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._left: list[tuple[threading.Thread, int | None]] = []
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[..., T], *arguments: Any, whose: int | None = None) -> T:
        """What the function returns or raises.  Raises NoAnswerError.

        `whose`: the user of the process that is asked.
        """
        answers: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def question() -> None:
            try:
                answers.put((True, function(*arguments)))
            except BaseException as error:  # noqa: BLE001 - it is raised again where it was asked
                answers.put((False, error))

        self._asker(whose).put(question)
        used = self._used()
        while True:
            try:
                done, value = answers.get(timeout=self.seconds)
                break
            except queue.Empty:
                before, used = used, self._used()
                if used - before < self.seconds * WORKING:
                    self._leave(whose)
                    raise NoAnswerError(f"no answer within {self.seconds:g} s") from None
        if not done:
            raise value
        answer: T = value
        return answer

    def _used(self) -> float:
        """The processor time of the thread (seconds)."""
        assert self._thread is not None
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def close(self) -> None:
        """Have the thread end."""
        if self._questions is not None:
            self._questions.put(None)
        self._questions = self._thread = None

    def _asker(self, whose: int | None) -> queue.SimpleQueue[Callable[[], None] | None]:
        self._left = [each for each in self._left if each[0].is_alive()]
        if whose is not None and sum(of == whose for _, of in self._left) >= MOST_OF_ONE:
            raise NotAskedError(f"{MOST_OF_ONE} processes of user {whose} do not answer already")
        if self._questions is None:
            if len(self._left) >= MOST_LEFT:
                raise NotAskedError(f"{MOST_LEFT} processes hold their address spaces already")
            self._questions = queue.SimpleQueue()
            self._thread = threading.Thread(
                target=_answer, args=(self._questions,), name="patience", daemon=True
            )
            self._thread.start()
        return self._questions

    def _leave(self, whose: int | None) -> None:
        assert self._thread is not None
        self._left.append((self._thread, whose))
        self.close()


def _answer(questions: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (question := questions.get()) is not None:
        question()
