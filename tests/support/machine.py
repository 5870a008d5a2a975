"""A machine with systemd as its PID 1, in a container.

It is made of this machine's own files: an overlay of / whose upper layer is in
memory, so what it writes is gone with it, and Python, its libraries and systemd are
those that are here, whichever they are.  Units that this machine has switched on are
not started.  All is in the mount namespace of the tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from conftest import BIN, CONNECTIONS, TESTS, Client

from libmshare import core
from msharefsd.linux import mounts, syscalls
from msharefsd.mount import mounting

DEVICES = {"/dev/fuse": 0o666, "/dev/userfaultfd": 0o600}
"""With the modes that they have where systemd makes them."""
PROGRAMS = Path("/opt/mshare-test")
"""Where the machine has the tests' programs; everybody can enter there."""
START_SECONDS = 60.0


AnyMachine = TypeVar("AnyMachine", bound="Machine")


class LackingError(Exception):
    """This machine cannot have such a machine; the text says what it lacks."""


class Mount(NamedTuple):
    """A line of mountinfo, as far as it matters."""

    device: str
    target: str
    fstype: str


def _cgroups(name: str) -> list[Path]:
    """A new cgroup beside us, in each hierarchy that systemd needs; it makes more below."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    made = []
    for mount in list(mounts.mounts()):
        if mount.fstype == "cgroup2":
            made.append(Path(mount.target) / own.get("", "") / name)
        elif mount.fstype == "cgroup" and mount.target.endswith("/systemd"):
            made.append(Path(mount.target) / own.get("name=systemd", "") / name)
    try:
        for group in made:
            group.mkdir()
    except OSError as error:
        raise LackingError(f"cgroups that can be made ({error})") from error
    return made


def _remove_cgroup(group: Path) -> None:
    for directory, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(directory)


class Machine:
    """One machine.  Everything is undone by stop(), whatever happened."""

    below = "/"
    """Whose files it has, and changes for itself alone."""

    def __init__(self, directory: Path, client_program: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.console = directory / "console"
        self.client_program = client_program
        self.leader = 0
        """The pid of its PID 1, as we see it."""
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._mounted = False
        self._clients: list[Client] = []
        self._cgroups: list[Path] = []

    # -- its life --

    def start(self) -> None:
        """Boot.  Raises LackingError."""
        if os.geteuid() != 0:
            raise LackingError("root")
        for program in ("systemd-nspawn", "nsenter", "setpriv"):
            if shutil.which(program) is None:
                raise LackingError(f"the program {program}")
        if not os.path.exists("/usr/lib/systemd/systemd"):
            raise LackingError("systemd itself, /usr/lib/systemd/systemd")
        for device in DEVICES:
            if not os.path.exists(device):
                raise LackingError(f"the device {device}")
        self._make_root()
        self._install()
        self._boot()

    def _make_root(self) -> None:
        syscalls.mount("mshare-test", str(self.directory), "tmpfs", 0, "mode=755")
        self._mounted = True
        upper, work = self.directory / "upper", self.directory / "work"
        for made in (upper, work, self.root):
            made.mkdir()
        try:
            syscalls.mount(
                "overlay",
                str(self.root),
                "overlay",
                0,
                f"lowerdir={self.below},upperdir={upper},workdir={work}",
            )
        except OSError as error:
            raise LackingError(f"overlayfs over {self.below} ({error.strerror})") from error
        # Nothing that this machine has switched on, mounts, or is called.
        etc = self.root / "etc"
        for name in ("system", "user", "system-generators"):
            shutil.rmtree(etc / "systemd" / name, ignore_errors=True)
            (etc / "systemd" / name).mkdir(parents=True)
        for name in ("fstab", "machine-id"):
            (etc / name).unlink(missing_ok=True)
            (etc / name).touch()
        shutil.rmtree(self.root / "var/log/journal", ignore_errors=True)

    def _install(self) -> None:
        build = self.directory / "build"
        meson = [str(BIN / "meson")]
        environment = os.environ | {"PATH": f"{BIN}:{os.environ.get('PATH', os.defpath)}"}
        setup = [*meson, "setup", f"--prefix={sys.prefix}", "--sysconfdir=/etc"]
        setup += ["-Dsystemd_unit_dir=/usr/lib/systemd", str(build), str(TESTS.parent)]
        install = [*meson, "install", "-C", str(build), "--no-rebuild", "--tags", "systemd"]
        install += ["--destdir", str(self.root)]
        for words in (setup, install):
            done = subprocess.run(
                words, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
        programs = self.root / PROGRAMS.relative_to("/")
        programs.mkdir(parents=True)
        shutil.copy(self.client_program, programs / "client")
        library = self.client_program.parent / core.LIBRARY
        if library.exists():
            shutil.copy(library, programs)
        # Ordinary users run Python, too.
        for prefix in (sys.prefix, sys.base_prefix):
            for parent in Path(prefix).parents:
                place = self.root / parent.relative_to("/")
                if place.exists():
                    place.chmod(place.stat().st_mode | 0o055)

    def _places(self) -> set[str]:
        """What it has of this machine's as it is."""
        return {sys.prefix, sys.base_prefix} - {"/usr"}

    def _node(self, device: str) -> Path:
        node = self.directory / os.path.basename(device)
        os.mknod(node, stat.S_IFCHR, os.stat(device).st_rdev)
        node.chmod(DEVICES[device])
        return node

    def _boot(self) -> None:
        command = [
            "systemd-nspawn",
            f"--directory={self.root}",
            "--machine=mshare-test",
            "--register=no",
            "--keep-unit",
            "--boot",
            "--console=read-only",
            "--private-users=no",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            # What the service has is its unit's doing, not the container's.
            "--capability=CAP_CHECKPOINT_RESTORE,CAP_IPC_LOCK,CAP_BPF,CAP_PERFMON",
            *(f"--bind={self._node(device)}:{device}" for device in DEVICES),
            *(f"--bind-ro={place}" for place in sorted(self._places())),
            "systemd.unit=basic.target",
            "systemd.mask=systemd-sysctl.service",
            "systemd.mask=systemd-udevd.service",
            "systemd.mask=dev-hugepages.mount",
            "systemd.mask=sys-kernel-debug.mount",
            "systemd.mask=sys-kernel-tracing.mount",
        ]
        self._cgroups = _cgroups(self.directory.name)
        groups = " ".join(str(group / "cgroup.procs") for group in self._cgroups)
        enter = f'for procs in {groups}; do echo $$ >"$procs" || exit; done; exec "$@"'
        with self.console.open("wb") as console:
            self._nspawn = subprocess.Popen(
                ["sh", "-c", enter, "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env=os.environ | {"SYSTEMD_SECCOMP": "0", "SYSTEMD_LOG_COLOR": "0"},
                cwd="/",
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._is_up():
            if self._nspawn.poll() is not None or time.monotonic() > deadline:
                lines = self.console.read_text(errors="replace").splitlines()
                raise LackingError(f"what systemd-nspawn needs: {' / '.join(lines[-3:])}")
            time.sleep(0.1)

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        pid = self._nspawn.pid
        if not self.leader:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for child in children:
                # It is one of ours until it has become PID 1 of its own.
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/comm").read_text() == "systemd\n":
                        self.leader = int(child)
        if not self.leader:
            return False
        state = self.run("systemctl", "is-system-running", check=False).stdout
        return state.strip() in ("running", "degraded")

    def stop(self) -> None:
        """Switch it off, without notice, and take everything down."""
        self.abort()
        for client in self._clients:
            client.kill()
            for pipe in (client.process.stdin, client.process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        if self._nspawn is not None:
            if self.leader:
                self.kill()
            else:
                self._nspawn.terminate()
            self._nspawn.wait(20)
            self._nspawn = None
        for group in self._cgroups:
            _remove_cgroup(group)
        if self._mounted:
            syscalls.umount(str(self.directory), syscalls.MNT_DETACH)
            self._mounted = False

    def abort(self) -> None:
        """Fail every file-system request that is under way in there."""
        for mount in self.mounts():
            if mount.fstype == mounting.FSTYPE:
                with contextlib.suppress(OSError):
                    number = mount.device.partition(":")[2]
                    (CONNECTIONS / number / "abort").write_text("1")

    def kill(self) -> None:
        """Its PID 1, and so all of it."""
        if self._nspawn is not None and self._nspawn.poll() is None and self.leader:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.leader, signal.SIGKILL)

    # -- what is in it --

    def mounts(self) -> list[Mount]:
        """The mounts that its PID 1 sees."""
        table = ""
        with contextlib.suppress(OSError):
            table = Path(f"/proc/{self.leader}/mountinfo").read_text()
        found = []
        for line in table.splitlines():
            fields = line.split()
            found.append(Mount(fields[2], fields[4], fields[fields.index("-") + 1]))
        return found

    def _words(self, words: tuple[object, ...], user: int | None) -> list[str]:
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        return [
            *("nsenter", f"--target={self.leader}", "--all"),
            *(become if user is not None else []),
            *(str(word) for word in words),
        ]

    def run(
        self,
        *words: object,
        user: int | None = None,
        check: bool = True,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A program in the machine, but in no unit of it."""
        done = subprocess.run(
            self._words(words, user),
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd="/",
            env={"PATH": os.defpath, "LC_ALL": "C", **(env or {})},
        )
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done

    def client(
        self,
        user: int | None = None,
        program: Sequence[object] = (PROGRAMS / "client",),
        **environment: str,
    ) -> Client:
        """tests/client.c in the machine, or another program that answers lines with lines."""
        process = subprocess.Popen(
            self._words(tuple(program), user),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.defpath, **environment},
        )
        self._clients.append(Client(process))
        return self._clients[-1]

    def write(self, path: str, text: str) -> None:
        """A file of the machine's."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


class Service:
    """A unit of a machine."""

    def __init__(self, machine: Machine, unit: str = "msharefsd.service") -> None:
        self.machine = machine
        self.unit = unit

    def systemctl(self, verb: str, *words: str, check: bool = True) -> str:
        return self.machine.run("systemctl", verb, self.unit, *words, check=check).stdout

    def show(self, name: str) -> str:
        """A property, see org.freedesktop.systemd1(5)."""
        return self.systemctl("show", f"--property={name}", "--value").strip()

    @property
    def pid(self) -> int:
        """The main process, as the machine numbers it."""
        return int(self.show("MainPID"))

    def host_pid(self) -> int:
        """The main process, as we number it."""
        wanted = self.pid
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{name}/ns/pid") != os.readlink(
                        f"/proc/{self.machine.leader}/ns/pid"
                    ):
                        continue
                    status = Path(f"/proc/{name}/status").read_text()
                    numbers = next(
                        line for line in status.splitlines() if line.startswith("NSpid:")
                    )
                    if int(numbers.split()[-1]) == wanted:
                        return int(name)
        raise ProcessLookupError(wanted)

    def journal(self, since: str) -> str:
        """What the unit and systemd said of it; `since` is a time in seconds."""
        words = ("journalctl", f"--unit={self.unit}", f"--since=@{since}", "--output=cat")
        return self.machine.run(*words).stdout

    def drop_in(self, **settings: str) -> None:
        """Settings of the [Service] section, over the unit's."""
        lines = "".join(f"{key}={value}\n" for key, value in settings.items())
        self.machine.write(f"/etc/systemd/system/{self.unit}.d/test.conf", f"[Service]\n{lines}")
        self.machine.run("systemctl", "daemon-reload")


@contextlib.contextmanager
def running(directory: Path, client_program: Path) -> Iterator[Machine]:
    """A machine that is taken down whatever happens.  Raises LackingError."""
    with started(Machine(directory, client_program)) as machine:
        yield machine


@contextlib.contextmanager
def started(machine: AnyMachine) -> Iterator[AnyMachine]:
    """As running(), for one that is of another kind."""
    try:
        machine.start()
        yield machine
    finally:
        machine.stop()
