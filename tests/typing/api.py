"""What a type checker sees of libmshare; `make lint` checks it, and nothing runs it.

As users have it, installed, client/test_types.py has it checked by mypy and pyright.  What must
be an error says so, and an ignored error that is none is one.
"""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import libmshare
from libmshare import Identity, Pin, Region


def arrays(region: Region) -> None:
    assert_type(region.ndarray(10), NDArray[np.float64])
    assert_type(region.ndarray(10, np.int64), NDArray[np.int64])
    assert_type(region.ndarray((2, np.int64(3)), np.dtype(np.uint8)), NDArray[np.uint8])
    assert_type(region.ndarray([2, 3], "i4"), NDArray[Any])
    right: NDArray[np.int64] = region.ndarray(10, np.int64)
    wrong: NDArray[np.float64] = region.ndarray(10, np.int64)  # type: ignore[arg-type]
    del right, wrong
    region.ndarray(10.0)  # type: ignore[call-overload]


def travel(region: Region) -> None:
    sent = libmshare.by_reference(region.ndarray(10, np.int64))
    assert_type(sent, NDArray[np.int64])
    libmshare.by_reference([1, 2])  # type: ignore[arg-type]


def pieces(region: Region) -> None:
    assert_type(region.empty(10), NDArray[np.float64])
    assert_type(region.empty((2, 3), np.int32), NDArray[np.int32])
    assert_type(region.zeros(10, "u1"), NDArray[Any])
    wrong: NDArray[np.float64] = region.zeros(10, np.int64)  # type: ignore[arg-type]
    del wrong
    assert_type(region.free(region.copy_in([1, 2])), None)
    with region.lock("l", recover=True) as lock:
        assert_type(lock, libmshare.Lock)
        assert_type(lock.owner_died, bool)
    assert_type(region.semaphore("s", 3).acquire(timeout=1.5), bool)
    assert_type(region.atomic("n").add(1), int)
    assert_type(region.atomic(region.zeros(3, np.int32)[0:1]), libmshare.Atomic)
    region.lock(5)  # type: ignore[arg-type]


def regions() -> None:
    with Region.create("name", "64M", exist_ok=True, mode=0o640) as region:
        assert_type(region, Region)
        assert_type(region.buf, memoryview)
        assert_type(region[0], int)
        assert_type(region[0:5], memoryview)
        assert_type(len(region), int)
        assert_type(region.identity, Identity)
        assert_type(region.pin(), Pin)
        assert_type(region.unlink(), None)
    assert_type(Region.attach("name", readonly=True), Region)
    assert_type(Region.attach(region.identity), Region)
    Region.attach(b"name")  # type: ignore[arg-type]
    Region.create("name", 1.5)  # type: ignore[arg-type]
    assert_type(libmshare.alignment(), int)
    assert_type(libmshare.__version__, str)
    libmshare.nonsense  # type: ignore[attr-defined] # noqa: B018 - what is not there is an error


def failures() -> None:
    try:
        Region.attach("name")
    except libmshare.Stale as error:
        assert_type(error.errno, int | None)
