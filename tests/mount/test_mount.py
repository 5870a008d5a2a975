"""Mounting and unmounting: the graft, other places, an ordinary user, stale mounts."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from become import BECOME_NOBODY
from conftest import ALIGNMENT, BASE, BIN, Daemon, clients

from msharefsd.linux import mounts, syscalls
from msharefsd.mount import graft, mounting

NOBODY = 65534
SIZE = 2 * ALIGNMENT
CREATE = os.O_CREAT | os.O_EXCL | os.O_RDWR
SYS = Path("/sys/fs/mshare")


@pytest.fixture(params=["private", "shared"])
def propagation(request: pytest.FixtureRequest) -> Iterator[str]:
    """With / shared, as systemd makes it, the graft must not touch the original mounts."""
    if request.param == "shared":
        syscalls.mount("", "/", None, syscalls.MS_REC | 1 << 20)  # MS_SHARED
    yield request.param
    syscalls.mount("", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


def below(path: str) -> list[tuple[str, str]]:
    return [(m.target, m.fstype) for m in mounts.mounts() if m.target.startswith(path)]


@pytest.mark.usefixtures("propagation")
def test_the_graft_shows_everything_and_goes_without_a_trace(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    before, mounts_before = sorted(os.listdir("/sys/fs")), below("/sys")
    cgroups = sorted(os.listdir("/sys/fs/cgroup"))
    daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=SYS).start()
    assert sorted(os.listdir("/sys/fs")) == sorted([*before, "mshare", graft.OWN])
    assert sorted(os.listdir("/sys/fs/cgroup")) == cgroups
    # What is mounted below an entry shows through, cgroups above all.
    for entry in cgroups:
        assert os.listdir(f"/sys/fs/cgroup/{entry}") or os.path.isfile(f"/sys/fs/cgroup/{entry}")
    with clients(client_program, daemon) as start:
        client = start()
        client.ok("map", BASE, SIZE, 1)
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
    daemon.stop()
    assert sorted(os.listdir("/sys/fs")) == before
    assert below("/sys") == mounts_before


@pytest.mark.usefixtures("propagation")
def test_a_killed_daemons_graft_is_used_again_and_undone(
    make_daemon: Callable[..., Daemon],
) -> None:
    mounts_before = below("/sys")
    daemon = make_daemon(mountpoint=SYS).start()
    daemon.kill()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(SYS)
    assert graft.is_there()
    daemon.expected.append("taking down the mount that a dead daemon left")
    daemon.start()
    assert (SYS / "mshare_info").read_text() == f"{512 << 30}\n"
    daemon.stop()
    assert below("/sys") == mounts_before


def in_user_namespace(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "-Urnm", "--propagation=private", *command],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("propagation")
def test_who_makes_a_user_namespace_mounts_sysfs_there(
    make_daemon: Callable[..., Daemon], directory: Path
) -> None:
    """As rootless containers do; also beside a daemon that was killed."""
    place = directory / "sysfs"
    place.mkdir()
    mount = ("mount", "-t", "sysfs", "sysfs", str(place))
    if in_user_namespace(*mount).returncode != 0:
        pytest.skip("user namespaces mount no sysfs here")
    daemon = make_daemon(mountpoint=SYS).start()
    assert in_user_namespace(*mount).returncode == 0
    listing = in_user_namespace("ls", "-a", "/sys/fs").stdout.split()
    assert "cgroup" in listing
    daemon.kill()
    assert in_user_namespace(*mount).returncode == 0
    # It is the second sysfs that does it.
    syscalls.umount(graft.WHOLE, syscalls.MNT_DETACH)
    assert in_user_namespace(*mount).returncode != 0
    daemon.expected.append("taking down the mount that a dead daemon left")
    daemon.start()


def test_nobody_else_enters_what_the_graft_needs_itself(
    make_daemon: Callable[..., Daemon],
) -> None:
    make_daemon(mountpoint=SYS).start()
    assert os.stat(f"/sys/fs/{graft.OWN}").st_mode & 0o777 == 0o700


def test_the_graft_follows_the_kernel(make_daemon: Callable[..., Daemon]) -> None:
    """Modules come, go, and come again."""
    make_daemon(mountpoint=SYS).start()
    before = sorted(os.listdir("/sys/fs"))
    grafted = graft.Graft()
    seen = grafted._seen
    comes, again = ((name, number) for name, number in sorted(seen) if name in ("ext4", "tmpfs"))
    for name, _ in (comes, again):
        syscalls.umount(f"/sys/fs/{name}", syscalls.MNT_DETACH)
    os.rmdir(f"/sys/fs/{comes[0]}")
    os.mkdir("/sys/fs/gone")
    for name in (again[0], "gone"):
        syscalls.mount("/sys/fs/fuse", f"/sys/fs/{name}", None, syscalls.MS_BIND)
    grafted._seen = seen - {comes, again} | {(again[0], 1), ("gone", 2)}
    grafted.look()
    assert sorted(os.listdir("/sys/fs")) == before
    for name, number in (comes, again):
        assert os.stat(f"/sys/fs/{name}").st_ino == number


def test_two_daemons_in_one_graft(make_daemon: Callable[..., Daemon]) -> None:
    before = sorted(os.listdir("/sys/fs"))
    first = make_daemon(mountpoint=SYS).start()
    second = make_daemon(mountpoint=Path("/sys/fs/mshare2")).start()
    first.stop()
    assert sorted(os.listdir("/sys/fs")) == sorted([*before, "mshare2", graft.OWN])
    assert (second.mount / "mshare_info").exists()
    second.stop()
    assert sorted(os.listdir("/sys/fs")) == before


def ungraft() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "msharefsd", "--ungraft"], capture_output=True, text=True, check=False
    )


def test_the_graft_of_a_daemon_that_was_killed_is_taken_back(
    make_daemon: Callable[..., Daemon],
) -> None:
    before, mounts_before = sorted(os.listdir("/sys/fs")), below("/sys")
    daemon = make_daemon(mountpoint=SYS).start()
    refused = ungraft()
    assert refused.returncode == 1
    assert "its daemon lives: stop that one first" in refused.stderr
    assert (SYS / "mshare_info").exists()
    daemon.kill()
    assert ungraft().returncode == 0
    assert sorted(os.listdir("/sys/fs")) == before
    assert below("/sys") == mounts_before
    assert ungraft().returncode == 0
    daemon.start()


def test_the_default_mount_is_found_without_being_told(
    make_daemon: Callable[..., Daemon], client_program: Path
) -> None:
    """By its usual place, or as the first fuse.msharefs in /proc/self/mountinfo."""
    for mountpoint in (SYS, None):
        daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=mountpoint).start()
        process = subprocess.run(
            [client_program],
            input=f"mshare r {BASE} {SIZE} {CREATE} 384\nunlink r\n",
            capture_output=True,
            check=True,
            text=True,
            env={},
        )
        assert process.stdout == "0\n0\n"
        daemon.stop()


def test_a_mount_path_longer_than_a_socket_address(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=directory / ("long" * 40) / "m")
    daemon.start()
    with clients(client_program, daemon) as start:
        client = start()
        client.ok("map", BASE, SIZE, 1)
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        client.ok("store", BASE, 1)
        assert client.do("fork", "load", BASE) == "1"


def test_a_second_daemon_on_the_same_mountpoint_is_refused(daemon: Daemon, directory: Path) -> None:
    command = [str(BIN / "msharefsd"), f"--mountpoint={daemon.mount}"]
    for run in (daemon.run, directory / "other-run"):
        second = subprocess.run(
            [*command, f"--run-directory={run}"], capture_output=True, text=True, check=False
        )
        assert second.returncode == 1
        assert "stop that one first" in second.stderr
        assert "Traceback" not in second.stderr
    assert (daemon.mount / "mshare_info").read_text() == f"{ALIGNMENT}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--alignment=3M"], 2, "power of two"),
        (["--alignment=many"], 2, "not a size"),
        (["--config=/nonexistent"], 2, "cannot read /nonexistent"),
        (["--mountpoint=/proc/nothing"], 1, "cannot make /proc/nothing"),
        (["--run-directory=/proc/nothing"], 1, "cannot use the run directory"),
        (["--without=everything"], 2, "no such feature: everything"),
    ],
)
def test_settings_that_cannot_be_are_told_in_a_sentence(
    directory: Path, arguments: list[str], code: int, text: str
) -> None:
    done = subprocess.run(
        [
            BIN / "msharefsd",
            f"--mountpoint={directory / 'm'}",
            f"--run-directory={directory / 'run'}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert mounts.top_mount(str(directory / "m")) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(
    make_daemon: Callable[..., Daemon], client_program: Path, number: int
) -> None:
    daemon = make_daemon(f"--alignment={ALIGNMENT}").start()
    with clients(client_program, daemon) as start:
        client = start()
        client.ok("map", BASE, SIZE, 1)
        client.ok("mshare", "r", BASE, SIZE, CREATE, 0o600)
        client.ok("store", BASE, 1)
        fd = os.open(daemon.mount / "r", os.O_RDONLY)
        assert daemon.process is not None
        daemon.process.send_signal(number)
        daemon.process.wait(20)
        os.close(fd)
        # Who has memory keeps it.
        assert client.do("load", BASE) == "1"
    daemon.stop()


def test_unmounting_from_outside_ends_the_daemon(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    mounting.unmount(str(daemon.mount))
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    daemon.stop()


@pytest.fixture
def fuse_for_everybody(directory: Path) -> Iterator[None]:
    """/dev/fuse as distributions have it, mode 0666, in our mount namespace."""
    node = directory / "fuse"
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    node.chmod(0o666)
    syscalls.mount(str(node), "/dev/fuse", None, syscalls.MS_BIND)
    yield
    syscalls.umount("/dev/fuse", syscalls.MNT_DETACH)


@pytest.mark.usefixtures("fuse_for_everybody")
def test_an_ordinary_user_runs_a_daemon_of_their_own(
    make_daemon: Callable[..., Daemon], client_program: Path, directory: Path
) -> None:
    runtime = directory / "runtime"
    runtime.mkdir()
    os.chown(runtime, NOBODY, NOBODY)
    daemon = make_daemon(f"--alignment={ALIGNMENT}", mountpoint=runtime / "mshare")
    daemon.run = runtime / "run"
    # Without privileges a full userfaultfd is not to be had here; it says so.
    daemon.expected += ["vm.unprivileged_userfaultfd", "CAP_CHECKPOINT_RESTORE", "CAP_SYS_PTRACE"]
    daemon.expected.append("the backing hugetlb cannot be had")
    # The interpreter that the tests run may be where this user cannot go.
    daemon.expected += ["process that keeps descriptors"]
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    daemon.start([sys.executable, "-c", BECOME_NOBODY])
    with clients(client_program, daemon) as start:
        donor, consumer = start(**user), start(**user)
        for number, flags in enumerate((1, 2)):  # MAP_SHARED, MAP_PRIVATE
            base = BASE + number * SIZE
            donor.ok("map", base, SIZE, flags)
            donor.ok("store", base + 4096, 7)
            donor.ok("mshare", f"r{number}", base, SIZE, CREATE, 0o600)
            consumer.ok("mshare", f"r{number}", base, SIZE, os.O_RDWR, 0)
            assert consumer.do("load", base + 4096) == "7"
            donor.ok("store", base + ALIGNMENT, 8)
            assert consumer.do("load", base + ALIGNMENT) == "8"
            assert int(daemon.field_as(f"r{number}", "memory", NOBODY)) < SIZE
        tables = daemon.info_as("r1", "pagetables", NOBODY)
        assert f"\n{consumer.pid} " in tables
        # The price, and never zeros: a system call on an absent page fails.
        assert consumer.do("from_memory", BASE + SIZE - 4096, 1) == "-14"
        donor.ok("unlink", "r0")
        consumer.ok("unlink", "r0")
    daemon.halt()
    assert daemon.shm_objects() != [], "what there is stays"
    done = daemon.purge()
    assert done.returncode == 0, done.stderr
    assert re.search(r"removing 1 region, \S+ of memory, 0 sharers: r1 \(", done.stderr)
    assert daemon.shm_objects() == []


def test_with_the_preload_library_nothing_needs_to_be_linked(
    daemon: Daemon, directory: Path
) -> None:
    """syscall() and mmap() of a program that knows nothing of us."""
    source = directory / "plain.c"
    source.write_text(
        f"""
        #include <fcntl.h>
        #include <stdio.h>
        #include <sys/mman.h>
        #include <unistd.h>
        int main(void) {{
            char *at = mmap((void *){BASE}UL, {SIZE}UL, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS, -1, 0);
            if (syscall(0x2d730001L, "r", at, {SIZE}UL, O_CREAT | O_RDWR, 0600) != 0)
                return perror("mshare"), 1;
            at[1] = 'x';
            printf("%c %ld\\n", at[1], syscall(39L) == getpid());
            return 0;
        }}
        """
    )
    subprocess.run(["cc", "-o", directory / "plain", source], check=True)
    preload = subprocess.run(
        [sys.executable, "-m", "libmshare", "--preload"], check=True, capture_output=True, text=True
    ).stdout.strip()
    done = subprocess.run(
        [directory / "plain"],
        env={"MSHARE_ROOT": str(daemon.mount), "LD_PRELOAD": preload},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "x 1\n"
    assert daemon.field("r", "state") == "live"
