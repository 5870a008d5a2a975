"""What this kernel and these rights allow: probed once at start, decides everything.

Each feature is tried, never derived from a version number: distributions
backport, containers filter.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from msharefsd.linux import syscalls, uffd
from msharefsd.linux.syscalls import HUGE_PAGE
from msharefsd.linux.uffd import Feature

WANTED: Final = (
    Feature.EVENT_REMAP
    | Feature.EVENT_FORK
    | Feature.MISSING_SHMEM
    | Feature.THREAD_ID
    | Feature.POISON
    | Feature.MINOR_SHMEM
    | Feature.WP
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.EXACT_ADDRESS
    | Feature.MISSING_HUGETLBFS
    | Feature.MINOR_HUGETLBFS
)
"""What is asked for on every sharer's userfaultfd, as far as the kernel has it."""


class UnsupportedError(Exception):
    """The daemon cannot work here; the text says what is missing and what helps."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What was found."""

    device: bool
    """/dev/userfaultfd can be handed to sharers that may not open it."""
    kernel_faults: bool
    """This process may have a userfaultfd that takes faults in system calls."""
    poison: bool
    """A hole can be EFAULT in system calls (UFFDIO_POISON, Linux 6.6)."""
    map_present: bool
    """A page poisoned for want of memory can be mended (UFFD_FEATURE_MINOR_SHMEM)."""
    write_protect: bool
    """Objects can be read-only (UFFD_FEATURE_WP_HUGETLBFS_SHMEM, Linux 5.19)."""
    exact_address: bool
    """A fault tells its byte, for si_addr (UFFD_FEATURE_EXACT_ADDRESS, Linux 5.18)."""
    collapse: bool
    """Small pages can be made huge ones (MADV_COLLAPSE, Linux 6.1)."""
    hugetlb: bool
    """Regions can be of huge pages (hugetlbfs, and the right to mount it)."""
    nowait: bool
    """A userfaultfd can be read without waiting, whatever its flags (Linux 6.10)."""
    map_files: bool
    """A donor's shared anonymous memory can be looked into (/proc/PID/map_files)."""
    inheritance: bool
    """A window that a child inherits is registered there, too (UFFD_FEATURE_EVENT_FORK)."""

    @property
    def features(self) -> Feature:
        """The features of UFFDIO_API for a sharer's userfaultfd."""
        features = WANTED
        if not self.poison:
            features &= ~Feature.POISON
        if not self.map_present:
            features &= ~Feature.MINOR_SHMEM
        if not self.write_protect:
            features &= ~(Feature.WP | Feature.WP_HUGETLBFS_SHMEM)
        if not self.hugetlb:
            features &= ~(Feature.MISSING_HUGETLBFS | Feature.MINOR_HUGETLBFS)
        if not self.exact_address:
            features &= ~Feature.EXACT_ADDRESS
        if not self.inheritance:
            features &= ~Feature.EVENT_FORK
        return features

    def missing(self) -> list[str]:
        """A sentence for each feature whose lack is felt."""
        return [
            LACKING[item.name]
            for item in fields(self)
            if item.name in LACKING and not getattr(self, item.name)
        ]


LACKING: Final = {
    "device": "/dev/userfaultfd cannot be opened (Linux 6.1, or its mode): sharers need "
    "vm.unprivileged_userfaultfd=1 or access to the device of their own",
    "kernel_faults": "no right to a full userfaultfd: a system call on a page that was never "
    "touched fails with EFAULT; set vm.unprivileged_userfaultfd=1 or give access to "
    "/dev/userfaultfd",
    "poison": "no UFFDIO_POISON (Linux 6.6): a system call on a hole raises SIGBUS instead of "
    "failing with EFAULT",
    "map_present": "no UFFD_FEATURE_MINOR_SHMEM (Linux 5.14): a page that had SIGBUS for want of "
    "memory keeps it in that process, and who may only read a region can put zeros where a file's "
    "contents or hidden memory belong",
    "write_protect": "no UFFD_FEATURE_WP_HUGETLBFS_SHMEM (Linux 5.19): objects that are not "
    "writable, and writable MAP_SHARED files, cannot be mapped",
    "inheritance": "no right to UFFD_FEATURE_EVENT_FORK (CAP_SYS_PTRACE): who undoes MADV_DONTFORK "
    "in a region by a call past the library, and makes a process by clone(2) and not by fork(3), "
    "has zeros there, and so have all",
    "exact_address": "no UFFD_FEATURE_EXACT_ADDRESS (Linux 5.18): si_addr of a SIGSEGV is the "
    "page's address",
    "collapse": "no MADV_COLLAPSE of shared memory (Linux 6.1, CONFIG_TRANSPARENT_HUGEPAGE): each "
    "sharer keeps its own page tables",
    "hugetlb": "no hugetlbfs, no UFFD_FEATURE_MINOR_HUGETLBFS (Linux 5.13), or no right to mount: "
    "the backing hugetlb cannot be had",
    "map_files": "no right to /proc/PID/map_files (CAP_CHECKPOINT_RESTORE): a donor's shared "
    "anonymous memory is searched with mincore(2), or page by page if some is swapped out",
}


def _userfaultfd() -> tuple[int, bool]:
    """A throw-away userfaultfd and whether it takes kernel-mode faults."""
    try:
        return uffd.open_new(), True
    except OSError:
        pass
    for flags, full in ((0, True), (uffd.USER_MODE_ONLY, False)):
        try:
            return uffd.open_by_system_call(flags), full
        except OSError as error:
            last = error
    raise UnsupportedError(
        f"no userfaultfd to be had ({last.strerror}): the kernel needs CONFIG_USERFAULTFD, and a "
        "container's seccomp filter must allow userfaultfd(2)"
    )


def probe(without: frozenset[str] = frozenset()) -> Capabilities:
    """Try everything.  `without` names features to do without, to test that.

    Raises UnsupportedError if msharefs cannot work here at all.
    """
    fd, full = _userfaultfd()
    try:
        # Asking for no features is always right and tells what there is.
        features = uffd.handshake(fd, Feature(0))
        nowait = uffd.can_read_without_waiting(fd)
    finally:
        os.close(fd)
    required = Feature.MISSING_SHMEM | Feature.THREAD_ID
    if features & required != required:
        raise UnsupportedError("userfaultfd does not know shared memory here: Linux 4.14 is needed")
    found = {
        "device": os.access(uffd.DEVICE, os.R_OK | os.W_OK),
        "kernel_faults": full,
        "poison": bool(features & Feature.POISON),
        "map_present": bool(features & Feature.MINOR_SHMEM),
        "write_protect": Feature.WP | Feature.WP_HUGETLBFS_SHMEM in features,
        "exact_address": Feature.EXACT_ADDRESS in features,
        "collapse": _can_collapse(),
        "hugetlb": (
            Feature.MISSING_HUGETLBFS | Feature.MINOR_HUGETLBFS in features
            and os.geteuid() == 0
            and "hugetlbfs" in Path("/proc/filesystems").read_text().split()
        ),
        "nowait": nowait,
        "map_files": _can_read_map_files(),
        "inheritance": _can_inherit(),
    }
    return Capabilities(**{name: has and name not in without for name, has in found.items()})


def _can_read_map_files() -> bool:
    # Opening an entry takes the right, listing them does not.
    directory = "/proc/self/map_files"
    try:
        for name in os.listdir(directory):
            os.close(os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC))
            return True
    except OSError:
        pass
    return False


def _can_inherit() -> bool:
    fd, _ = _userfaultfd()
    try:
        uffd.handshake(fd, Feature.EVENT_FORK)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _can_collapse() -> bool:
    size = 2 * HUGE_PAGE  # one aligned huge page lies in it
    memory = os.memfd_create("msharefsd", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, size)
        os.pwrite(memory, bytes(size), 0)
        prot = syscalls.PROT_READ | syscalls.PROT_WRITE
        # The address must be as far from a boundary as the offset is: find a place first.
        hint = syscalls.mmap(None, size, 0, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS, -1, 0)
        start = hint + -hint % HUGE_PAGE
        syscalls.munmap(hint, size)
        flags = syscalls.MAP_SHARED | syscalls.MAP_FIXED_NOREPLACE
        start = syscalls.mmap(start, HUGE_PAGE, prot, flags, memory, 0)
        try:
            syscalls.madvise(start, HUGE_PAGE, syscalls.MADV_COLLAPSE)
        finally:
            syscalls.munmap(start, HUGE_PAGE)
    except OSError as error:
        # A kernel that knows it may have no huge page to give just now (madvise(2)).
        return error.errno in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM)
    finally:
        os.close(memory)
    return True
