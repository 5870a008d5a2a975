"""What can be set, from the command line and from a TOML file."""

from __future__ import annotations

import contextlib
import grp
import ipaddress
import os
import pwd
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from msharefsd.linux import hugepages
from msharefsd.linux.features import Capabilities
from msharefsd.linux.mounts import top_mount

UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SMALLEST_ALIGNMENT: Final = 2 << 20
LARGEST_ALIGNMENT: Final = 1 << 46
LARGEST_SIZE: Final = 1 << 63
_LONGEST_PATH: Final = 107
"""sun_path, unix(7), with its end."""
_LAST_PORT: Final = 65535
_NEEDED: Final = ("/dev/shm", "/dev/fuse", "/proc", "/sys/fs")  # noqa: S108 - not to use it
"""What must be seen whatever is mounted; with the run directory."""
_UNPRIVILEGED: Final = Path("/proc/sys/vm/unprivileged_userfaultfd")


class ConfigError(Exception):
    """A setting that cannot be; the text says which and why."""


NO_LIMIT: Final = "unlimited"

Count = Annotated[int, msgspec.Meta(ge=0)] | Literal["unlimited"]


class Allowance(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What one user may have: see limits.py."""

    regions: Count = 1024
    memory: str = "90%"
    """A size, or a percentage of what there is for regions in all."""
    sharers: Count = 4096
    objects: Count = 65530
    connections: Count = 8192
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8

    def check(self) -> None:
        """Raise ConfigError for a size that is none."""
        share_of(self.memory, 0)


def unlimited(threads: int) -> Allowance:
    """An allowance without limits but that of threads."""
    none: Final = NO_LIMIT
    return Allowance(
        regions=none,
        memory=none,
        sharers=none,
        objects=none,
        connections=none,
        threads=threads,
    )


UNLIMITED: Final = unlimited(8)


class LimitSettings(Allowance, frozen=True, kw_only=True):
    """`[limits]`, and in `[limits.user.NAME]` what differs for one user."""

    reserve: str = "5%"
    """What there is for regions in all, of which this much is only for users who hold less."""

    user: dict[str, dict[str, int | str]] = {}

    def users(self) -> dict[int, Allowance]:
        """The users that have limits of their own.  Raises ConfigError."""
        share_of(self.reserve, 0)
        base = {name: getattr(self, name) for name in Allowance.__struct_fields__}
        found = {}
        for name, own in self.user.items():
            try:
                uid = int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
                allowance = msgspec.convert({**base, **own}, Allowance)
            except KeyError:
                raise ConfigError(f"[limits.user.{name}]: no such user") from None
            except msgspec.ValidationError as error:
                raise ConfigError(f"[limits.user.{name}]: {error}") from error
            allowance.check()
            found[uid] = allowance
        return found


@dataclass(frozen=True, slots=True)
class Listen:
    """A socket to listen on: of loopback, or a path."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"


def _listen(text: str) -> Listen:
    """Raises ConfigError."""
    path = text.removeprefix("unix:")
    if path.startswith("/"):
        if len(os.fsencode(path)) > _LONGEST_PATH:
            raise ConfigError(f"metrics_listen: a socket's path has {_LONGEST_PATH} bytes at most")
        return Listen(path=path)
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]") or "127.0.0.1")
        number = int(port)
    except ValueError:
        address, number = ipaddress.ip_address("0.0.0.0"), 0  # noqa: S104 - to be refused
    if not address.is_loopback or not 1 <= number <= _LAST_PORT:
        raise ConfigError(
            f"metrics_listen: {text!r}; write 9469, 127.0.0.1:9469, [::1]:9469 or /run/NAME.socket "
            "(for other machines have a proxy that knows who may read it)"
        )
    return Listen(str(address), number)


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Settings, by their names in the file.  Sizes are text: "512G", "64M", "4096"."""

    mountpoint: str = ""
    alignment: str = "512G"
    backing: Literal["shm", "hugetlb"] = "shm"
    huge_page: str = "2M"
    region_memory: str | None = None
    collapse: bool = True
    collapse_seconds: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 1.0
    run_directory: str = ""
    idle_seconds: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 10.0
    """After how long a process or thread for a user ends who has nothing here any more."""
    fill_seconds: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 60.0
    """How long who touches missing contents of an image waits without a sign of who brings them."""
    userfaultfd: str = "auto"
    """Who may be handed /dev/userfaultfd: "all", "none", "group:NAME"; "auto" is what
    vm.unprivileged_userfaultfd says of ordinary users."""
    connect_group: str = ""
    """Who may connect to .control: a group, or everybody."""
    limits: LimitSettings = LimitSettings()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json", "journal"] = "text"
    metrics_listen: str = ""
    """Where Prometheus may scrape: a port of loopback, an address of it, a path; or nowhere."""
    without: Annotated[frozenset[str], msgspec.Meta(description="features not to use")] = (
        frozenset()
    )

    @property
    def alignment_bytes(self) -> int:
        """The alignment of addresses and sizes of regions."""
        value = parse_size(self.alignment)
        if value & (value - 1) or not SMALLEST_ALIGNMENT <= value <= LARGEST_ALIGNMENT:
            raise ConfigError("alignment must be a power of two from 2M to 64T")
        return value

    @property
    def region_memory_bytes(self) -> int | None:
        """The most memory that a region may hold."""
        return None if self.region_memory is None else parse_size(self.region_memory)

    @property
    def huge_page_bytes(self) -> int:
        """The size of the pages of the `hugetlb` backing."""
        value = parse_size(self.huge_page)
        sizes = hugepages.sizes()
        if sizes and value not in sizes:
            known = ", ".join(
                f"{size >> 20}M" if size < UNITS["G"] else f"{size >> 30}G" for size in sizes
            )
            raise ConfigError(f"no huge pages of {self.huge_page}: this kernel has {known}")
        return value

    @property
    def control_group(self) -> int | None:
        """The group that may connect; None for everybody.  Raises ConfigError."""
        return _group(self.connect_group) if self.connect_group else None

    @property
    def metrics_address(self) -> Listen | None:
        """Where metrics are served; None for nowhere.  Raises ConfigError."""
        return _listen(self.metrics_listen) if self.metrics_listen else None

    def words(self) -> list[str]:
        """The options that say which daemon this is, as a shell reads them."""
        said = []
        if self.mountpoint != _usual_mountpoint():
            said.append(f"--mountpoint={shlex.quote(self.mountpoint)}")
        if self.run_directory != _usual_run_directory(self.mountpoint):
            said.append(f"--run-directory={shlex.quote(self.run_directory)}")
        return said

    def may_have_device(self, groups: Collection[int]) -> bool:
        """Whether a user in those groups may be handed /dev/userfaultfd."""
        kind, _, name = self.userfaultfd.partition(":")
        if kind == "group":
            return _group(name) in groups
        if kind == "auto":
            with contextlib.suppress(OSError, ValueError):
                return int(_UNPRIVILEGED.read_text()) == 1
        return kind == "all"

    def resolved(self) -> Config:
        """With the defaults that depend on who runs the daemon; and checked."""
        mountpoint = self.mountpoint or _usual_mountpoint()
        if not mountpoint:
            raise ConfigError("no --mountpoint, and XDG_RUNTIME_DIR is not set")
        mountpoint = _without_links(mountpoint)
        run = self.run_directory or _usual_run_directory(mountpoint)
        if not run:
            raise ConfigError("no --run-directory, and XDG_RUNTIME_DIR is not set")
        run = os.path.abspath(run)
        _check_mountpoint(mountpoint, run)
        config = msgspec.structs.replace(self, mountpoint=mountpoint, run_directory=run)
        _ = config.alignment_bytes, config.region_memory_bytes, config.huge_page_bytes
        _ = config.control_group, config.metrics_address
        kind, _, name = config.userfaultfd.partition(":")
        if kind == "group":
            _group(name)
        elif name or kind not in ("auto", "all", "none"):
            raise ConfigError('userfaultfd is "auto", "all", "none" or "group:NAME"')
        unknown = config.without - {field.name for field in fields(Capabilities)}
        if unknown:
            raise ConfigError(f"no such feature: {', '.join(sorted(unknown))}")
        _ = config.limits.users()
        config.limits.check()
        return config


def _usual_mountpoint() -> str:
    """Where we mount without --mountpoint; empty if there is no such place."""
    if os.geteuid() == 0:
        return "/sys/fs/mshare"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return _without_links(f"{runtime}/mshare") if runtime else ""


def _without_links(path: str) -> str:
    """The path as the mount table has it, which knows no links; /var/run is one usually.

    What is mounted there already is not looked at: its daemon may never answer.
    """
    path = os.path.abspath(path)
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return path if top_mount(path) else os.path.realpath(path)


def _usual_run_directory(mountpoint: str) -> str:
    """One directory a mountpoint, so that daemons do not meet; empty if there is no place."""
    runtime = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR")
    name = mountpoint.strip("/").replace("-", "--").replace("/", "-")
    return f"{runtime}/msharefs/{name}" if runtime else ""


def _check_mountpoint(mountpoint: str, run_directory: str) -> None:
    """Raise ConfigError if what we need ourselves would be hidden by the mount.

    Whoever looks there would wait for us, and so would we.
    """
    needed = (*_NEEDED, os.path.realpath(run_directory))
    for place in needed:
        if os.path.commonpath([mountpoint, place]) == mountpoint:
            raise ConfigError(
                f"the mountpoint {mountpoint} would hide {place}, which msharefsd needs itself: "
                "choose a directory of its own, /run/mshare for instance"
            )


def _group(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"no such group: {name!r}") from None


def parse_size(text: str) -> int:
    """Bytes from "512G"; units are powers of 1024.  Raises ConfigError."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise ConfigError(f"not a size: {text!r}; write 4096, 64M, 512G")
    return int(match[1]) * UNITS[match[2]]


def share_of(text: str, whole: int) -> int:
    """Bytes from "64G", or from "90%" of `whole` bytes.  Raises ConfigError.

    "unlimited" is more than there can be.
    """
    if text == NO_LIMIT:
        return LARGEST_SIZE
    if match := re.fullmatch(r"(\d{1,3})%", text.strip()):
        return whole * int(match[1]) // 100
    return parse_size(text)


def load(path: Path | None, overrides: dict[str, object]) -> Config:
    """The file's settings, those of the command line over them.  Raises ConfigError."""
    settings: dict[str, object] = {}
    try:
        if path is not None:
            settings = msgspec.toml.decode(path.read_bytes(), type=dict[str, object])
        return msgspec.convert({**settings, **overrides}, Config).resolved()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path or 'settings'}: {error}") from error
