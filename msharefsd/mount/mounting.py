"""Getting a mountpoint, and giving it back."""

from __future__ import annotations

import errno
import logging
import os
import select
import subprocess
from pathlib import Path
from typing import Final

import trio

from msharefsd.errors import StartError
from msharefsd.linux import syscalls
from msharefsd.linux.mounts import Mount, mounts, top_mount
from msharefsd.mount import graft

log = logging.getLogger(__name__)

FSTYPE: Final = "fuse.msharefs"
PROBE_SECONDS: Final = 5.0


def is_mounted(mountpoint: str) -> bool:
    """Whether what is seen at `mountpoint` is a msharefs, of a living daemon or not."""
    mount = top_mount(mountpoint)
    return mount is not None and mount.fstype == FSTYPE


def clear_stale(mountpoint: str) -> None:
    """Take down mounts of dead daemons at `mountpoint`.

    Such a mount answers ENOTCONN, to mount(2) as well, so it must go first; lazily,
    because files in it may be open.  Raises StartError if a daemon is alive there.
    """
    while is_mounted(mountpoint):
        if not _is_dead(mountpoint):
            raise StartError(
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
        raise StartError(
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
    Returns whether it is in a graft, of now or of a daemon before.  Raises StartError.
    """
    clear_stale(mountpoint)
    directory, name = os.path.split(mountpoint)
    if not os.path.isdir(mountpoint):
        if directory == graft.SYS_FS and os.geteuid() == 0:
            graft.put_in(name, workspace)
        else:
            # Who may see the mount has to pass what is above it, whatever our umask.
            umask = os.umask(0o022)
            try:
                os.makedirs(mountpoint, mode=0o755, exist_ok=True)
            except OSError as error:
                advice = (
                    "choose another --mountpoint"
                    if os.geteuid() == 0
                    else "an ordinary user's daemon needs --mountpoint in a directory of theirs"
                )
                raise StartError(f"cannot make {mountpoint}: {error.strerror}; {advice}") from error
            finally:
                os.umask(umask)
    return directory == graft.SYS_FS and graft.is_there()


def give_back(mountpoint: str) -> None:
    """What `prepare` has put into /sys/fs; nothing is mounted there any more."""
    graft.take_out(os.path.basename(mountpoint), fstype=FSTYPE)


def ungraft() -> bool:
    """Show the kernel's /sys/fs again, if no daemon lives there; whether it was not shown.

    Raises StartError if one does.
    """
    if not graft.is_there():
        return False
    within = {m.target for m in mounts() if m.fstype == FSTYPE}
    for target in sorted(within):
        if os.path.dirname(target) == graft.SYS_FS:
            clear_stale(target)
    graft.take_away()
    return True


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
