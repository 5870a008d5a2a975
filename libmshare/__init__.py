"""libmshare: memory regions that many processes map at one address.

`mshare()` and `mshare_unlink()` are the calls of the mshare patches, as in C;
`Region` is the same for people.
"""

from libmshare.core import (
    RegionInfo,
    mshare,
    mshare_attach,
    mshare_detach,
    mshare_mmap,
    mshare_mprotect,
    mshare_msync,
    mshare_munmap,
    mshare_root,
    mshare_stat,
    mshare_unlink,
)
from libmshare.region import Region

__all__ = [
    "Region",
    "RegionInfo",
    "mshare",
    "mshare_attach",
    "mshare_detach",
    "mshare_mmap",
    "mshare_mprotect",
    "mshare_msync",
    "mshare_munmap",
    "mshare_root",
    "mshare_stat",
    "mshare_unlink",
]
