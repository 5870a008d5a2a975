"""`Region`: a region for people."""

from __future__ import annotations

import contextlib
import errno
import mmap
import operator
import os
import secrets
import stat
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    NamedTuple,
    Protocol,
    Self,
    SupportsIndex,
    TypeVar,
    overload,
)

from libmshare import core, errors, holding, sync, touching, waiting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from libmshare.heap import Heap
    from libmshare.images.push import Pushed

    _T = TypeVar("_T", bound=np.generic)
else:  # numpy is optional, and typing.get_type_hints() wants names
    NDArray, DTypeLike, ArrayLike, Heap, Pushed = Sequence, Any, Any, Any, Any

_UNITS: Final = {unit: 1 << (10 * power) for power, unit in enumerate("BKMGTPE")}
_DEFAULT_MODE: Final = 0o600
_ADDRESSES: Final = 1 << 63
"""ctypes would take a larger number for what its lower bits say."""
_MOST_POSTED: Final = (1 << 31) - 1
_METHODS: Final = {
    core.Kind.LOCK: "lock",
    core.Kind.SEMAPHORE: "semaphore",
    core.Kind.INTEGER: "atomic",
}


class SupportsFileno(Protocol):
    """An open file, or the like."""

    def fileno(self) -> int:
        """The descriptor."""


class Identity(NamedTuple):
    """Which region it is, whatever it is called: no other one ever has the same."""

    id: str
    """128 bits, as hexadecimal digits."""
    root: str
    """Where its msharefs is mounted."""


class Pin:
    """Keeps a region's memory mapped: for addresses, of which nobody sees that they are used."""

    def __init__(self, memory: holding.Memory, address: int, length: int) -> None:
        self._memory: holding.Memory | None = memory
        self.address = address
        self.length = length

    def release(self) -> None:
        """The addresses are not used any more.  Twice is fine."""
        self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def parse_size(size: SupportsIndex | str) -> int:
    """Bytes: a number, or a text as "64M", "1.5G" (powers of 1024).  Raises ValueError."""
    if not isinstance(size, str):
        if not 0 < (number := operator.index(size)) < _ADDRESSES:
            raise ValueError("a region's size is at least a byte, and less than 8 EiB")
        return number
    text = size.strip().upper().removesuffix("B").removesuffix("I")
    unit = text[-1:] if text[-1:] in _UNITS else "B"
    try:
        value = float(text.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        raise ValueError(f"{size!r} is no size: write 4096, '64M' or '1.5G'") from None
    if not 0 < value < _ADDRESSES or value != int(value):
        raise ValueError(f"{size!r} is no size: it is a whole number of bytes, and not 0")
    return int(value)


_OURS: Final = frozenset({"_hold", "_memory", "_name", "_readonly", "_warn"})
"""What an object has of ours, and does not travel."""


class Region:
    """A region of memory that lies at one address in every process that attached it.

    ``Region.create("name", "64M")`` makes one, filled with zeros; ``Region.attach("name")``
    attaches it.  A region is what its `identity` says, not its name: pickled, it travels as
    that, and what is unpickled is the same region or `Stale`.

    The memory stays mapped as long as anything of this process shows it: this object, a buffer
    (`buf`), an array.  ``close()``, or the end of the ``with`` block, gives up this object's
    part; the region stays under its name, as a file does, until ``unlink()``.

    Synchronization: a region's bytes are shared memory, with no locks but those that the
    programs agree on.  All methods may be called from any thread.  Who touches a page for the
    first time waits for the daemon, and may hold the interpreter lock meanwhile: `populate()`
    does not.
    """

    _hold: holding.Hold
    _memory: holding.Memory | None = None
    _warn = False

    def __init__(self, *_: object, **__: object) -> None:
        """Not to be called: Region.create() or Region.attach().  Raises TypeError."""
        raise TypeError("Region.create(name, size) makes a region, Region.attach(name) attaches it")

    @classmethod
    def _of(cls, hold: holding.Hold, memory: holding.Memory, *, readonly: bool) -> Self:
        made = object.__new__(cls)
        made._hold = hold
        made._readonly = readonly
        made._name = hold.name
        made._memory = memory
        return made

    _readonly: bool
    _name: str

    @classmethod
    def create(
        cls,
        name: str | None = None,
        size: SupportsIndex | str | None = None,
        *,
        exist_ok: bool = False,
        start: SupportsIndex | None = None,
        mode: int | None = None,
        backing: str | None = None,
        readonly: bool = False,
        empty: bool = False,
        donate: bool = False,
        ephemeral: bool = False,
        reserve: bool = False,
        heap: bool = False,
    ) -> Self:
        """Make a region of `size` bytes, filled with zeros.

        `name`: without one it gets one that nobody has.
        `size`: a number, or a text as "64M".
        `exist_ok`: attach the one of that name if there is one; it has to be as asked.
        `start`: its address, in bytes; by default the daemon chooses one where no other region
        is.  With it, address and size are multiples of `alignment()`.
        `mode`: of its file, 0o600 by default, less the umask.
        `backing`: "shm" or "hugetlb"; by default what $MSHARE_BACKING or the daemon says.
        `readonly`: nobody may ever write it.
        `empty`: nothing is mapped in it; mmap() does.
        `donate`: what this process has mapped in the range becomes the region's, contents kept.
        `ephemeral`: it has no name, and ends with its last user, however that ends; others get
        it pickled, or by its identity.
        `reserve`: all its memory is there when this returns, or it fails.
        `heap`: its memory is given out by empty(), zeros(), full() and copy_in(), and it has
        locks, semaphores and integers with names; all by whoever attaches it.

        Raises OSError, as errors.py has it (RegionExists, AddressTaken, NoMemory, Mismatch, ...),
        and ValueError or TypeError for arguments that make no sense.
        """
        if size is None:
            raise TypeError("say how large the region is: size=..., in bytes or as '64M'")
        _check_sense(
            {
                "empty and donate contradict each other": empty and donate,
                "reserve needs memory of its own that may be written": reserve
                and (empty or donate or readonly),
                "a heap needs memory of its own that may be written": heap
                and (empty or donate or readonly),
                "donate is about memory at an address: say start=...": donate and start is None,
                "exist_ok needs a name, and neither ephemeral nor donate": exist_ok
                and (name is None or ephemeral or donate),
                "start is an address: more than 0, and less than 2**63": start is not None
                and not 0 < operator.index(start) < _ADDRESSES,
                "mode is a file's, 0o600 for instance": mode is not None
                and not 0 <= operator.index(mode) <= 0o7777,
            }
        )
        length = parse_size(size)
        wanted = name if name is not None else f"py-{os.getpid()}-{secrets.token_hex(8)}"
        request = core.OpenRequest(
            name=core.encode(wanted),
            addr=None if start is None else operator.index(start),
            size=length,
            oflags=(os.O_RDONLY if readonly else os.O_RDWR)
            | os.O_CREAT
            | (0 if exist_ok else os.O_EXCL),
            mode=_DEFAULT_MODE if mode is None else mode,
            backing=None if backing is None else core.encode(backing),
            flags=core.EMPTY * empty | core.DONATE * donate | core.EPHEMERAL * ephemeral,
        )
        region = None
        if exist_ok:
            with contextlib.suppress(errors.NoSuchRegion):
                region = cls.attach(wanted, readonly=readonly)
        try:
            region = region if region is not None else cls._open(request, wanted, readonly=readonly)
        except errors.RegionExists:
            text = "the region exists: choose another name, attach() it, or say exist_ok=True"
            raise errors.RegionExists(errno.EEXIST, text, wanted) from None
        try:
            if not region._hold.region.created:
                waiting.interruptible(
                    partial(region._check_same, length, start, mode, backing, empty=empty)
                )
            if heap:
                core.mshare_heap(region._hold.region, wanted)
            if reserve:
                region.populate()
        except BaseException:
            if region._hold.region.created:
                region.unlink()
            region.close()
            raise
        region._warn = True
        return region

    @classmethod
    def attach(cls, which: str | Identity, *, readonly: bool = False) -> Self:
        """Attach the region of that name, or that identity, where it lies.

        Raises OSError, as errors.py has it (NoSuchRegion, Stale, AccessDenied, AddressTaken,
        NotMounted, DaemonGone, ...).
        """
        if isinstance(which, Identity):
            region = cls._attach_identity(which, "", readonly=readonly)
        else:
            request = core.OpenRequest(name=core.encode(which), oflags=_access(readonly=readonly))
            region = cls._open(request, which, readonly=readonly)
        region._warn = True
        return region

    @classmethod
    def pull(
        cls,
        url: str,
        name: str | None = None,
        *,
        backing: str | None = None,
        digest: str | None = None,
        abi: str | None = None,
        mode: int = _DEFAULT_MODE,
        wait: bool = True,
        progress: Callable[[int, int], object] | None = None,
    ) -> Region:
        """The region of an image in an object store: fetched, unless it is here already.

        It lies where the one lay that was pushed, with the same contents and protections.  All
        of it is there when this returns; others may attach it before, and what they touch is
        fetched first.  If it is here, pulled by this user or root, that one is attached; of
        several that pull it at one time one fetches.  If a pull of it was killed, this one goes
        on with what is left.

        `url`: of its manifest: s3://bucket/wiki.img, gs, az, http, https, file.  Credentials are
        the platform's, or those of sources.toml; see docs/beyond.md.
        `name`: by default the URL's last part, without ".img".
        `backing`: as for create().
        `digest`: which image it has to be, as push() told it; then a region that is here needs
        no store.
        `abi`: what the image has to say of its layout.
        `mode`: of the region's file.
        `wait`: False returns as soon as the region can be used, and another process of this
        user fills it; see `filled`.
        `progress`: told bytes, and of how many, again and again; not without `wait`.

        Raises ImageError for what the store has or does (its errno says which), RegionExists if
        the name is another region's, NoMemory if it does not fit, AddressTaken, ValueError, and
        OSError as create().  Then there is nothing new, but if another process has attached the
        region meanwhile: it waits for what it touches until somebody pulls the rest, or has
        SIGBUS if nobody does for a minute (fill_seconds of msharefsd).
        Needs obstore.
        """
        from libmshare.images.pull import name_of, pull  # noqa: PLC0415 - few need it, and its imports

        if not wait and progress is not None:
            raise ValueError("who does not wait is told of no progress")
        called = name_of(url) if name is None else name
        how = (backing, digest, abi, mode)
        if wait:
            region = pull(url, called, *how, progress=progress)
        else:
            from libmshare.images import fetcher  # noqa: PLC0415 - as above

            region = fetcher.attach(url, called, *how)
        region._warn = True
        return region

    @property
    def filled(self) -> bool:
        """Whether all that it is pulled from has come: nobody waits for any of it any more.

        Raises OSError if this process may not read what the mount tells of the region.
        """
        from libmshare.images.told import Told  # noqa: PLC0415 - as above

        self._opened()
        return Told(self).awaited() == 0

    def wait_filled(self, timeout: float | None = None) -> None:
        """Wait until it is filled, for up to so many seconds.

        Raises TimeoutError; ImageError (EIO) if nobody fills it any more; Stale if the region is
        gone; OSError as `filled`.
        """
        from libmshare.images.told import wait_filled  # noqa: PLC0415 - as above

        self._opened()
        wait_filled(self, timeout)

    def push(
        self,
        url: str,
        *,
        unsynchronized: bool = False,
        abi: str = "",
        progress: Callable[[int, int], object] | None = None,
    ) -> Pushed:
        """Write an image of the region to an object store, for pull(); what it is, comes back.

        What the store has already, of this or another image beside it, is not sent again.
        `unsynchronized`: although others may write the region meanwhile: what they write is in
        it, or is not.  `abi`: up to 128 characters that say how what is in it is laid out.
        The rest is as for pull().

        Raises Busy if others have it attached for writing, and it is not protected against that;
        ImageError; OSError.  Then no image is there that was not there before.
        """
        from libmshare.images.push import push  # noqa: PLC0415 - as above

        self._opened()
        more = {} if progress is None else {"progress": progress}
        return push(self, url, unsynchronized=unsynchronized, abi=abi, **more)

    @classmethod
    def _attach_identity(cls, which: Identity, name: str, *, readonly: bool) -> Self:
        request = core.OpenRequest(
            identity=bytes.fromhex(which.id),
            root=core.encode(which.root),
            oflags=_access(readonly=readonly),
        )
        called = name or which.id
        try:
            return cls._open(request, called, readonly=readonly)
        except errors.Stale:
            raise
        except FileNotFoundError:
            # Mounted elsewhere here, it may be; it is the same region or none.
            request.root = None
            return cls._open(request, called, readonly=readonly)

    @classmethod
    def _open(cls, request: core.OpenRequest, name: str, *, readonly: bool) -> Self:
        hold, memory = holding.open_region(request, name)
        return cls._of(hold, memory, readonly=readonly or not hold.region.writable)

    def _check_same(
        self,
        length: int,
        start: SupportsIndex | None,
        mode: int | None,
        backing: str | None,
        *,
        empty: bool,
    ) -> None:
        """Raises Mismatch unless the region that exists is what create() was asked for."""
        found = self._hold.region
        is_other = ""
        if length != found.length:
            is_other = f"it is {found.length} bytes"
        elif start is not None and operator.index(start) != found.start:
            is_other = f"it lies at {found.start:#x}"
        elif empty:
            is_other = "empty=True is about a new one"
        elif mode is not None:
            path = os.path.join(os.fsdecode(found.root), self._name)
            its = stat.S_IMODE(os.stat(path).st_mode)
            is_other = f"its mode is {its:#o}" if its & mode != its else ""
        if not is_other and backing is not None:
            with open(f"{os.fsdecode(found.root)}/.regions/{self._name}/info") as info:
                kinds = [line.split()[1] for line in info if line.startswith("backing:")]
            is_other = f"its backing is {kinds[0]}" if kinds and kinds[0] != backing else ""
        if is_other:
            raise errors.Mismatch(
                errno.EINVAL, f"the region exists, and {is_other}: attach() it", self._name
            )

    def _opened(self) -> holding.Memory:
        memory = self._memory
        if memory is None:
            raise ValueError("the region is closed")
        if self._hold.process != os.getpid():
            holding.check_after_fork(self._hold)
        return memory

    @property
    def name(self) -> str:
        """What the region was called when it was opened; an ephemeral one has no name now."""
        return self._name

    @property
    def identity(self) -> Identity:
        """Which region it is."""
        region = self._hold.region
        return Identity(bytes(region.identity).hex(), os.fsdecode(region.root))

    @property
    def start(self) -> int:
        """The region's address, the same in every process (bytes)."""
        self._opened()
        return self._hold.region.start

    @property
    def size(self) -> int:
        """The region's size in bytes."""
        self._opened()
        return self._hold.region.length

    @property
    def readonly(self) -> bool:
        """Whether this object only reads."""
        return self._readonly

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._memory is None

    @property
    def buf(self) -> memoryview:
        """The region's bytes, for as long as it lives."""
        view = memoryview(self._opened()).cast("B")
        return view.toreadonly() if self._readonly else view

    def __buffer__(self, flags: int) -> memoryview:
        """For memoryview() and its like, from Python 3.12 on."""
        return self.buf

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> memoryview: ...
    def __getitem__(self, key: SupportsIndex | slice) -> int | memoryview:
        return self.buf[key]

    def __setitem__(self, key: SupportsIndex | slice, value: Any) -> None:
        self.buf[key] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self.identity.id == other.identity.id

    def __hash__(self) -> int:
        return hash(self.identity.id)

    if TYPE_CHECKING:

        @overload
        def ndarray(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: type[_T] | np.dtype[_T],
            offset: SupportsIndex = 0,
            order: str = "C",
        ) -> NDArray[_T]: ...
        @overload
        def ndarray(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: type[float] = ...,
            offset: SupportsIndex = 0,
            order: str = "C",
        ) -> NDArray[np.float64]: ...
        @overload
        def ndarray(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: str | list[Any] | tuple[Any, ...] | type[bool | int | complex | bytes | str],
            offset: SupportsIndex = 0,
            order: str = "C",
        ) -> NDArray[Any]: ...  # a DTypeLike would accept np.int64 where float64 is wanted

    def ndarray(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike = float,
        offset: SupportsIndex = 0,
        order: str = "C",
    ) -> NDArray[Any]:
        """A numpy array over the region's bytes from `offset` on; it keeps them mapped.

        Sent to a process of multiprocessing or concurrent.futures it travels by reference.
        Raises ValueError if it does not fit.
        """
        from libmshare import arrays  # noqa: PLC0415 - numpy is optional

        return arrays.over(self.buf, shape, dtype, operator.index(offset), order)

    def _heap(self) -> Heap:
        """Its heap.  Raises AccessDenied if this object only reads."""
        from libmshare.heap import Heap as Given  # noqa: PLC0415 - numpy is optional

        buffer = self.buf
        if self._readonly:
            raise errors.AccessDenied(
                errno.EACCES, "this object only reads: its heap wants to be written", self._name
            )
        return Given(self._hold.region, self._name, buffer)

    if TYPE_CHECKING:

        @overload
        def empty(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: type[_T] | np.dtype[_T],
            order: str = "C",
        ) -> NDArray[_T]: ...
        @overload
        def empty(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: type[float] = ...,
            order: str = "C",
        ) -> NDArray[np.float64]: ...
        @overload
        def empty(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: str | list[Any] | tuple[Any, ...] | type[bool | int | complex | bytes | str],
            order: str = "C",
        ) -> NDArray[Any]: ...

    def empty(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike = float,
        order: str = "C",
    ) -> NDArray[Any]:
        """A new array in the region's heap, of anything; it is there until it is free()d.

        It takes whole KiB.  Raises NoMemory if no free piece is large enough, Busy if others are
        in the heap for a minute, Corrupt, AccessDenied, MshareError if the region has no heap,
        ValueError.
        """
        return self._heap().empty(shape, dtype, order)

    if TYPE_CHECKING:

        @overload
        def zeros(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: type[_T] | np.dtype[_T],
            order: str = "C",
        ) -> NDArray[_T]: ...
        @overload
        def zeros(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: type[float] = ...,
            order: str = "C",
        ) -> NDArray[np.float64]: ...
        @overload
        def zeros(
            self,
            shape: SupportsIndex | Sequence[SupportsIndex],
            dtype: str | list[Any] | tuple[Any, ...] | type[bool | int | complex | bytes | str],
            order: str = "C",
        ) -> NDArray[Any]: ...

    def zeros(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike = float,
        order: str = "C",
    ) -> NDArray[Any]:
        """The same, of zeros.  A large one takes memory when it is touched."""
        return self._heap().zeros(shape, dtype, order)

    def full(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        fill_value: ArrayLike,
        dtype: DTypeLike | None = None,
        order: str = "C",
    ) -> NDArray[Any]:
        """The same, of one value, and by default of its type."""
        return self._heap().full(shape, fill_value, dtype, order)

    def copy_in(self, array: ArrayLike) -> NDArray[Any]:
        """The same, a copy of an array."""
        return self._heap().copy_in(array)

    def free(self, array: NDArray[Any] | memoryview) -> None:
        """Give an array of empty() and its like back; any process may, once.

        Whatever still shows it shows memory that is somebody else's soon.
        Raises MshareError (EINVAL) if it is no such array, or is free already.
        """
        self._heap().free(array)

    def check_heap(self) -> core.HeapInfo:
        """Whether the heap is whole, and what is in use of it.  Raises Corrupt, and as empty()."""
        return self._heap().check()

    def _named(self, name: str, kind: core.Kind, value: int, **arguments: Any) -> sync.Place:
        memory, region = self._opened(), self._hold.region
        if self._readonly:
            raise errors.AccessDenied(
                errno.EACCES, "this object only reads: locks want to be written", name
            )
        address = waiting.until(
            lambda wait: core.mshare_named(region, name, kind, value, wait), waiting.PATIENCE
        )
        again = self._again(_METHODS[kind], name, **arguments)
        return sync.Place(memory, address, name, again)

    def _again(self, method: str, *where: Any, **arguments: Any) -> tuple[Any, tuple[Any, ...]]:
        """What pickle makes an object of this region with."""
        return unpickle_object, (self._which(), method, where, arguments)

    def lock(self, name: str, *, recover: bool = False) -> sync.Lock:
        """The lock of that name in the region, which has a heap; the first call makes it.

        `recover`: have it also if its owner died.  Raises as empty(), and RegionExists if a
        semaphore or an integer has that name, NoMemory if there are 1024 names.
        """
        return sync.Lock(self._named(name, core.Kind.LOCK, 0, recover=recover), recover=recover)

    def semaphore(self, name: str, value: SupportsIndex = 1) -> sync.Semaphore:
        """The semaphore of that name; `value` is that of a new one.

        Raises ValueError, and as lock().
        """
        number = operator.index(value)
        if not 0 <= number <= _MOST_POSTED:
            raise ValueError(f"a semaphore is 0 to {_MOST_POSTED}, not {number}")
        return sync.Semaphore(self._named(name, core.Kind.SEMAPHORE, number))

    def atomic(
        self, where: str | SupportsIndex | NDArray[Any], dtype: Any = "int64"
    ) -> sync.Atomic:
        """An integer of the region that processes change in one step.

        `where`: a name, of a region with a heap: the first call makes it, an int64 of 0.  Or an
        offset in bytes, of any region, and `dtype` ("int8" to "uint64", or numpy's) says what
        lies there.  Or an array of one integer that lies in the region.
        Raises ValueError, and as lock().
        """
        if isinstance(where, str):
            place, dtype = self._named(where, core.Kind.INTEGER, 0), "int64"
        else:
            memory = self._opened()
            numpy = sys.modules.get("numpy")
            if numpy and isinstance(where, numpy.ndarray):
                where, dtype = self._integer_at(where)
            width, _ = sync.width_of(dtype)
            address = self._place(operator.index(where), width)
            if address % width:
                raise ValueError(f"an integer of {width} bytes lies at a multiple of {width}")
            again = self._again("atomic", address - self._hold.region.start, sync.name_of(dtype))
            place = sync.Place(memory, address, f"{self._name}+{operator.index(where)}", again)
        width, signed = sync.width_of(dtype)
        return sync.Atomic(place, width, signed=signed, readonly=self._readonly)

    def _integer_at(self, array: NDArray[Any]) -> tuple[int, Any]:
        """The offset of an array of one integer, and its type.  Raises ValueError."""
        if array.size != 1 or not array.dtype.isnative:
            raise ValueError("say which integer: an array of one, as `array[3:4]`")
        offset = int(array.__array_interface__["data"][0]) - self._hold.region.start
        if not 0 <= offset < self._hold.region.length:
            raise ValueError("the array does not lie in this region")
        return offset, array.dtype

    def pin(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> Pin:
        """Keep the memory mapped until the pin is released or dropped; it tells the address."""
        memory = self._opened()
        at, size = self._part(offset, length)
        return Pin(memory, self._place(at, size), size)

    def populate(
        self,
        offset: SupportsIndex = 0,
        length: SupportsIndex | None = None,
        timeout: float | None = None,
    ) -> None:
        """Have the memory of a part of the region, by default of all, there when this returns.

        Other threads run, and signal handlers.  `timeout` is in seconds.
        Raises MemoryError if there is not enough, TimeoutError, Stale, AccessDenied if a part of
        it is PROT_NONE, OSError if a file that is mapped there cannot be read, or nothing is.
        """
        memory = self._opened()
        at, size = self._part(offset, length)
        try:
            touching.populate(
                memory,
                self._place(at, size),
                size,
                timeout,
                self.identity.root,
                self._name,
            )
        except errors.MshareError:
            # What this process has it does not ask for again: that fails if it is gone.
            self._attach_identity(self.identity, self._name, readonly=self.readonly).close()
            raise

    def mmap(
        self,
        offset: SupportsIndex,
        length: SupportsIndex,
        prot: SupportsIndex = mmap.PROT_READ | mmap.PROT_WRITE,
        flags: SupportsIndex = mmap.MAP_SHARED,
        file: int | SupportsFileno | None = None,
        file_offset: SupportsIndex = 0,
    ) -> None:
        """Map memory, or a part of a file, into the region: for every sharer.

        All are bytes; `offset` is the region's and, like `file_offset`, a multiple of
        the page size.  Without `file` the memory is anonymous.  With MAP_FIXED in
        `flags` it takes the place of what is there.

        Raises OSError: EEXIST if something is mapped there, else as mmap(2).
        """
        how = operator.index(flags)
        how |= 0 if how & core.MAP_FIXED else core.MAP_FIXED_NOREPLACE
        if file is None:
            fd, how = -1, how | mmap.MAP_ANONYMOUS
        else:
            fd = file if isinstance(file, int) else file.fileno()
        self._call(core.mshare_mmap, offset, length, prot, how, fd, file_offset)

    def munmap(self, offset: SupportsIndex, length: SupportsIndex) -> None:
        """Unmap a part of the region for every sharer; its memory is freed.

        A touch of it is SIGBUS from now on, through buffers and arrays as well.
        Raises OSError as munmap(2).
        """
        self._call(core.mshare_munmap, offset, length)

    def protect(self, offset: SupportsIndex, length: SupportsIndex, prot: SupportsIndex) -> None:
        """Change the protection of a part of the region for every sharer.

        Raises OSError as mprotect(2).
        """
        self._call(core.mshare_mprotect, offset, length, prot)

    def madvise(
        self,
        advice: SupportsIndex,
        offset: SupportsIndex = 0,
        length: SupportsIndex | None = None,
    ) -> None:
        """madvise(2) on a part of the region, by default on all.  Raises OSError."""
        self._call(core.mshare_madvise, offset, length, advice)

    def flush(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> None:
        """Have what was written to MAP_SHARED files in the files when this returns.

        Without arguments the whole region.  Raises OSError as msync(2); holes in the
        region are no error.
        """
        try:
            self._call(core.mshare_msync, offset, length)
        except errors.MshareError as error:
            if error.errno != errno.ENOMEM:  # a hole: what is mapped has been written
                raise

    def _call(
        self,
        function: Callable[..., object],
        offset: SupportsIndex,
        length: SupportsIndex | None,
        *more: SupportsIndex,
    ) -> None:
        """A call on a part of the region, which a signal handler may end."""
        at, numbers = operator.index(offset), [operator.index(each) for each in more]
        pin = self.pin(at, length)  # as long as the call goes on
        page = os.sysconf("SC_PAGESIZE")
        if at % page:
            raise errors.MshareError(
                errno.EINVAL, f"offset {at} is not a multiple of the page size, {page}", self._name
            )
        waiting.interruptible(lambda: function(pin.address, pin.length, *numbers))

    def _part(self, offset: SupportsIndex, length: SupportsIndex | None) -> tuple[int, int]:
        """Where a part begins, and its length, by default all of the rest.  Raises TypeError."""
        at = operator.index(offset)
        return at, self.size - at if length is None else operator.index(length)

    def _place(self, offset: int, length: int) -> int:
        region = self._hold.region
        if offset < 0 or length < 0 or offset + length > region.length:
            raise ValueError(
                f"{length} bytes at offset {offset} do not lie in a region of {region.length}"
            )
        return region.start + offset

    def close(self) -> None:
        """End this object's use of the region.  Twice is fine.

        Buffers and arrays go on; the process detaches when the last one has gone.
        """
        self._warn = False
        with holding.letting_go():
            self._memory = None

    def unlink(self) -> None:
        """The name goes now, the memory with its last user.  Twice is fine.

        A new region of the same name is another one, and is left alone.  Works after close().
        Raises OSError (AccessDenied).
        """
        try:
            holding.forget_name(self._hold, self._name)
        except errors.Stale:
            if not self.closed:
                raise

    def __enter__(self) -> Self:
        self._opened()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._memory is not None and self._warn:
            warnings.warn(
                f"{self!r} was not closed: use `with`, or close()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _which(self) -> tuple[Identity, str, bool]:
        """What unpickle() finds this region by.  Raises ValueError when it is closed."""
        self._opened()
        return self.identity, self._name, self._readonly

    def __reduce__(self) -> tuple[Any, ...]:
        which = self._which()
        if type(self) is Region:
            return unpickle, which
        own = {key: value for key, value in vars(self).items() if key not in _OURS}
        return unpickle_as, (type(self), *which), own

    def __repr__(self) -> str:
        if self._memory is None:
            return f"<Region {self._name!r} closed>"
        region = self._hold.region
        return f"<Region {self._name!r} {region.length} bytes at {region.start:#x}>"


def _check_sense(complaints: dict[str, bool]) -> None:
    for text, holds in complaints.items():
        if holds:
            raise ValueError(text)


def _access(*, readonly: bool) -> int:
    return os.O_RDONLY if readonly else os.O_RDWR


def unpickle(identity: Identity, name: str, readonly: bool) -> Region:  # noqa: FBT001 - pickle
    """The same region, or Stale; for pickle."""
    return Region._attach_identity(identity, name, readonly=readonly)


def unpickle_as(
    kind: type[Region],
    identity: Identity,
    name: str,
    readonly: bool,  # noqa: FBT001 - pickle
) -> Region:
    """The same, of a class of the program's own; for pickle."""
    return kind._attach_identity(identity, name, readonly=readonly)


def unpickle_object(
    which: tuple[Identity, str, bool],
    method: str,
    where: tuple[Any, ...],
    arguments: dict[str, Any],
) -> Any:
    """The same lock, semaphore or integer, or Stale; for pickle."""
    with unpickle(*which) as region:
        return getattr(region, method)(*where, **arguments)
