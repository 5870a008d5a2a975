"""`mshare doctor`: what this kernel, these rights and this configuration allow."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from libmshare.cli import collapsible, output, regions
from libmshare.cli.ask import bounded
from libmshare.cli.errors import CommandError, explain
from libmshare.cli.output import Column, printable
from msharefsd.config import ConfigError, load
from msharefsd.linux import features, hugepages, mounts
from msharefsd.linux.uffd import DEVICE
from msharefsd.memory.hugetlb import Pool
from msharefsd.memory.names import IDENTITY_FILE, prefix
from msharefsd.memory.shm import MARK, SHM_DIRECTORY
from msharefsd.mount import graft, mounting
from msharefsd.telemetry.figures import plural

_DESCRIPTORS_A_SHARER: Final = 3
"""In the daemon: see msharefsd(8)."""
_SILENCE: Final = re.compile(
    r'^msharefs_pager_silent_seconds\{pid="(\d+)",uid="(\d+)"\} ([\d.e+-]+)$', re.MULTILINE
)
_LOST_FILES: Final = re.compile(r"^msharefs_lost_files_total ([\d.e+-]+)$", re.MULTILINE)
_MARK: Final = re.compile(rf"({MARK}[0-9a-f]{{8}}-[0-9a-f]{{16}})-\d+-")
_SILENT_SECONDS: Final = 3.0
_GIB: Final = 1 << 30
_USUAL_MAP_COUNT: Final = 65530
_COLUMNS: Final = (Column(""), Column("CHECK"), Column("FOUND"))


class Status(StrEnum):
    """How it stands."""

    OK = "ok"
    WARN = "warn"
    """It works, with less."""
    FAIL = "fail"
    """It does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the result."""

    check: str
    status: Status
    found: str
    advice: str = ""
    """What to do, or what follows."""

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "check": self.check,
            "status": self.status.value,
            "found": self.found,
            "advice": self.advice,
        }


def doctor(timeout: float, config: str | None, *, json: bool) -> bool:
    """Check and print; returns whether nothing failed.

    `timeout`: seconds that a daemon has for its answer.
    """
    found = [
        _kernel(),
        *_capabilities(),
        *_mounts(timeout),
        *_graft(timeout),
        *_configuration(config),
        _fuse(),
        _device(),
        *_shared_memory(),
        *_left_memory(timeout),
        *_forsaken(timeout),
        *_huge_pages(),
        *_page_tables(),
        _map_count(),
        _overcommit(),
        _descriptors(),
        _cgroup(),
    ]
    if json:
        output.write_json([each.record() for each in found])
    else:
        for each in found:
            output.write(f"{each.status:<4}  {each.check}: {each.found}")
            if each.advice:
                output.write(f"      {each.advice}")
    return all(each.status is not Status.FAIL for each in found)


def _number(path: str) -> int | None:
    """A setting in /proc or /sys; None if it is not there."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def _kernel() -> Finding:
    system = platform.uname()
    found = f"{system.system} {system.release} {system.machine}"
    if system.system == "Linux" and system.machine in ("x86_64", "aarch64"):
        return Finding("kernel", Status.OK, found)
    return Finding("kernel", Status.FAIL, found, "msharefs needs Linux on x86-64 or arm64")


def _capabilities() -> Iterator[Finding]:
    """What msharefsd would find if this user started it."""
    try:
        found = features.probe()
    except features.UnsupportedError as error:
        yield Finding("userfaultfd", Status.FAIL, "no", str(error))
        return
    yield Finding("userfaultfd", Status.OK, "knows shared memory")
    lacking = iter(found.missing())
    for item in fields(found):
        if getattr(found, item.name):
            yield Finding(f"feature {item.name}", Status.OK, "yes")
        else:
            yield Finding(f"feature {item.name}", Status.WARN, "no", next(lacking))


def _mounts(timeout: float) -> Iterator[Finding]:
    root = None
    try:
        root = bounded(regions.root, timeout)
        unit = bounded(lambda: _ask(root), timeout)
        found = f"{printable(root)}, alignment {output.size(unit)}; its daemon answers"
        yield Finding("mount", Status.OK, found)
        text = bounded(lambda: _metrics(root), timeout)
        yield from _pagers(_silence(text))
        yield from _state(text)
    except CommandError as failure:
        yield Finding("mount", Status.FAIL, printable(root) if root else "none", str(failure))
    others = {mount.target for mount in mounts.mounts() if mount.fstype == mounting.FSTYPE}
    for target in sorted(others - {root}):
        yield _other_mount(target, timeout)


def _graft(timeout: float) -> Iterator[Finding]:
    """/sys/fs, if a daemon that mounts there has taken its place."""
    if not graft.is_there():
        return
    within = sorted(
        mount.target
        for mount in mounts.mounts()
        if mount.fstype == mounting.FSTYPE and os.path.dirname(mount.target) == graft.SYS_FS
    )
    found = f"a graft, for {' '.join(map(printable, within)) if within else 'no mount'}"
    if not any(_other_mount(target, timeout).status is Status.OK for target in within):
        advice = "no daemon needs it: msharefsd --ungraft shows the kernel's again"
        yield Finding(graft.SYS_FS, Status.WARN, found, advice)
    elif not graft.shows_all_of_sysfs():
        yield Finding(
            graft.SYS_FS,
            Status.WARN,
            found,
            "user namespaces cannot mount sysfs, and rootless containers do not start: restart "
            "msharefsd, or have it mount on /run/mshare (--mountpoint)",
        )
    else:
        yield Finding(
            graft.SYS_FS,
            Status.OK,
            found,
            "a tmpfs that shows every entry: mounts below it, cgroups, are in the mount table "
            "twice; msharefsd --mountpoint=/run/mshare does without",
        )


def _metrics(root: str) -> str:
    """What the daemon counts.  Raises CommandError."""
    try:
        return Path(f"{root}/.metrics").read_text(encoding="utf-8")
    except OSError as error:
        raise explain(error, b".metrics") from None


def _state(text: str) -> Iterator[Finding]:
    """Whether the next daemon will find what this one knows."""
    lost = _LOST_FILES.search(text)
    if lost is not None and float(lost[1]) > 0:
        yield Finding(
            "state",
            Status.FAIL,
            f"{float(lost[1]):.0f} files of the run directory were removed under the daemon",
            "its log names them.  Regions go on while it runs, and the next one will not know "
            "them: save what they hold, end the programs that use them, and start it anew",
        )


def _silence(text: str) -> list[tuple[str, str, float]]:
    """User, process and seconds without an answer of each pager."""
    return [(uid, pid, float(seconds)) for pid, uid, seconds in _SILENCE.findall(text)]


def _pagers(pagers: list[tuple[str, str, float]]) -> Iterator[Finding]:
    """Each user's memory is served by a process, and may keep that process waiting."""
    silent = [each for each in pagers if each[2] > _SILENT_SECONDS]
    for uid, pid, seconds in silent:
        yield Finding(
            f"pager of user {uid}",
            Status.FAIL,
            f"process {pid} has not answered for {seconds:.0f} seconds",
            f"/proc/{pid}/stack says what it waits for: something that a process of user {uid} "
            "holds; nobody else's regions are concerned",
        )
    if not silent:
        yield Finding("pagers", Status.OK, f"{len(pagers)}, all answer")


def _ask(root: str) -> int:
    """The alignment of a living daemon, whose socket takes connections.  Raises CommandError."""
    unit = regions.alignment(root)
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            # A path through the descriptor: connect(2) takes 107 bytes.
            connection.connect(f"/proc/self/fd/{directory}/.control")
    except OSError as error:
        raise explain(error, b".control") from None
    finally:
        os.close(directory)
    return unit


def _other_mount(target: str, timeout: float) -> Finding:
    check = f"mount {printable(target)}"
    start = f"start msharefsd --mountpoint={printable(target)}"
    try:
        bounded(lambda: os.stat(f"{target}/mshare_info"), timeout)
        bounded(lambda: regions.alignment(target), timeout)
    except PermissionError:
        return Finding(check, Status.OK, "another user's")
    except OSError as error:
        lazy = f"{start} again, or umount --lazy {printable(target)}"
        return Finding(check, Status.WARN, error.strerror or "broken", lazy)
    except CommandError as failure:
        return Finding(check, Status.WARN, "no answer", str(failure))
    return Finding(check, Status.OK, "answers; programs that do not set MSHARE_ROOT use the other")


def _configuration(config: str | None) -> Iterator[Finding]:
    if config is None:
        return
    check = f"configuration {printable(config)}"
    try:
        settings = load(Path(config), {})
    except ConfigError as error:
        yield Finding(check, Status.FAIL, "wrong", str(error))
        return
    found = (
        f"mountpoint {printable(settings.mountpoint)}, alignment {settings.alignment}, "
        f"backing {settings.backing}"
    )
    yield Finding(check, Status.OK, found)


def _fuse() -> Finding:
    if not os.path.exists("/dev/fuse"):
        return Finding("FUSE", Status.FAIL, "no /dev/fuse", "load the module: modprobe fuse")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return Finding(
            "FUSE", Status.WARN, "no fusermount3", "a user's own daemon needs it: install fuse3"
        )
    if os.access("/dev/fuse", os.R_OK | os.W_OK):
        return Finding("FUSE", Status.OK, "/dev/fuse")
    return Finding(
        "FUSE", Status.WARN, "/dev/fuse is closed to this user", "use a daemon that root started"
    )


def _device() -> Finding:
    """Who may have a userfaultfd that takes faults in system calls."""
    sysctl = _number("/proc/sys/vm/unprivileged_userfaultfd")
    try:
        mode = f"{DEVICE} has mode {stat.S_IMODE(os.stat(DEVICE).st_mode):04o}"
    except OSError:
        mode = f"no {DEVICE}"
    found = f"vm.unprivileged_userfaultfd={sysctl}, {mode}"
    if os.geteuid() == 0 or sysctl == 1 or os.access(DEVICE, os.R_OK | os.W_OK):
        return Finding("userfaultfd for users", Status.OK, found)
    return Finding(
        "userfaultfd for users",
        Status.WARN,
        found,
        "a daemon that root started hands the device to its sharers; one of this user's cannot: "
        f"give access to {DEVICE}, or set vm.unprivileged_userfaultfd=1",
    )


def _shared_memory() -> Iterator[Finding]:
    options = _options_of(SHM_DIRECTORY)
    if options is None:
        yield Finding(
            SHM_DIRECTORY,
            Status.FAIL,
            "no tmpfs is mounted there",
            f"mount one: mount -t tmpfs tmpfs {SHM_DIRECTORY}",
        )
        return
    room = os.statvfs(SHM_DIRECTORY)
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    found = f"{output.size(total)}, {output.size(free)} free" if total else "without a limit"
    if total and free < total // 10:
        advice = "nearly full: a touch that finds no memory is SIGBUS; "
        advice += f"mount -o remount,size=SIZE {SHM_DIRECTORY}"
        yield Finding(SHM_DIRECTORY, Status.WARN, found, advice)
    else:
        yield Finding(SHM_DIRECTORY, Status.OK, found)
    # tmpfs(5): without the option it is "never".
    huge = next((word[5:] for word in options if word.startswith("huge=")), "never")
    yield Finding(
        f"{SHM_DIRECTORY} huge=",
        Status.OK,
        huge,
        "memory comes in 4 KiB pages, charged to who touches it; msharefsd makes huge pages of "
        "what several sharers have (feature collapse), with any huge=; other programs' files lie "
        "where those fit if it is advise: mount -o remount,huge=advise",
    )


def _left_memory(timeout: float) -> Iterator[Finding]:
    """Memory of regions that no msharefsd which is known here would find."""
    here = _marks_of_run_directories()
    with contextlib.suppress(CommandError):  # said already
        here |= bounded(_marks_of_regions, timeout)
    strange: dict[str, int] = {}
    for name in sorted(os.listdir(SHM_DIRECTORY)):
        match = _MARK.match(name)
        if match is None or match[1] in here:
            continue
        try:
            status = os.lstat(f"{SHM_DIRECTORY}/{name}")
        except FileNotFoundError:
            continue
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
            strange[name] = status.st_blocks * 512
    if not strange:
        return
    first = f"{SHM_DIRECTORY}/{next(iter(strange))}"
    held = output.size(sum(strange.values()))
    yield Finding(
        "memory of nobody known",
        Status.WARN,
        f"{plural(len(strange), 'object')} in {SHM_DIRECTORY}, {held}: {first}"
        + (f", {len(strange) - 1} more" if len(strange) > 1 else ""),
        "its run directory is in another container, elsewhere, or removed; if nobody has it "
        f"mapped (fuser {first}), save it (cp --sparse=always) and free it (rm)",
    )


def _forsaken(timeout: float) -> Iterator[Finding]:
    """Regions whose contents somebody has begun to fetch, and nobody does any more."""
    try:
        found = bounded(regions.everything, timeout)
    except CommandError:
        return  # of which the mount's line tells
    for region in found:
        if region.forsaken:
            yield Finding(
                f"region {printable(region.name)}",
                Status.WARN,
                f"{output.size(region.number('awaited'))} of its contents are missing, and no "
                "process fetches them",
                "mshare pull of the same image, by its owner, goes on with it; mshare rm gives up",
            )


def _marks_of_run_directories() -> set[str]:
    """What memory's names begin with, of daemons with the usual run directories."""
    found = set()
    for place in ("/run/msharefs", f"{os.environ.get('XDG_RUNTIME_DIR', '/nonexistent')}/msharefs"):
        try:
            directories = [Path(place, name) for name in os.listdir(place)]
        except OSError:
            continue
        for directory in directories:
            try:
                number = (directory / IDENTITY_FILE).read_text(errors="replace")
            except OSError:
                continue
            found.add(f"{prefix(directory).lstrip('/')}{number}")
    return found


def _marks_of_regions() -> set[str]:
    """The same, of the daemon that answers.  Raises CommandError."""
    backings = [each.info.get("backing", "") for each in regions.everything(removed=True)]
    matches = [_MARK.match(backing.partition(" ")[2].lstrip("/")) for backing in backings]
    return {match[1] for match in matches if match is not None}


def _options_of(target: str) -> list[str] | None:
    """The options of the tmpfs that is mounted there (proc_pid_mounts(5))."""
    found = None
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields_ = line.split(" ")
            if fields_[1] == target:
                found = fields_[3].split(",") if fields_[2] == "tmpfs" else None
    return found


def _huge_pages() -> Iterator[Finding]:
    """For the backing hugetlb, and for nothing else."""
    sizes = hugepages.sizes()
    if not sizes:
        yield Finding("huge pages", Status.WARN, "this kernel has none", "no backing hugetlb")
    for page in sizes:
        pool = Pool(Path("/"), page)
        check, found = f"huge pages of {output.size(page)}", f"{pool.total()}, {pool.free()} free"
        wanted = max(_GIB // page, 1)
        advice = f"for {output.size(wanted * page)} of them: {pool.command(wanted)}"
        if pool.free() >= wanted:
            yield Finding(check, Status.OK, found)
        elif pool.free() > 0:
            yield Finding(check, Status.OK, found, advice)
        else:
            yield Finding(check, Status.WARN, found, f"backing hugetlb needs some; {advice}")


def _page_tables() -> Iterator[Finding]:
    """For programs that are no clients of ours."""
    for line in collapsible.lines():
        status = Status.OK if line.good else Status.WARN
        yield Finding(line.check, status, line.found, line.advice)


def _map_count() -> Finding:
    count = _number("/proc/sys/vm/max_map_count")
    found = f"vm.max_map_count={count}"
    if count is None or count < _USUAL_MAP_COUNT:
        return Finding(
            "mappings",
            Status.WARN,
            found,
            "a region is one mapping in each sharer, and more where parts are write-protected: "
            f"sysctl vm.max_map_count={_USUAL_MAP_COUNT}",
        )
    return Finding("mappings", Status.OK, found)


def _overcommit() -> Finding:
    mode = _number("/proc/sys/vm/overcommit_memory")
    found = f"vm.overcommit_memory={mode}"
    if mode in (0, 1):
        return Finding("overcommit", Status.OK, found)
    return Finding(
        "overcommit",
        Status.WARN,
        found,
        "a process cannot map more than the machine has before it creates a region of that: "
        "create it empty and map into it (`mshare create`), or set vm.overcommit_memory=0",
    )


def _descriptors() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard
    if os.geteuid() == 0:  # which may raise its limit, and does
        most = max(most, min(_number("/proc/sys/fs/nr_open") or 0, 1 << 20))
    sharers = most // _DESCRIPTORS_A_SHARER
    found = f"RLIMIT_NOFILE {soft}, at most {most}: a daemon of this user has {sharers} sharers"
    if sharers >= 1000:
        return Finding("descriptors", Status.OK, found)
    return Finding(
        "descriptors",
        Status.WARN,
        found,
        "raise the hard limit: ulimit -Hn, or LimitNOFILE= of the daemon's unit",
    )


def _cgroup() -> Finding:
    """Who pays for memory is for cgroups to say (README)."""
    with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        controllers = [line.split(":")[1] for line in file]
    if any("memory" in names.split(",") for names in controllers):
        return Finding("cgroup", Status.OK, "version 1, with the memory controller")
    if "" in controllers:
        return Finding("cgroup", Status.OK, "version 2")
    return Finding("cgroup", Status.WARN, "none", "the memory of regions cannot be limited by it")
