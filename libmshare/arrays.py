"""numpy arrays over regions.

Sent to another process by multiprocessing or concurrent.futures, an array or a memoryview
that lies in a region travels as what it is: a region's identity, and where in it.  Other
pickles hold the contents, as always: they may go to a disk, or to another machine; but those
of by_reference() do not.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from libmshare import errors, holding
from libmshare.region import Identity, unpickle

_ORDERS: Final = ("C", "F")
_CASTS: Final = frozenset("cbB?hHiIlLqQnNefdP")
"""Formats that memoryview.cast() knows (struct)."""
_T = TypeVar("_T", bound=np.generic)


def _extents(
    shape: SupportsIndex | Sequence[SupportsIndex], kind: np.dtype[Any], order: str
) -> tuple[int, ...]:
    """The shape as a tuple, if an array may have it.  Raises ValueError, TypeError."""
    if kind.hasobject:
        raise ValueError("Python objects are of one process alone, and cannot lie in a region")
    if order not in _ORDERS:
        raise ValueError("order is 'C' or 'F'")
    extents = shape if isinstance(shape, Iterable) else (shape,)
    dimensions = tuple(operator.index(extent) for extent in extents)
    if any(extent < 0 for extent in dimensions):
        raise ValueError("an array has no negative dimensions")
    return dimensions


def size_of(shape: SupportsIndex | Sequence[SupportsIndex], kind: np.dtype[Any], order: str) -> int:
    """The bytes of such an array.  Raises ValueError, TypeError."""
    return kind.itemsize * math.prod(_extents(shape, kind, order))


def over(
    buffer: memoryview,
    shape: SupportsIndex | Sequence[SupportsIndex],
    dtype: DTypeLike,
    offset: int,
    order: str,
) -> NDArray[Any]:
    """An array over the bytes of `buffer` from `offset` on.  Raises ValueError."""
    kind = np.dtype(dtype)
    dimensions = _extents(shape, kind, order)
    needed = kind.itemsize * math.prod(dimensions)
    if offset < 0 or offset + needed > buffer.nbytes:
        raise ValueError(
            f"{needed} bytes at offset {offset} do not lie in a region of {buffer.nbytes}"
        )
    part = buffer[offset : offset + needed]
    return np.ndarray(dimensions, kind, part, order="F" if order == "F" else "C")


def _bounds(array: NDArray[Any]) -> tuple[int, int]:
    """The addresses of its first byte, and of the one behind its last."""
    low = high = int(array.__array_interface__["data"][0])
    for extent, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (extent - 1) * stride
        else:
            high += (extent - 1) * stride
    return low, high + array.itemsize


class ByReference(np.ndarray[Any, np.dtype[Any]]):
    """An array that travels by reference in every pickle, if it lies in a region.

    What is computed of it is a plain array, or a number, as of numpy.memmap.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return _reduce(self, rebuild_referring) or super().__reduce_ex__(protocol)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: Any = False) -> Any:  # noqa: FBT002 - as numpy calls it
        if array is self:
            return array
        plain = np.asarray(array).view(np.ndarray)
        return plain[()] if return_scalar or not plain.ndim else plain


def by_reference(array: NDArray[_T]) -> NDArray[_T]:
    """The same array for libraries that pickle in their own way, as joblib does.

    Any pickle of it, or of a view of it, says where it lies, and not what is in it.
    Raises ValueError if it does not lie in a region.
    """
    if _reduce(array, rebuild) is None:
        raise ValueError("the array does not lie in a region of this process")
    return array.view(ByReference)


Where = tuple[Identity, str, bool, int, int]
"""A region, its name, whether it is only read here; an offset and a length in bytes."""


def reference(low: int, high: int) -> Where | None:
    """What rebuild() and its like find the bytes by, if they lie in a region; by addresses."""
    found = holding.holding(low, high) if high > low else None
    if found is None:
        return None
    hold, _ = found
    region = hold.region
    identity = Identity(bytes(region.identity).hex(), region.root.decode())
    return identity, hold.name, not region.writable, low - region.start, high - low


def bytes_of(where: Where, *, readonly: bool) -> memoryview:
    """The bytes that reference() told of.

    The region is attached as it was: who only reads one array of it may write another one, and
    a process has it attached once.  Unless this user may only read it.
    """
    identity, name, only_read, offset, length = where
    try:
        region = unpickle(identity, name, only_read)
    except errors.AccessDenied:
        if not readonly or only_read:
            raise
        region = unpickle(identity, name, True)
    with region:
        found = region.buf[offset : offset + length]
    return found.toreadonly() if readonly else found


def rebuild(
    where: Where,
    readonly: bool,  # noqa: FBT001 - from a tuple
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """The array that _reduce() took apart; for pickle."""
    return np.ndarray(shape, dtype, bytes_of(where, readonly=readonly), offset, strides)


def rebuild_referring(*parts: Any) -> NDArray[Any]:
    """The same, which goes on by reference; for pickle."""
    return rebuild(*parts).view(ByReference)


def rebuild_as(kind: type[NDArray[Any]], *parts: Any) -> NDArray[Any]:
    """The same, of a class of its own: recarray, matrix; for pickle."""
    return rebuild(*parts).view(kind)


def rebuild_masked(
    data: NDArray[Any], mask: NDArray[Any] | None, fill_value: Any, hard: Any
) -> NDArray[Any]:
    """A masked array, whose data lies in a region; for pickle."""
    if mask is None:
        return np.ma.MaskedArray(data, fill_value=fill_value, hard_mask=bool(hard))
    return np.ma.MaskedArray(data, mask=mask, fill_value=fill_value, hard_mask=bool(hard))


def rebuild_view(*parts: Any) -> memoryview:
    """A memoryview of such an array; for pickle."""
    return rebuild(*parts).data


def rebuild_buffer(
    where: Where,
    readonly: bool,  # noqa: FBT001 - from a tuple
    kind: str,
    shape: tuple[int, ...],
) -> memoryview:
    """The memoryview that _reduce_buffer() took apart; for pickle."""
    found = bytes_of(where, readonly=readonly)
    return found.cast(kind, shape)  # type: ignore[call-overload, no-any-return] # any kind


def _reduce(array: NDArray[Any], by: Callable[..., object]) -> Any:
    """How pickle has `by` make it again, if it lies in a region."""
    if not array.size or array.dtype.hasobject:
        return None
    low, high = _bounds(array)
    where = reference(low, high)
    if where is None:
        return None
    at = int(array.__array_interface__["data"][0]) - low
    readonly = not array.flags.writeable
    return by, (where, readonly, at, array.shape, array.strides, array.dtype)


def _reduce_array(array: NDArray[Any]) -> Any:
    return _reduce(array, rebuild) or array.__reduce__()


def _reduce_kind(array: NDArray[Any]) -> Any:
    found = _reduce(array, rebuild_as)
    return array.__reduce__() if found is None else (found[0], (type(array), *found[1]))


def _reduce_masked(array: np.ma.MaskedArray[Any, Any]) -> Any:
    data = np.asarray(np.ma.getdata(array))
    if _reduce(data, rebuild) is None:
        return array.__reduce__()
    mask = np.ma.getmask(array)
    parts = None if mask is np.ma.nomask else mask
    return rebuild_masked, (data, parts, array.fill_value, array.hardmask)


def _reduce_buffer(view: memoryview) -> Any:
    found = None
    if view.nbytes and view.c_contiguous and view.format in _CASTS:
        low = int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
        where = reference(low, low + view.nbytes)
        if where is not None:
            found = rebuild_buffer, (where, view.readonly, view.format, view.shape)
    elif view.nbytes:
        with contextlib.suppress(ValueError):  # of a format that numpy does not know
            found = _reduce(np.asarray(view), rebuild_view)
    if found is None:
        raise TypeError("a memoryview that does not lie in a region cannot be pickled")
    return found


ForkingPickler.register(np.ndarray, _reduce_array)
ForkingPickler.register(np.recarray, _reduce_kind)
ForkingPickler.register(np.matrix, _reduce_kind)
ForkingPickler.register(np.ma.MaskedArray, _reduce_masked)
ForkingPickler.register(memoryview, _reduce_buffer)
