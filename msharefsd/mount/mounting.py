"""Getting a mountpoint, and giving it back.

sysfs refuses mkdir, so /sys/fs/mshare cannot simply be made.  As root the daemon
grafts: a small tmpfs goes over /sys/fs that shows every old entry, and mshare
beside them.

How it is put together matters on systems where mounts propagate (systemd makes /
shared).  Mounting the empty tmpfs first would show other mount namespaces an empty
/sys/fs, without cgroups, for good.  So the whole tree is built on a private mount
aside and then bound over /sys/fs in one step; propagation copies it whole.  And the
entries are slaves of what they show: unmounting a peer would unmount the original,
the machine's cgroups, with it.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
import subprocess
from pathlib import Path
from typing import Final

import trio

from msharefsd.linux import syscalls
from msharefsd.linux.mounts import Mount, mounts, top_mount

log = logging.getLogger(__name__)

SYS_FS: Final = "/sys/fs"
FSTYPE: Final = "fuse.msharefs"
GRAFT_SOURCE: Final = "msharefs-graft"
PROBE_SECONDS: Final = 5.0


class MountError(Exception):
    """The mountpoint cannot be had; the text says why and what to do."""


def is_mounted(mountpoint: str) -> bool:
    """Whether what is seen at `mountpoint` is a msharefs, of a living daemon or not."""
    mount = top_mount(mountpoint)
    return mount is not None and mount.fstype == FSTYPE


def clear_stale(mountpoint: str) -> None:
    """Take down mounts of dead daemons at `mountpoint`.

    Such a mount answers ENOTCONN, to mount(2) as well, so it must go first; lazily,
    because files in it may be open.  Raises MountError if a daemon is alive there.
    """
    while is_mounted(mountpoint):
        if not _is_dead(mountpoint):
            raise MountError(
                f"msharefs is mounted on {mountpoint} and its daemon lives: stop that one first, "
                "or choose another --mountpoint"
            )
        log.warning("taking down the mount that a dead daemon left on %s", mountpoint)
        unmount(mountpoint)


def _is_dead(mountpoint: str) -> bool:
    # In a process of its own: a stat() of a mount whose daemon is stuck may never
    # return, and a thread could not be left behind.
    probe = subprocess.Popen(
        ["stat", "--file-system", "--", mountpoint],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={"LC_ALL": "C", "PATH": os.defpath},
        text=True,
    )
    try:
        _, complaint = probe.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        probe.kill()
        raise MountError(
            f"the mount on {mountpoint} does not answer: find its daemon, or "
            f"umount --lazy {mountpoint}"
        ) from None
    return probe.returncode != 0 and os.strerror(errno.ENOTCONN) in complaint


def unmount(mountpoint: str) -> None:
    """Detach a mount; an ordinary user's through fusermount3.  Never raises."""
    try:
        if os.geteuid() == 0:
            syscalls.umount(mountpoint, syscalls.MNT_DETACH)
        else:
            subprocess.run(
                ["fusermount3", "-u", "-z", "--", mountpoint], check=True, capture_output=True
            )
    except (OSError, subprocess.CalledProcessError) as error:
        log.error("cannot unmount %s: %s", mountpoint, error)


def prepare(mountpoint: str, workspace: Path) -> bool:
    """Make `mountpoint` a directory that can be mounted on.

    Grafts /sys/fs if it must, with `workspace` (an empty directory) to build in.
    Returns whether /sys/fs is grafted, now or by a daemon before.  Raises
    MountError.
    """
    clear_stale(mountpoint)
    parent = os.path.dirname(mountpoint)
    if not os.path.isdir(mountpoint):
        if parent == SYS_FS and os.geteuid() == 0:
            _graft(os.path.basename(mountpoint), workspace)
        else:
            try:
                os.makedirs(mountpoint, mode=0o755, exist_ok=True)
            except OSError as error:
                raise MountError(
                    f"cannot make {mountpoint}: {error.strerror}; an ordinary user's daemon "
                    "needs --mountpoint in a directory of theirs"
                ) from error
    return parent == SYS_FS and is_grafted()


def is_grafted() -> bool:
    """Whether what is seen at /sys/fs is our graft."""
    mount = top_mount(SYS_FS)
    return mount is not None and mount.source == GRAFT_SOURCE


def ungraft() -> None:
    """Show the kernel's /sys/fs again."""
    if is_grafted():
        syscalls.umount(SYS_FS, syscalls.MNT_DETACH)


def _graft(name: str, workspace: Path) -> None:
    aside = str(workspace)
    log.info("grafting %s/%s: sysfs has no mkdir", SYS_FS, name)
    try:
        syscalls.mount(
            GRAFT_SOURCE,
            aside,
            "tmpfs",
            syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC,
            "mode=755,size=1m",
        )
    except OSError as error:
        raise MountError(
            f"cannot mount a tmpfs over {SYS_FS} ({error.strerror}): CAP_SYS_ADMIN is needed; "
            "choose another --mountpoint, /run/mshare for instance"
        ) from error
    try:
        syscalls.mount("", aside, None, syscalls.MS_PRIVATE)
        for entry in sorted(os.listdir(SYS_FS)):
            old, new = os.path.join(SYS_FS, entry), os.path.join(aside, entry)
            if stat.S_ISDIR(os.lstat(old).st_mode):
                os.mkdir(new)
                syscalls.mount(old, new, None, syscalls.MS_BIND | syscalls.MS_REC)
                syscalls.mount("", new, None, syscalls.MS_SLAVE | syscalls.MS_REC)
        os.mkdir(os.path.join(aside, name))
        syscalls.mount(aside, SYS_FS, None, syscalls.MS_BIND | syscalls.MS_REC)
    except OSError as error:
        raise MountError(f"cannot graft {SYS_FS}/{name}: {error}") from error
    finally:
        syscalls.umount(aside, syscalls.MNT_DETACH)


async def until_unmounted(mount: Mount) -> None:
    """Return when `mount` is no longer in this namespace.

    The kernel does not tell us: .control is a socket bound in the mount and keeps
    the file system in use after a lazy unmount, so reads of /dev/fuse go on.  But
    /proc/self/mountinfo polls as exceptional when mounts change
    (proc_pid_mountinfo(5)), and through an epoll set that is readable for trio.
    """
    table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with select.epoll() as changes:
            changes.register(table, select.EPOLLPRI | select.EPOLLERR)
            while mount in mounts():
                await trio.lowlevel.wait_readable(changes)
                changes.poll(0)
    finally:
        os.close(table)


def mount_options() -> set[str]:
    """Options for pyfuse3.init(): root serves everybody, a user only themselves."""
    options = {"fsname=msharefs", "subtype=msharefs", "default_permissions"}
    if os.geteuid() == 0:
        options.add("allow_other")
    return options
