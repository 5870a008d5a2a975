"""msharefs as the kernel sees it: the FUSE handlers.

A handler may only raise FUSEError.  pyfuse3 ends the mount on anything else, so
every handler goes through `_guarded`, which turns a defect into EIO and a logged
traceback.

The kernel judges permissions (default_permissions) from the attributes given here.
Attributes and names have no lifetime in its caches: regions come and go by
messages that the kernel does not see.  The exceptions are what never changes, so
that connecting to .control asks us nothing.

Handlers wait for nothing but their user's turn and, with a deadline, a pager's answer
(asking.py), of which each user may wait for so many at one time: so pyfuse3's workers are
never all busy.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import logging
import os
import re
import stat
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from msharefsd.barriers import barrier
from msharefsd.errors import Refused
from msharefsd.linux import processes
from msharefsd.memory.shm import SHM_DIRECTORY
from msharefsd.mount.asking import Asking, Text
from msharefsd.mount.controls import (
    CONTROL_INODE,
    CONTROL_NAME,
    CONTROLS_INODE,
    CONTROLS_NAME,
    Controls,
)
from msharefsd.mount.names import INFO_FILE, NAME_MAX, Name, Names
from msharefsd.region.region import BY_IDENTITY, INODES
from msharefsd.threads.fairness import Turns

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

INFO_STRUCT: Final = struct.Struct("=QQ")
"""struct mshare_info of the letter: start and size."""
DETAILS: Final = 4096
"""Where in a region's file, beyond its end, libmshare reads and writes what the letter does
not know (internal.h).  A descriptor of the file is what it takes, as for everything else."""
DETAILS_STRUCT: Final = struct.Struct("=16sQQQ")
"""Identity; length; start and size, or those kept for it as long as it has no range."""
PLACE_STRUCT: Final = struct.Struct("=QQ")
"""Written there: find a range for so many bytes, at or above an address."""
EXACT_STRUCT: Final = struct.Struct("=QQQ")
"""Written there: the range will be for so many bytes, at that address; and 0."""
IMAGE: Final = b"user.mshare.image"
"""The one extended attribute that a region's file has: what its contents came from."""

FOREVER: Final = 3600.0
A_MOMENT: Final = 0.01
"""How long the kernel believes attributes that change by themselves (seconds)."""
ROOT: Final = int(pyfuse3.ROOT_INODE)
INFO_INODE: Final = 2
METRICS_INODE: Final = 4
REGIONS_INODE: Final = 5
STATUS_INODE: Final = 7
FIXED: Final = {
    INFO_FILE: INFO_INODE,
    CONTROL_NAME: CONTROL_INODE,
    CONTROLS_NAME: CONTROLS_INODE,
    b".metrics": METRICS_INODE,
    b".status": STATUS_INODE,
    b".regions": REGIONS_INODE,
}

REMOVED: Final = b".removed-%d"
"""What the directory of a region is called that has lost its name; no name begins so."""
_REMOVED_NAME: Final = re.compile(rb"\.removed-([0-9]{1,18})")

# A region's inodes follow from its id: its file, its directory, the files there.
_FILE, _DIRECTORY = 0, 1
_FILES: Final = (_FILE, BY_IDENTITY)
_MAKING: Final = b".making-"
"""A region's name with this before it, to create it: the name of one that is given its memory
next.  A name that is created as it stands is there until it is removed."""
_SIZED: Final = re.compile(rb"\.sized-([1-9][0-9]{0,18})-(.+)", re.DOTALL)
"""The same, and it is given a range of so many bytes at once."""
_IDENTITY: Final = re.compile(rb"\.identity-([0-9a-f]{32})")
"""A region's file once more, whatever its name, and if it has none any more."""
_RENAME_NOREPLACE: Final = 1
_TEXTS: Final[dict[bytes, tuple[int, Text]]] = {
    b"info": (2, "info"),
    b"maps": (3, "maps"),
    b"sharers": (4, "sharers"),
    b"pagetables": (5, "pagetables"),
}
_KINDS: Final = dict(_TEXTS.values())

MOST_HELD: Final = 64 << 20
"""How much text a user's open files and directories may hold, in bytes."""
_HANDLE_BYTES: Final = 512
_ENTRY_BYTES: Final = 128
"""What an open handle and an entry of a listing take besides."""


def region_inode(region: Name, kind: int = _FILE) -> int:
    """The inode number of one of a region's files; never used twice in a mount."""
    return region.id * INODES + kind


def _to_make(name: bytes) -> tuple[bytes, bool, int]:
    """What a name is that is created as that; whether it is to be given memory; of which length.

    The length, in bytes, is 0 if that is not said.
    """
    if sized := _SIZED.fullmatch(name):
        return sized[2], True, int(sized[1])
    wanted = name.removeprefix(_MAKING)
    return (wanted, True, 0) if wanted and wanted != name else (name, False, 0)


def _is_own_thread(pid: int) -> bool:
    # A request names the thread that made it; the daemon binds from a worker thread.
    return os.path.exists(f"/proc/self/task/{pid}")


def _split_inode(inode: int) -> tuple[int, int]:
    return divmod(inode, INODES)


def _asks(fields: SetattrFields) -> bool:
    """Whether a request to set attributes wants any of them changed but ctime."""
    return (
        fields.update_size
        or fields.update_mode
        or fields.update_uid
        or fields.update_gid
        or fields.update_atime
        or fields.update_mtime
    )


def _storable(time_ns: int) -> int:
    """The nearest time that the state can keep; file systems cut others as well (utimensat(2))."""
    return max(-(1 << 63), min(time_ns, (1 << 63) - 1))


def _guarded(handler: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    @functools.wraps(handler)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except Refused as refused:
            raise FUSEError(refused.code) from refused
        except Exception as error:
            log.exception("%s failed", handler.__name__)
            raise FUSEError(errno.EIO) from error

    return guarded


class _GuardedOperations(pyfuse3.Operations):
    def __init_subclass__(cls) -> None:
        """Guard every handler of the class, whoever adds one."""
        super().__init_subclass__()
        for name, handler in list(vars(cls).items()):
            if inspect.iscoroutinefunction(handler) and hasattr(pyfuse3.Operations, name):
                setattr(cls, name, _guarded(handler))


class FileSystem(_GuardedOperations):
    """The tree of design section 4."""

    def __init__(self, names: Names, asking: Asking, turns: Turns, controls: Controls) -> None:
        super().__init__()
        self._names = names
        self._asking = asking
        self._turns = turns
        self._controls = controls
        self._born = time.time_ns()
        self._lookups: dict[int, int] = {}
        self._files: dict[int, Name] = {}
        """Regions whose file the kernel knows, alive or not."""
        self._contents: dict[int, bytes] = {}
        """What an open handle of a text file reads: one moment, however it is cut."""
        self._open_files: dict[int, Name] = {}
        """Of each open handle of a region's file."""
        self._costs: dict[int, tuple[int, int]] = {}
        """Of each open handle: the user, and the bytes."""
        self._held: Counter[int] = Counter()
        """Bytes by user."""
        self._next_handle = 1
        self._listings: dict[int, list[tuple[int, bytes, int]]] = {}

    # -- finding things --

    def _region(self, inode: int) -> Name:
        region = self._files.get(inode) or self._names.with_id(_split_inode(inode)[0])
        if region is None:
            # The name may be another region's by now: have the kernel look again.
            raise FUSEError(errno.ESTALE)
        return region

    def _is_ours(self, inode: int) -> bool:
        """Whether it is not of a region."""
        return inode == ROOT or inode in FIXED.values() or inode in self._controls

    def _resolve(self, parent: int, name: bytes) -> int:
        """The inode of a name; FUSEError(ENOENT)."""
        if len(_to_make(name)[0]) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        if parent == ROOT:
            if name in FIXED and (name != CONTROL_NAME or CONTROL_INODE in self._controls):
                return FIXED[name]
            region = self._names.find(name)
            if region is not None:
                return region_inode(region)
            identity = _IDENTITY.fullmatch(name)
            region = identity and self._names.of_identity(bytes.fromhex(identity[1].decode()))
            if region:
                return region_inode(region, BY_IDENTITY)
        elif parent == REGIONS_INODE:
            region = self._names.find(name) or self._removed(name)
            if region is not None:
                return region_inode(region, _DIRECTORY)
        elif _split_inode(parent)[1] == _DIRECTORY and name in _TEXTS:
            return region_inode(self._region(parent), _TEXTS[name][0])
        raise FUSEError(errno.ENOENT)

    def _removed(self, name: bytes) -> Name | None:
        """The region in .regions that has no name any more, and memory still."""
        match = _REMOVED_NAME.fullmatch(name)
        region = None if match is None else self._names.with_id(int(match[1]))
        return region if region is not None and region.lingers else None

    # -- attributes --

    def _attributes(self, inode: int) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = InodeT(inode)
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = 0
        entry.st_blksize = 4096
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._born
        entry.st_nlink = 1
        entry.st_size = 0
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        if inode == ROOT:
            # Every path goes through here: its attributes never change.
            entry.st_mode = ModeT(stat.S_IFDIR | 0o1777)
            entry.st_nlink = 3
            entry.entry_timeout = entry.attr_timeout = FOREVER
        elif inode == REGIONS_INODE:
            entry.st_mode = ModeT(stat.S_IFDIR | 0o555)
            entry.st_nlink = 2 + len(self._names)
        elif inode == INFO_INODE:
            entry.st_mode = ModeT(stat.S_IFREG | 0o444)
            entry.st_size = len(self._info())
            entry.entry_timeout = entry.attr_timeout = FOREVER
        elif inode in (METRICS_INODE, STATUS_INODE):
            entry.st_mode = ModeT(stat.S_IFREG | 0o444)
        elif inode in self._controls:
            mode, entry.st_uid, entry.st_gid = self._controls.attributes(inode)
            entry.st_mode = ModeT(mode)
            entry.attr_timeout = FOREVER
        elif inode == CONTROLS_INODE:
            entry.st_mode = ModeT(stat.S_IFDIR | 0o700)
            entry.st_nlink = 2
            entry.entry_timeout = entry.attr_timeout = FOREVER
        else:
            self._region_attributes(entry, self._region(inode), _split_inode(inode)[1])
        return entry

    @staticmethod
    def _region_attributes(entry: EntryAttributes, region: Name, kind: int) -> None:
        entry.st_uid, entry.st_gid = region.uid, region.gid
        entry.st_atime_ns = region.atime_ns
        entry.st_mtime_ns = region.mtime_ns
        entry.st_ctime_ns = region.ctime_ns
        # Who may read the region's file may read about the region.
        readable = region.mode & 0o444
        if kind in _FILES:
            # For the calls that the kernel makes of one: a lookup, and what it is for.
            entry.attr_timeout = A_MOMENT
            entry.st_mode = ModeT(stat.S_IFREG | region.mode)
            entry.st_size = INFO_STRUCT.size
            entry.st_blocks = region.allocated() // 512
            entry.st_nlink = 1 if region.linked else 0
        elif kind == _DIRECTORY:
            entry.st_mode = ModeT(stat.S_IFDIR | readable | readable >> 2)
            entry.st_nlink = 2
            if region.lingers:  # no file shows what it holds: du(1)
                entry.st_blocks = region.allocated() // 512
        else:
            entry.st_mode = ModeT(stat.S_IFREG | readable)

    def _info(self) -> bytes:
        return b"%d\n" % self._names.alignment

    def _entry(self, inode: int) -> EntryAttributes:
        """Attributes for a reply that raises the kernel's lookup count."""
        attributes = self._attributes(inode)
        self._lookups[inode] = self._lookups.get(inode, 0) + 1
        if not self._is_ours(inode):
            self._files[inode] = self._region(inode)
        return attributes

    # -- handlers: names --

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        control = None
        if name == CONTROL_NAME and parent_inode == ROOT:
            control = await self._controls.of(ctx.uid)
        async with self._turns.turn(ctx.uid):
            if control is not None:
                return self._entry(control)
            if name == b".":
                return self._entry(parent_inode)
            if name == b"..":
                return self._entry(ROOT)
            return self._entry(self._resolve(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            left = self._lookups.get(inode, 0) - count
            if left > 0:
                self._lookups[inode] = left
            else:
                self._lookups.pop(inode, None)
                self._files.pop(inode, None)

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        if parent_inode != ROOT:
            raise FUSEError(errno.EPERM)
        creator = processes.process_of(ctx.pid)
        wanted, making, length = _to_make(name)
        async with self._turns.turn(ctx.uid):
            region = self._names.create(
                wanted, mode, ctx.uid, ctx.gid, creator=creator, making=making, length=length
            )
        barrier("create")
        try:
            return self._open_region(region, ctx.uid), self._entry(region_inode(region))
        except FUSEError:
            self._names.unlink(region)
            raise

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        inode = self._resolve(parent_inode, name)
        number, kind = _split_inode(inode)
        region = self._names.with_id(number)
        if parent_inode != ROOT or region is None or kind not in _FILES:
            raise FUSEError(errno.EPERM)
        self._names.unlink(region)
        barrier("unlink")

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        # bind(2) of a unix socket arrives as mknod.  The daemon's own, and no other.
        inode = None
        if parent_inode == CONTROLS_INODE and _is_own_thread(ctx.pid):
            inode = self._controls.mknod(name, mode, ctx.uid, ctx.gid)
        if inode is None:
            raise FUSEError(errno.EPERM)
        return self._entry(inode)

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        raise FUSEError(errno.EPERM)

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        raise FUSEError(errno.EINVAL)

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        # What has no name gets one; nothing else is renamed, and nothing replaced.
        if (
            (parent_inode_old, parent_inode_new) != (ROOT, ROOT)
            or not _IDENTITY.fullmatch(name_old)
            or flags & ~_RENAME_NOREPLACE
        ):
            raise FUSEError(errno.EPERM)
        region = self._region(self._resolve(ROOT, name_old))
        async with self._turns.turn(ctx.uid):
            self._names.give(region, name_new)
        barrier("give")
        # Its pager is to know before its last user can end: an answer says that it does.  (If
        # there is none, the name goes with the region: see Names.gone.)
        with contextlib.suppress(Refused):
            await self._asking.text(ctx.uid, region, "info")

    async def link(
        self,
        inode: InodeT,
        new_parent_inode: InodeT,
        new_name: FileNameT,
        ctx: RequestContext,
    ) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    # -- handlers: attributes --

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        async with self._turns.turn(ctx.uid):
            return self._attributes(inode)

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        if self._is_ours(inode) or _split_inode(inode)[1] not in _FILES:
            if not _asks(fields):  # chown(path, -1, -1)
                return self._attributes(inode)
            raise FUSEError(errno.EPERM)
        if fields.update_size:
            # A region's size is its own, fixed by mshare(); its file has no other.
            raise FUSEError(errno.EPERM)
        region = self._region(inode)
        changes = {"ctime_ns": time.time_ns()}
        if fields.update_mode:
            changes["mode"] = attr.st_mode & 0o7777
        if fields.update_uid:
            changes["uid"] = attr.st_uid
        if fields.update_gid:
            changes["gid"] = attr.st_gid
        if fields.update_atime:
            changes["atime_ns"] = _storable(attr.st_atime_ns)
        if fields.update_mtime:
            changes["mtime_ns"] = _storable(attr.st_mtime_ns)
        async with self._turns.turn(ctx.uid):
            self._names.change(region, **changes)
        return self._attributes(inode)

    def _has_image(self, inode: int, name: bytes) -> Name | None:
        """The region whose file that is, if it has that attribute."""
        if name != IMAGE or self._is_ours(inode) or _split_inode(inode)[1] not in _FILES:
            return None
        return self._region(inode)

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        region = self._has_image(inode, name)
        if region is None or not region.image:
            raise FUSEError(pyfuse3.ENOATTR)
        return region.image

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        region = self._has_image(inode, IMAGE)
        return [XAttrNameT(IMAGE)] if region is not None and region.image else []

    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        region = self._has_image(inode, name)
        if region is None:
            raise FUSEError(errno.EOPNOTSUPP)
        async with self._turns.turn(ctx.uid):
            self._names.say_image(region, value)

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        raise FUSEError(errno.EOPNOTSUPP)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        # The memory of regions comes out of /dev/shm: df shows what is left there.
        memory = os.statvfs(SHM_DIRECTORY)
        data = StatvfsData()
        data.f_bsize = data.f_frsize = memory.f_frsize
        data.f_blocks = memory.f_blocks
        data.f_bfree = memory.f_bfree
        data.f_bavail = memory.f_bavail
        data.f_files = len(self._names)
        data.f_ffree = data.f_favail = memory.f_ffree
        data.f_namemax = NAME_MAX
        return data

    # -- handlers: files --

    def _new_handle(self, uid: int, size: int) -> int:
        """The number of a handle that takes `size` bytes; FUSEError(EMFILE)."""
        size += _HANDLE_BYTES
        if self._held[uid] + size > MOST_HELD:
            raise FUSEError(errno.EMFILE)
        number = self._next_handle
        self._next_handle += 1
        self._held[uid] += size
        self._costs[number] = uid, size
        return number

    def _release(self, handle: int) -> None:
        uid, size = self._costs.pop(handle, (0, 0))
        self._held[uid] -= size
        if not self._held[uid]:
            del self._held[uid]

    def _handle(self, content: bytes, uid: int) -> FileInfo:
        number = self._new_handle(uid, len(content))
        self._contents[number] = content
        # direct_io: reads come here with their own sizes, so a file may say that
        # its size is 0; and no page of it stays in the kernel's cache.
        return FileInfo(fh=FileHandleT(number), direct_io=True, keep_cache=False)

    def _open_region(self, region: Name, uid: int) -> FileInfo:
        info = self._handle(INFO_STRUCT.pack(region.start, region.size), uid)
        self._open_files[info.fh] = region
        region.users += 1
        return info

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        if inode == INFO_INODE:
            content = self._info()
        elif inode == METRICS_INODE:
            content = await self._asking.metrics(ctx.uid)
        elif inode == STATUS_INODE:
            async with self._turns.turn(ctx.uid):
                content = self._asking.status(ctx.uid)
        else:
            region = self._region(inode)
            kind = _split_inode(inode)[1]
            if kind in _FILES:
                if not region.linked and not (kind == BY_IDENTITY and region.size):
                    raise FUSEError(errno.ESTALE)
                if flags & os.O_TRUNC:
                    raise FUSEError(errno.EPERM)
                return self._open_region(region, ctx.uid)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise FUSEError(errno.EACCES)
            content = await self._asking.text(ctx.uid, region, _KINDS[kind])
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EACCES)
        return self._handle(content, ctx.uid)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        region = self._open_files.get(fh)
        if region is not None and off == DETAILS:
            place = (region.start, region.size) if region.size else region.place
            return DETAILS_STRUCT.pack(region.identity, region.length, *place)[:size]
        return self._contents[fh][off : off + size]

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        region = self._open_files.get(fh)
        if region is None or off != DETAILS:
            raise FUSEError(errno.EINVAL)
        async with self._turns.turn(self._costs[fh][0]):
            if len(buf) == PLACE_STRUCT.size:
                self._names.find_place(region, *PLACE_STRUCT.unpack(buf))
            elif len(buf) == EXACT_STRUCT.size and buf.endswith(bytes(8)):
                self._names.keep_place(region, *EXACT_STRUCT.unpack(buf)[:2])
            else:
                raise FUSEError(errno.EINVAL)
        return len(buf)

    async def flush(self, fh: FileHandleT) -> None:
        # ENOSYS once and the kernel never asks again: see control.py on closing.
        raise FUSEError(errno.ENOSYS)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        return

    async def release(self, fh: FileHandleT) -> None:
        self._contents.pop(fh, None)
        region = self._open_files.pop(fh, None)
        self._release(fh)
        if region is not None:
            self._names.closed(region)

    # -- handlers: directories --

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        # Offsets in a listing are places in this list, taken when it was opened, so
        # they stay true however names come and go meanwhile.
        async with self._turns.turn(ctx.uid):
            names = self._list(inode, ctx.uid)
        number = self._new_handle(ctx.uid, len(names) * _ENTRY_BYTES)
        self._listings[number] = names
        return FileHandleT(number)

    def _list(self, inode: int, uid: int) -> list[tuple[int, bytes, int]]:
        if inode == ROOT:
            unlisted = CONTROL_NAME, CONTROLS_NAME
            names = [(name, number) for name, number in FIXED.items() if name not in unlisted]
            control = self._controls.known(uid)
            if control is not None:
                names.append((CONTROL_NAME, control))
            names += [(region.name, region_inode(region)) for region in self._names]
        elif inode == CONTROLS_INODE:
            names = []
        elif inode == REGIONS_INODE:
            names = [(region.name, region_inode(region, _DIRECTORY)) for region in self._names]
            names += [
                (REMOVED % region.id, region_inode(region, _DIRECTORY))
                for region in self._names.all()
                if region.lingers
            ]
        else:
            region = self._region(inode)
            names = [(name, region_inode(region, kind)) for name, (kind, _) in _TEXTS.items()]
        return [(place, name, number) for place, (name, number) in enumerate(names, start=1)]

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        for place, name, inode in self._listings[fh][start_id:]:
            try:
                attributes = self._entry(inode)
            except FUSEError:
                continue  # gone since the directory was opened
            if not pyfuse3.readdir_reply(token, name, attributes, place):
                await self.forget([(InodeT(inode), 1)])
                return

    async def releasedir(self, fh: FileHandleT) -> None:
        self._listings.pop(fh, None)
        self._release(fh)

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        return
