"""`Region`: a region for people."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from libmshare import core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class SupportsFileno(Protocol):
    """An open file, or the like."""

    def fileno(self) -> int:
        """The descriptor."""


class _Attachment:
    """The process's one attachment of a region, shared by its Region objects."""

    def __init__(self, name: str, start: int, size: int, *, writable: bool) -> None:
        self.name = name
        self.start = start
        self.size = size
        self.writable = writable
        self.users = 0
        # Every buffer of the region keeps this object alive, so whether there are
        # any shows when we let go of it ourselves.
        self.memory: ctypes.Array[ctypes.c_char] = (ctypes.c_char * size).from_address(start)

    def buffer(self) -> memoryview:
        view = memoryview(self.memory).cast("B")
        return view if self.writable else view.toreadonly()

    def has_exports(self) -> bool:
        reference = weakref.ref(self.memory)
        del self.memory
        memory = reference()
        if memory is None:
            self.memory = (ctypes.c_char * self.size).from_address(self.start)
            return False
        self.memory = memory
        return True


_lock = threading.RLock()
_attachments: dict[str, _Attachment] = {}
# A child has the threads' locks and not the threads: one that was held stays so.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
)


class Region:
    """A region of memory that lies at one address in every process that attached it.

    ``Region("name")`` attaches; ``Region("name", create=True, start=..., size=...)``
    creates one filled with zeros (bytes; multiples of the alignment that
    ``mshare_info`` tells), or attaches it if it exists and `exclusive` is false.

    Leaving the ``with`` block, or ``close()``, ends this object's use; the region
    stays under its name until ``unlink()``, like a file.  Pickled, a region travels
    as its name: another process that unpickles it attaches.

    Synchronization: a region's bytes are shared memory, with no locks but those that
    the programs agree on.  The methods may be called from any thread.  A thread that
    touches a page for the first time waits for the daemon and may hold the
    interpreter lock meanwhile.
    """

    def __init__(
        self,
        name: str,
        *,
        create: bool = False,
        exclusive: bool = False,
        start: int | None = None,
        size: int | None = None,
        readonly: bool = False,
        empty: bool = False,
        mode: int = 0o600,
        backing: str | None = None,
    ) -> None:
        """Attach or create the region; with `empty` create it with nothing mapped in it.

        `backing` is what holds a new region's pages: "shm", "hugetlb", or None for what
        $MSHARE_BACKING or the daemon says.

        Raises OSError with the errno of mshare(3), and ValueError when `start` or
        `size` (bytes) are missing to create it.
        """
        self._attachment: _Attachment | None = None
        with _lock:
            known = _attachments.get(name)
            if known is None:
                known = _attach(
                    name, create, exclusive, start, size, readonly, empty, mode, backing
                )
                _attachments[name] = known
            elif exclusive:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            elif not (readonly or known.writable):
                raise PermissionError(
                    errno.EACCES, "this process has attached the region read-only", name
                )
            elif (start, size) not in ((None, None), (known.start, known.size)):
                raise OSError(errno.EINVAL, "the region lies elsewhere", name)
            known.users += 1
            self._attachment = known

    def _open(self) -> _Attachment:
        if self._attachment is None:
            raise ValueError("the region is closed")
        return self._attachment

    @property
    def name(self) -> str:
        """The region's name."""
        return self._open().name

    @property
    def start(self) -> int:
        """The region's address, the same in every process (bytes)."""
        return self._open().start

    @property
    def size(self) -> int:
        """The region's size in bytes."""
        return self._open().size

    @property
    def readonly(self) -> bool:
        """Whether this process may only read."""
        return not self._open().writable

    @property
    def buf(self) -> memoryview:
        """The region's bytes.  While it, or a slice of it, lives, close() is refused."""
        return self._open().buffer()

    def ndarray(
        self,
        shape: int | tuple[int, ...],
        dtype: npt.DTypeLike = float,
        offset: int = 0,
    ) -> np.ndarray[Any, np.dtype[Any]]:
        """A numpy array over the region's bytes from `offset` on.

        Raises ValueError if it does not fit.
        """
        import numpy as np  # noqa: PLC0415 - it is optional

        attachment = self._open()
        kind = np.dtype(dtype)
        dimensions = (shape,) if isinstance(shape, int) else shape
        needed = kind.itemsize
        for extent in dimensions:
            needed *= extent
        if offset < 0 or needed < 0 or offset + needed > attachment.size:
            raise ValueError(
                f"{needed} bytes at offset {offset} do not lie in a region of {attachment.size}"
            )
        # Through a slice: numpy counts a whole 512 GiB buffer in its own way.
        part = attachment.buffer()[offset : offset + needed]
        return np.frombuffer(part, dtype=kind).reshape(dimensions)

    def mmap(
        self,
        offset: int,
        length: int,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
        flags: int = mmap.MAP_SHARED,
        file: int | SupportsFileno | None = None,
        file_offset: int = 0,
    ) -> None:
        """Map memory, or a part of a file, into the region: for every sharer.

        All are bytes; `offset` is the region's and, like `file_offset`, a multiple of
        the page size.  Without `file` the memory is anonymous.  With MAP_FIXED in
        `flags` it takes the place of what is there.

        Raises OSError: EEXIST if something is mapped there, else as mmap(2).
        """
        flags |= 0 if flags & core.MAP_FIXED else core.MAP_FIXED_NOREPLACE
        if file is None:
            fd, flags = -1, flags | mmap.MAP_ANONYMOUS
        else:
            fd = file if isinstance(file, int) else file.fileno()
        core.mshare_mmap(self._place(offset, length), length, prot, flags, fd, file_offset)

    def munmap(self, offset: int, length: int) -> None:
        """Unmap a part of the region for every sharer; its memory is freed.

        A touch of it is SIGBUS from now on, through buffers and arrays as well.
        Raises OSError as munmap(2).
        """
        core.mshare_munmap(self._place(offset, length), length)

    def protect(self, offset: int, length: int, prot: int) -> None:
        """Change the protection of a part of the region for every sharer.

        Raises OSError as mprotect(2).
        """
        core.mshare_mprotect(self._place(offset, length), length, prot)

    def flush(self, offset: int = 0, length: int | None = None) -> None:
        """Have what was written to MAP_SHARED files in the files when this returns.

        Without arguments the whole region.  Raises OSError as msync(2); holes in the
        region are no error.
        """
        length = self.size - offset if length is None else length
        try:
            core.mshare_msync(self._place(offset, length), length)
        except OSError as error:
            if error.errno != errno.ENOMEM:  # a hole: what is mapped has been written
                raise

    def _place(self, offset: int, length: int) -> int:
        attachment = self._open()
        if offset < 0 or length < 0 or offset + length > attachment.size:
            raise ValueError(
                f"{length} bytes at offset {offset} do not lie in a region of {attachment.size}"
            )
        return attachment.start + offset

    def close(self) -> None:
        """End this object's use of the region; the last one in the process detaches.

        Raises BufferError while buffers or arrays of it live.  Closing twice is fine.
        """
        self._end(core.mshare_detach)

    def unlink(self) -> None:
        """mshare_unlink(): detach, and remove the name if nobody else has it attached.

        Raises BufferError while buffers live, ValueError if other Region objects of
        this process still use it.
        """
        with _lock:
            if self._open().users > 1:
                raise ValueError("other Region objects of this process use it: close them first")
        self._end(core.mshare_unlink)

    def _end(self, how: Any) -> None:
        with _lock:
            attachment = self._attachment
            if attachment is None:
                return
            if attachment.users == 1:
                if attachment.has_exports():
                    raise BufferError("cannot close a region while buffers of it exist")
                del _attachments[attachment.name]
                self._attachment = None
                how(attachment.name)
            else:
                attachment.users -= 1
                self._attachment = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, tuple[str, bool]]:
        return _unpickle, (self.name, self.readonly)

    def __repr__(self) -> str:
        if self._attachment is None:
            return "<Region closed>"
        attachment = self._attachment
        return f"<Region {attachment.name!r} {attachment.size} bytes at {attachment.start:#x}>"


def _unpickle(name: str, readonly: bool) -> Region:  # noqa: FBT001 - pickle passes by position
    return Region(name, readonly=readonly)


def _attach(
    name: str,
    create: bool,  # noqa: FBT001 - an inner function of the constructor
    exclusive: bool,  # noqa: FBT001
    start: int | None,
    size: int | None,
    readonly: bool,  # noqa: FBT001
    empty: bool,  # noqa: FBT001
    mode: int,
    backing: str | None,
) -> _Attachment:
    access = os.O_RDONLY if readonly else os.O_RDWR
    if not (create and exclusive):
        try:
            return _attach_existing(name, start, size, access)
        except FileNotFoundError:
            if not create:
                raise
    if start is None or size is None:
        raise ValueError("to create a region, say where (start) and how large (size) it is")
    if not empty:
        core.map_anonymous(start, size)
    else:
        # What is there would be given to the region, and shown to everybody.
        core.check_free(start, size)
    try:
        core.mshare(name, start, size, access | os.O_CREAT | os.O_EXCL, mode, backing)
    except BaseException as error:
        if not empty:
            core.mshare_munmap(start, size)
        if isinstance(error, FileExistsError) and not exclusive:
            # Somebody else created it meanwhile.
            return _attach_existing(name, start, size, access)
        raise
    return _Attachment(name, start, size, writable=not readonly)


def _attach_existing(name: str, start: int | None, size: int | None, access: int) -> _Attachment:
    if start is None and size is None:
        start, size = core.mshare_attach(name, access)
    else:
        if start is None or size is None:
            found = core.mshare_stat(name)
            start = found.start if start is None else start
            size = found.size if size is None else size
        core.mshare(name, start, size, access)
    return _Attachment(name, start, size, writable=access == os.O_RDWR)
