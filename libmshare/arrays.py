"""numpy arrays over regions.

Sent to another process by multiprocessing or concurrent.futures, an array or a memoryview
that lies in a region travels as what it is: a region's identity, and where in it.  Other
pickles hold the contents, as always: they may go to a disk, or to another machine.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike, NDArray

from libmshare import holding
from libmshare.region import Identity, unpickle

_ORDERS: Final = ("C", "F")


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


def _reference(low: int, high: int, *, readonly: bool) -> tuple[Any, ...] | None:
    """What rebuild() and rebuild_buffer() find the bytes by, if they lie in a region."""
    found = holding.holding(low, high) if high > low else None
    if found is None:
        return None
    hold, _ = found
    region = hold.region
    identity = Identity(bytes(region.identity).hex(), region.root.decode())
    return identity, hold.name, readonly, low - region.start, high - low


def _bytes(
    identity: Identity,
    name: str,
    readonly: bool,  # noqa: FBT001 - from a tuple
    offset: int,
    length: int,
) -> memoryview:
    with unpickle(identity, name, readonly) as region:
        return region.buf[offset : offset + length]


def rebuild(
    reference: tuple[Identity, str, bool, int, int],
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    """The array that _reduce_array() took apart; for pickle."""
    return np.ndarray(shape, dtype, _bytes(*reference), offset, strides)


def rebuild_buffer(
    reference: tuple[Identity, str, bool, int, int], kind: str, shape: tuple[int, ...]
) -> memoryview:
    """The memoryview that _reduce_buffer() took apart; for pickle."""
    return _bytes(*reference).cast(kind, shape)  # type: ignore[call-overload, no-any-return] # any


def _reduce_array(array: NDArray[Any]) -> Any:
    if array.size and not array.dtype.hasobject:
        low, high = _bounds(array)
        reference = _reference(low, high, readonly=not array.flags.writeable)
        if reference is not None:
            at = int(array.__array_interface__["data"][0]) - low
            return rebuild, (reference, at, array.shape, array.strides, array.dtype)
    return array.__reduce__()


def _reduce_buffer(view: memoryview) -> Any:
    if view.c_contiguous and view.nbytes:
        low = int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
        reference = _reference(low, low + view.nbytes, readonly=view.readonly)
        if reference is not None:
            return rebuild_buffer, (reference, view.format, view.shape)
    raise TypeError("a memoryview that does not lie in a region cannot be pickled")


ForkingPickler.register(np.ndarray, _reduce_array)
ForkingPickler.register(memoryview, _reduce_buffer)
