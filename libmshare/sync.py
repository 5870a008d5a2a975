"""Locks, semaphores and integers that lie in a region: for threads of all its processes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import operator
import os
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, SupportsIndex

from libmshare import core, errors, holding, waiting

_kept: Final[dict[int, holding.Memory]] = {}
"""The memory of the locks that threads of this process have, by address.

The C library has them in a list, and follows it: they must not be unmapped.
"""
os.register_at_fork(after_in_child=_kept.clear)  # a child has none of them


_MOST_AT_ONCE: Final = (1 << 31) - 1
_INTEGERS: Final = {
    f"{sign}int{8 * width}": (width, sign == "") for sign in ("", "u") for width in (1, 2, 4, 8)
}


def name_of(dtype: Any) -> str:
    """A type of integers as text: it may be that already, or numpy's."""
    return str(getattr(dtype, "name", getattr(dtype, "__name__", dtype)))


def width_of(dtype: Any) -> tuple[int, bool]:
    """Its bytes, and whether it has a sign.  Raises ValueError."""
    try:
        return _INTEGERS[name_of(dtype)]
    except KeyError:
        raise ValueError(f"{dtype!r} is none of {', '.join(_INTEGERS)}") from None


class Place(NamedTuple):
    """Where an object lies, and what keeps it mapped."""

    memory: holding.Memory
    address: int
    name: str
    again: tuple[Callable[..., Any], tuple[Any, ...]]
    """For pickle: what makes it in another process."""


class _Object:
    def __init__(self, place: Place) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._place.again

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._place.name!r} at {self._place.address:#x}>"


class Lock(_Object):
    """A lock of one thread at a time, in all processes.

    If who has it dies, or its thread ends, the next one is told: `OwnerDied`, and the lock is
    not had, until somebody has repaired what it guards, with ``region.lock(name,
    recover=True)``: such a lock is had all the same, and `owner_died` says so.  Leaving the
    ``with`` block without an exception, or release(), says that all is well again.
    """

    def __init__(self, place: Place, *, recover: bool) -> None:
        super().__init__(place)
        self._recover = recover
        self.owner_died = False
        """Whether whoever had the lock before this thread died with it."""

    def acquire(self, timeout: float | None = None) -> bool:
        """Whether the lock is had, after at most `timeout` seconds; 0 does not wait.

        Other threads run meanwhile, and signal handlers.
        Raises OwnerDied, Corrupt, and OSError with EDEADLK if this thread has it already.
        """
        held = ctypes.c_ubyte(0)
        place = self._place
        died = False
        try:
            try:
                waiting.until(
                    lambda wait: core.mshare_lock(place.address, wait, held, place.name), timeout
                )
            except errors.OwnerDied:
                if not self._recover:
                    raise
                died = True
            except errors.Busy:
                return False
            _kept[place.address] = place.memory
            self.owner_died = died
        except BaseException:
            if held:
                self._unlock()
            raise
        return True

    def release(self) -> None:
        """Leave it, and what it guards as it should be.  Raises RuntimeError, Corrupt."""
        self._leave(repaired=True)

    def _leave(self, *, repaired: bool) -> None:
        address = self._place.address
        try:
            if self.owner_died and repaired:
                core.mshare_repaired(address)
            self._unlock()
        except BaseException:  # of a signal handler, perhaps: it is left all the same
            with contextlib.suppress(RuntimeError, OSError):
                self._unlock()
            raise

    def _unlock(self) -> None:
        memory = _kept.pop(self._place.address, None)
        try:
            core.mshare_unlock(self._place.address, self._place.name)
        except OSError as error:
            if memory is not None:
                _kept[self._place.address] = memory
            if error.errno == errno.EPERM:
                raise RuntimeError("this thread does not have the lock") from None
            raise

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(repaired=kind is None)


class Semaphore(_Object):
    """A number that is never below 0.

    It belongs to nobody: what a process has taken that is killed stays taken.
    """

    def acquire(self, timeout: float | None = None) -> bool:
        """Whether one is taken, after at most `timeout` seconds; 0 does not wait.

        Other threads run meanwhile, and signal handlers.
        """
        place = self._place
        wait = partial(core.mshare_semaphore_wait, place.address)
        try:
            waiting.until(lambda milliseconds: wait(milliseconds, place.name), timeout)
        except errors.Busy:
            return False
        return True

    def release(self, count: SupportsIndex = 1) -> None:
        """Give so many.  Raises OSError (EOVERFLOW: more than 2 ** 31 - 1)."""
        number = operator.index(count)
        if number > _MOST_AT_ONCE:
            raise errors.of(errno.EOVERFLOW, "", self._place.name)
        core.mshare_semaphore_post(self._place.address, number, self._place.name)

    @property
    def value(self) -> int:
        """How many there are just now."""
        return core.mshare_atomic(core.Operation.LOAD, self._place.address, 4)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Atomic(_Object):
    """An integer that all processes change in one step; it wraps around as in C."""

    def __init__(self, place: Place, width: int, *, signed: bool, readonly: bool) -> None:
        super().__init__(place)
        self._width = width
        self._signed = signed
        self._readonly = readonly

    def _do(
        self, operation: core.Operation, value: SupportsIndex = 0, expected: SupportsIndex = 0
    ) -> int:
        if self._readonly and operation != core.Operation.LOAD:
            raise errors.AccessDenied(errno.EACCES, "the region is read-only", self._place.name)
        mask = (1 << 8 * self._width) - 1
        before = core.mshare_atomic(
            operation,
            self._place.address,
            self._width,
            operator.index(value) & mask,
            operator.index(expected) & mask,
        )
        is_negative = self._signed and before >> (8 * self._width - 1)
        return before - mask - 1 if is_negative else before

    def load(self) -> int:
        """What it is."""
        return self._do(core.Operation.LOAD)

    def store(self, value: SupportsIndex) -> None:
        """Have it be that.  Raises AccessDenied, as all that follow."""
        self._do(core.Operation.EXCHANGE, value)

    def exchange(self, value: SupportsIndex) -> int:
        """Have it be that; what it was."""
        return self._do(core.Operation.EXCHANGE, value)

    def add(self, value: SupportsIndex = 1) -> int:
        """Add to it; what it was before."""
        return self._do(core.Operation.ADD, value)

    def bit_and(self, value: SupportsIndex) -> int:
        """Keep those bits; what it was before."""
        return self._do(core.Operation.AND, value)

    def bit_or(self, value: SupportsIndex) -> int:
        """Set those bits; what it was before."""
        return self._do(core.Operation.OR, value)

    def bit_xor(self, value: SupportsIndex) -> int:
        """Change those bits; what it was before."""
        return self._do(core.Operation.XOR, value)

    def compare_exchange(self, expected: SupportsIndex, value: SupportsIndex) -> bool:
        """Have it be `value` if it is `expected`: whether it was."""
        mask = (1 << 8 * self._width) - 1
        before = self._do(core.Operation.COMPARE_EXCHANGE, value, expected)
        return before & mask == operator.index(expected) & mask

    def __int__(self) -> int:
        return self.load()
