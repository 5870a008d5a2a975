"""The graft: how /sys/fs comes to have a directory that sysfs does not make.

sysfs refuses mkdir, so /sys/fs/mshare cannot simply be made.  As root the daemon grafts: a
small tmpfs goes over /sys/fs that shows every old entry, and mshare beside them.

*Propagation.*  systemd makes / shared.  Mounting the empty tmpfs first would show other
mount namespaces an empty /sys/fs, without cgroups, for good.  So the whole tree is built on
a private mount aside and then bound over /sys/fs in one step; propagation copies it whole.
And the entries are slaves of what they show: unmounting a peer would unmount the original,
the machine's cgroups, with it.

*User namespaces.*  Whoever makes one may mount sysfs there only if a sysfs is "fully
visible" to them already (mnt_already_visible(), fs/namespace.c): mounted by its root, with
nothing over it but what lies on directories that sysfs keeps for that.  /sys/fs is none of
these, so the graft alone would keep rootless containers from starting.  But the kernel looks
for *any* such mount, not for the one on /sys.  So the graft has one more of all of sysfs,
without what is mounted in it, in a directory that is closed to all but root; LXC does the
same for containers in containers.  It may not be read-only: then so would theirs have to be.

*File systems that come later.*  A module makes its directory in /sys/fs, under the graft.
There the second sysfs has it, and from there it is bound beside the others (`Graft.look`).

*What stays.*  Each mount below /sys/fs is in the mount table twice: covered, and in the
graft.  Who reads the table keeps one of the two, which are the same.  To have it once the
covered one had to be taken off, and then the machine's cgroups would be gone with a graft
that somebody unmounts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from pathlib import Path
from typing import Final

from msharefsd.errors import StartError
from msharefsd.linux import syscalls
from msharefsd.linux.mounts import mounts, top_mount

log = logging.getLogger(__name__)

SYS_FS: Final = "/sys/fs"
SOURCE: Final = "msharefs-graft"
OWN: Final = ".msharefs"
"""What we need ourselves, beside the entries: nobody else enters it."""
WHOLE: Final = f"{SYS_FS}/{OWN}/sys"
"""All of sysfs, once more."""


def is_there() -> bool:
    """Whether what is seen at /sys/fs is our graft."""
    mount = top_mount(SYS_FS)
    return mount is not None and mount.source == SOURCE


def shows_all_of_sysfs() -> bool:
    """Whether user namespaces can mount sysfs, as far as the graft is concerned."""
    mount = top_mount(WHOLE)
    return mount is not None and mount.root == "/"


def put_in(name: str, workspace: Path) -> None:
    """Have a directory `name` in /sys/fs, with `workspace` to build a graft in.

    Raises StartError.
    """
    if is_there():  # another daemon's, or a dead one's
        _make(os.path.join(SYS_FS, name))
        return
    aside = str(workspace)
    log.info("grafting %s/%s: sysfs has no mkdir", SYS_FS, name)
    try:
        syscalls.mount(
            SOURCE,
            aside,
            "tmpfs",
            syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC,
            "mode=755,size=1m",
        )
    except OSError as error:
        raise StartError(
            f"cannot mount a tmpfs over {SYS_FS} ({error.strerror}): CAP_SYS_ADMIN is needed; "
            "choose another --mountpoint, /run/mshare for instance"
        ) from error
    try:
        syscalls.mount("", aside, None, syscalls.MS_PRIVATE)
        for entry in sorted(os.listdir(SYS_FS)):
            old = os.path.join(SYS_FS, entry)
            if stat.S_ISDIR(os.lstat(old).st_mode):
                _bind(old, os.path.join(aside, entry))
        _show_all_of_sysfs(os.path.join(aside, OWN))
        os.mkdir(os.path.join(aside, name))
        syscalls.mount(aside, SYS_FS, None, syscalls.MS_BIND | syscalls.MS_REC)
    except OSError as error:
        raise StartError(f"cannot graft {SYS_FS}/{name}: {error}") from error
    finally:
        syscalls.umount(aside, syscalls.MNT_DETACH)


def _make(directory: str) -> None:
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
    except OSError as error:
        raise StartError(f"cannot make {directory}: {error.strerror}") from error


def _bind(old: str, new: str) -> None:
    os.mkdir(new)
    syscalls.mount(old, new, None, syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.mount("", new, None, syscalls.MS_SLAVE | syscalls.MS_REC)


def _show_all_of_sysfs(own: str) -> None:
    os.mkdir(own, mode=0o700)
    whole = os.path.join(own, os.path.basename(WHOLE))
    os.mkdir(whole)
    try:
        # Not MS_REC: what is mounted in /sys would be there twice, and the graft over it.
        syscalls.mount("/sys", whole, None, syscalls.MS_BIND)
        syscalls.mount("", whole, None, syscalls.MS_PRIVATE)
    except OSError as error:
        # In a container, whose own mounts may hide some of it (EINVAL).
        log.info("user namespaces cannot mount sysfs while we serve: %s", error.strerror)


def take_out(name: str, *, fstype: str) -> None:
    """The directory `name` goes, and the graft with it if no mount of `fstype` is in it."""
    if not is_there():
        return
    if any(m.target.startswith(f"{SYS_FS}/") and m.fstype == fstype for m in mounts()):
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(SYS_FS, name))
    else:
        take_away()


def take_away() -> None:
    """Show the kernel's /sys/fs again."""
    if is_there():
        syscalls.umount(SYS_FS, syscalls.MNT_DETACH)


class Graft:
    """Follows what the kernel has in /sys/fs."""

    def __init__(self) -> None:
        self._seen = _entries()

    def look(self) -> None:
        """Show what has come, and show no more what has gone.  Never raises.

        A module that was loaded again has made another directory of the same name.
        """
        now = _entries()
        if now == self._seen:
            return
        for name in {each for each, _ in now ^ self._seen}:
            place = os.path.join(SYS_FS, name)
            try:
                if any(m.target == place and m.fstype == "sysfs" for m in mounts()):
                    syscalls.umount(place, syscalls.MNT_DETACH)
                    os.rmdir(place)
                if name in {each for each, _ in now}:
                    _bind(os.path.join(WHOLE, "fs", name), place)
            except OSError as error:
                log.warning("cannot show %s as it is now: %s", place, error)
        self._seen = now


def _entries() -> frozenset[tuple[str, int]]:
    """What there is, with the number that tells one directory from the next of its name."""
    with contextlib.suppress(OSError), os.scandir(os.path.join(WHOLE, "fs")) as found:
        return frozenset((each.name, each.inode()) for each in found if each.is_dir())
    return frozenset()
