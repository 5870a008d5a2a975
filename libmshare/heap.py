"""The heap of a region, as arrays."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from libmshare import arrays, core, errors, waiting

_T = TypeVar("_T")
_WORTH_IT: Final = 1 << 20
"""From so many bytes on, memory of the system's zeros is had, and not written."""

_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_NEW: Final = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | core.MAP_FIXED


class Heap:
    """What a region's methods need to give out arrays of it."""

    def __init__(self, region: core.OpenRegion, name: str, buffer: memoryview) -> None:
        self._region = region
        self._name = name
        self._buffer = buffer

    def empty(
        self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: DTypeLike, order: str
    ) -> NDArray[Any]:
        """An array of anything.  Raises ValueError, OSError."""
        kind = np.dtype(dtype)
        size = arrays.size_of(shape, kind, order)
        address = self._wait(partial(core.mshare_alloc, self._region, size, kind.alignment))
        try:
            return arrays.over(self._buffer, shape, kind, address - self._region.start, order)
        except BaseException:
            self._wait(partial(core.mshare_free, self._region, address))
            raise

    def zeros(
        self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: DTypeLike, order: str
    ) -> NDArray[Any]:
        """An array of zeros.  Raises ValueError, OSError."""
        array = self.empty(shape, dtype, order)
        low, high = _span(array)
        page = mmap.PAGESIZE
        first, end = -(-low // page) * page, high // page * page
        undo = partial(self.free, array)
        if array.nbytes < _WORTH_IT or not waiting.interruptible(partial(_fresh, first, end), undo):
            first = end = high
        try:
            bytes_of = self._buffer[low - self._region.start : high - self._region.start]
            for begin, stop in ((low, first), (end, high)):
                np.frombuffer(bytes_of[begin - low : stop - low], np.uint8)[:] = 0
        except BaseException:
            undo()
            raise
        return array

    def copy_in(self, source: ArrayLike) -> NDArray[Any]:
        """A copy in the region, in the order of what is copied.  Raises ValueError, OSError."""
        given = np.asarray(source)
        order = "F" if given.flags.fnc else "C"
        array = self.empty(given.shape, given.dtype, order)
        try:
            array[...] = given
        except BaseException:
            self.free(array)
            raise
        return array

    def full(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        value: ArrayLike,
        dtype: DTypeLike | None,
        order: str,
    ) -> NDArray[Any]:
        """An array of one value.  Raises ValueError, OSError."""
        array = self.empty(shape, np.asarray(value).dtype if dtype is None else dtype, order)
        try:
            array[...] = value
        except BaseException:
            self.free(array)
            raise
        return array

    def free(self, array: NDArray[Any] | memoryview) -> None:
        """Give a piece back.  Raises OSError (EINVAL: it begins no piece)."""
        array = np.frombuffer(array, np.uint8) if isinstance(array, memoryview) else array
        low, _ = _span(array)
        give = partial(self._wait, partial(core.mshare_free, self._region, low))
        if array.nbytes < _WORTH_IT:
            give()
        else:  # the daemon is asked
            waiting.interruptible(give)

    def check(self) -> core.HeapInfo:
        """Whether it is whole, and what is in use.  Raises Corrupt."""
        return self._wait(partial(core.mshare_heap_check, self._region))

    def _wait(self, call: Callable[[int, str], _T]) -> _T:
        return waiting.until(lambda wait: call(wait, self._name), waiting.PATIENCE)


def _fresh(first: int, end: int) -> bool:
    """New memory there, of zeros; False for huge pages, which are larger."""
    try:
        core.mshare_mmap(first, end - first, _READ_WRITE, _NEW)
    except errors.MshareError:
        return False
    return True


def _span(array: NDArray[Any]) -> tuple[int, int]:
    low = int(array.__array_interface__["data"][0])
    return low, low + array.nbytes
