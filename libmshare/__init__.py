"""libmshare: memory regions that many processes map at one address.

`Region` is for people: `Region.create()` makes a region, `Region.attach()` attaches one.
`mshare()`, `mshare_unlink()` and their kin are the calls of the mshare patches, as in C.
"""

from typing import TYPE_CHECKING

from libmshare.core import (
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    HeapInfo,
    RegionInfo,
    alignment,
    mshare,
    mshare_attach,
    mshare_detach,
    mshare_madvise,
    mshare_mmap,
    mshare_mprotect,
    mshare_msync,
    mshare_munmap,
    mshare_root,
    mshare_stat,
    mshare_unlink,
)
from libmshare.errors import (
    AccessDenied,
    AddressTaken,
    Busy,
    Corrupt,
    DaemonGone,
    ImageError,
    Mismatch,
    MshareError,
    NoMemory,
    NoSuchRegion,
    NotMounted,
    OwnerDied,
    RegionExists,
    Stale,
)
from libmshare.region import Identity, Pin, Region
from libmshare.sync import Atomic, Lock, Semaphore

__all__ = [
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "AccessDenied",
    "AddressTaken",
    "Atomic",
    "Busy",
    "Corrupt",
    "DaemonGone",
    "HeapInfo",
    "Identity",
    "ImageError",
    "Lock",
    "Mismatch",
    "MshareError",
    "NoMemory",
    "NoSuchRegion",
    "NotMounted",
    "OwnerDied",
    "Pin",
    "Region",
    "RegionExists",
    "RegionInfo",
    "Semaphore",
    "Stale",
    "__version__",
    "alignment",
    "by_reference",
    "mshare",
    "mshare_attach",
    "mshare_detach",
    "mshare_madvise",
    "mshare_mmap",
    "mshare_mprotect",
    "mshare_msync",
    "mshare_munmap",
    "mshare_root",
    "mshare_stat",
    "mshare_unlink",
]


if TYPE_CHECKING:
    from libmshare.arrays import by_reference

    __version__: str
else:
    # (Seen by type checkers, it would have every name be there.)
    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib import metadata  # noqa: PLC0415 - it takes longer than all the rest

            return metadata.version("msharefs")
        if name == "by_reference":
            from libmshare.arrays import by_reference  # noqa: PLC0415 - numpy is optional

            return by_reference
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
