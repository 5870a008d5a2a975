"""The command `mshare`, on a real mount."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import (
    MSHARE,
    NOBODY,
    SIZE,
    Command,
    Terminal,
    as_nobody,
    donate,
    environment,
    make,
)
from command import mshare_fixture as _mshare  # noqa: F401 - what tests ask for
from command import terminal_fixture as _terminal  # noqa: F401 - the same
from conftest import (
    ALIGNMENT,
    BASE,
    CONNECTIONS,
    SUPPORT,
    Client,
    Daemon,
    eventually,
    huge_pages,
)
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner
from walls import own_shm as _own_shm  # noqa: F401 - what tests ask for

from libmshare import core, texts
from libmshare.cli import app, ask, doctor, output, regions
from libmshare.cli.errors import CommandError, DaemonGoneError, NotAnsweringError
from libmshare.cli.exits import Exit
from msharefsd.linux import features, mounts, syscalls
from msharefsd.linux.features import UnsupportedError, probe
from msharefsd.mount import mounting

ODD = b"a b\n\x1b[31m\xff\\\xe2\x80\xa8[red]"
ODD_LABEL = r"a\040b\012\033[31m\377\134\342\200\250[red]"
ODD_PRINTED = f"$'{ODD_LABEL}'"


def test_ls(mshare: Command, spawn: Callable[..., Client]) -> None:
    titles = ["NAME", "ADDRESS", "SIZE", "MEMORY", "SHARERS", "BACKING", "OWNER", "MODE"]
    assert mshare.ok("ls").split() == titles
    assert mshare.json("ls") == []
    _donor = donate(spawn, "r", mode=0o640)
    assert mshare.root is not None
    (mshare.root / "empty").touch()
    heading, empty, region = mshare.ok("ls").splitlines()
    assert heading.split() == titles
    assert empty.split() == ["empty", "-", "-", "0", "0", "-", "root", "0644"]
    assert region.split() == ["r", f"{BASE:#x}", "4M", "2M", "1", "shm", "root", "0640"]
    # Aligned: the right edge of the titles of numbers is that of the numbers.
    for title in ("ADDRESS", "SIZE", "MEMORY", "SHARERS"):
        assert region[heading.index(title) + len(title) - 1] != " "
        assert region[heading.index(title) + len(title)] == " "
    by_name = {each["name"]: each for each in mshare.json("ls")}
    assert by_name["r"] | {"backing": "shm"} == by_name["r"]
    assert {
        "start": BASE,
        "size": SIZE,
        "memory": ALIGNMENT,
        "sharers": 1,
        "uid": 0,
        "gid": 0,
        "mode": "0640",
        "state": "live",
        "access": "read-write",
        "objects": 1,
    }.items() <= by_name["r"].items()
    assert (by_name["empty"]["start"], by_name["empty"]["size"]) == (None, None)


def test_info_and_maps(mshare: Command, spawn: Callable[..., Client], daemon: Daemon) -> None:
    donor = donate(spawn, "r")
    told = dict(line.split(":", 1) for line in mshare.ok("info", "r").split("\n\n")[0].splitlines())
    told = {key: value.strip() for key, value in told.items()}
    assert list(told) == [line.split(":")[0] for line in daemon.info("r").splitlines()]
    assert told["name"] == "r"
    assert told["memory"] == f"{ALIGNMENT} (2M)"
    assert told["size"] == f"{SIZE} (4M)"
    assert told["owner"] == "root:root"
    assert told["start"] == f"{BASE:#x}"
    heading, process = mshare.ok("info", "r").split("\n\n")[1].splitlines()
    assert heading.split() == ["PID", "USER", "ACCESS", "SINCE", "COMMAND"]
    assert process.split()[:3] == [str(donor.pid), "root", "read-write"]
    assert process.split()[-1] == "client"
    (sharer,) = mshare.json("info", "r")["processes"]
    assert (sharer["pid"], sharer["uid"], sharer["command"]) == (donor.pid, 0, "client")
    assert mshare.ok("maps", "r") == daemon.info("r", "maps")
    (item,) = mshare.json("maps", "r")
    assert (item["start"], item["end"]) == (BASE, BASE + ALIGNMENT)
    assert (item["permissions"], item["name"]) == ("rw-s", "[anon_shmem:r]")
    donor.ok("munmap", BASE, SIZE)
    assert mshare.ok("maps", "r") == ""
    assert mshare.json("maps", "r") == []


def test_what_there_is_not(mshare: Command) -> None:
    for words in (
        ("info", "r"),
        ("maps", "r"),
        ("ptes", "r"),
        ("rm", "r"),
        ("info", "r", "--json"),
    ):
        assert "r: no such region" in mshare.fails(*words)
    for word in ("info", "maps", "ptes", "rm"):
        assert "no slash" in mshare.fails(word, "../../etc")
    for name in (b"../../etc", b"a/b", b"", b".", b"..", b".control", b"mshare_info"):
        with pytest.raises(CommandError, match=r"no slash|not empty|reserved"):
            regions.check_name(name)
    assert "at most 255" in mshare.fails("info", "x" * 256)


def test_page_tables_are_what_the_daemon_says(
    mshare: Command, daemon: Daemon, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(mshare, "r")
    if (daemon.mount / ".regions/r/pagetables").exists():
        assert mshare.ok("ptes", "r") == daemon.info("r", "pagetables")
    else:
        assert "no pagetables file" in mshare.fails("ptes", "r")
    # Either daemon, whichever this one is.
    monkeypatch.setattr(core, "mshare_root", lambda: str(directory))
    (directory / ".regions/r").mkdir(parents=True)
    (directory / "r").touch()
    with pytest.raises(CommandError, match="no pagetables file"):
        regions.text(b"r", "pagetables")
    (directory / ".regions/r/pagetables").write_text("tables: 3\n")
    assert regions.text(b"r", "pagetables") == "tables: 3\n"


def test_odd_names(mshare: Command, daemon: Daemon) -> None:
    make(mshare, ODD, "--anonymous")
    make(mshare, b"-n")
    assert (daemon.mount / os.fsdecode(ODD)).exists()
    lines = mshare.ok("ls").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["-n", ODD_PRINTED]
    assert mshare.json("ls")[1]["name"] == os.fsdecode(ODD)
    assert mshare.ok("info", ODD).splitlines()[0].split() == ["name:", ODD_PRINTED]
    assert f"[anon_shmem:{ODD_LABEL}]" in mshare.ok("maps", ODD)
    assert mshare.ok("top").splitlines()[4].startswith(ODD_PRINTED)
    assert ODD_LABEL in mshare.fails("info", ODD + b"x")
    mshare.ok("rm", "--", ODD, b"-n")
    assert mshare.json("ls") == []


def test_a_process_cannot_forge_lines_by_its_name(mshare: Command, daemon: Daemon) -> None:
    script = textwrap.dedent(
        f"""
        import libmshare
        open("/proc/self/comm", "wb").write(b"x\\n1 0 r w i")
        region = libmshare.Region.create("r", {SIZE}, start={BASE})
        print("attached", flush=True)
        input()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(daemon.mount),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"attached\n"
        (sharer,) = mshare.json("info", "r")["processes"]
        assert (sharer["pid"], sharer["command"]) == (process.pid, "x\\0121 0 r w i")
        assert len(mshare.ok("info", "r").split("\n\n")[1].splitlines()) == 2
        process.kill()


# -- create, rm --


@pytest.mark.parametrize("anonymous", [False, True])
def test_create(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client], anonymous: bool
) -> None:
    more = ["--anonymous"] if anonymous else []
    mshare.ok("create", "r", "--start", "64T", "--size", "4M", "--mode", "0666", *more)
    assert daemon.field("r", "state") == "live"
    assert daemon.field("r", "start") == f"{64 << 40:#x}"
    assert daemon.field("r", "size") == str(4 << 20)
    assert stat.S_IMODE((daemon.mount / "r").stat().st_mode) == 0o666  # whatever the umask is
    assert daemon.sharers("r") == 0
    sharer = spawn()
    sharer.ok("mshare", "r", 64 << 40, 4 << 20, os.O_RDWR, 0)
    assert sharer.do("load", 64 << 40) == ("0" if anonymous else "SIGBUS")
    mshare.ok("create", "q", f"--start={BASE:#x}", f"--size={ALIGNMENT}")
    assert stat.S_IMODE((daemon.mount / "q").stat().st_mode) == 0o600


def test_create_somewhere(mshare: Command, daemon: Daemon, spawn: Callable[..., Client]) -> None:
    for name in ("r", "q"):
        mshare.ok("create", name, "--size", "64K", "--mode=0640")
        assert stat.S_IMODE((daemon.mount / name).stat().st_mode) == 0o640
    starts = [int(daemon.field(name, "start"), 16) for name in ("r", "q")]
    assert abs(starts[0] - starts[1]) >= ALIGNMENT
    sharer = spawn()
    sharer.ok("mshare", "r", 0, 1, os.O_RDWR, 0)
    assert sharer.do("load", starts[0] + 65535) == "0"
    assert sharer.do("load", starts[0] + 65536) == "SIGBUS"
    assert "must not be 0" in mshare.fails("create", "x", "--size=0")


def test_create_refused(mshare: Command, daemon: Daemon) -> None:
    def refused(*words: str, name: str = "q") -> str:
        return mshare.fails("create", name, *words)

    place = (f"--start={BASE}", f"--size={SIZE}")
    make(mshare, "r")
    assert "it exists" in refused(*place, name="r")
    assert "--start must be a multiple of 2M" in refused("--start=1M", "--size=2M")
    assert "--start must be a multiple of 2M" in refused("--start=0", "--size=2M")
    assert "--size must be a multiple of 2M" in refused("--start=2T", "--size=1M")
    assert "beyond the addresses" in refused("--start=200T", "--size=2M")
    assert "beyond the addresses" in refused("--start=2T", "--size=1024T")
    assert "reserved" in refused(*place, name=".x")
    assert "no slash" in refused(*place, name="a/b")
    assert "at most 255" in refused(*place, name="x" * 256)
    assert sorted(each["name"] for each in mshare.json("ls")) == ["r"]


def test_create_with_a_backing(mshare: Command, daemon: Daemon) -> None:
    make(mshare, "r", "--backing=shm")
    assert mshare.json("info", "r")["backing"] == "shm"
    words = ("create", "huge", "--start=2T", f"--size={SIZE}", "--backing=hugetlb")
    if probe().hugetlb:
        with huge_pages(1):  # a region takes none yet, but there must be one to be had
            mshare.ok(*words)
            assert mshare.json("info", "huge")["backing"] == "hugetlb"
            mshare.ok("rm", "huge")
    else:
        assert "cannot have huge pages" in mshare.fails(*words)


def test_rm(mshare: Command, daemon: Daemon, spawn: Callable[..., Client]) -> None:
    donor = donate(spawn, "used")
    make(mshare, "r")
    make(mshare, "s")
    # One that is not there does not keep the others.
    assert "nope: no such region" in mshare.fails("rm", "r", "nope")
    assert mshare.run("rm", "used").returncode == 0  # and it says who has it
    assert [each["name"] for each in mshare.json("ls")] == ["s"]
    donor.ok("store", BASE, 1)  # the memory goes with its last sharer
    assert daemon.metric("regions") == 2
    mshare.ok("rm", "s")
    assert mshare.json("ls") == []


def test_what_was_removed_and_is_in_use_is_seen(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client]
) -> None:
    """By rm itself, ls, top, du and .metrics, until it is gone; and who has it."""
    donor = donate(spawn, "used")
    donor.ok("store", BASE, 1)
    (region,) = mshare.json("ls")
    memory = region["memory"]
    done = mshare.run("rm", "used")
    assert done.returncode == 0
    who = f"{donor.pid} client"
    assert f"mshare: used: removed; 1 process has it ({who}), {output.size(memory)}" in done.stderr
    # A new one of that name is another one.
    make(mshare, "used", "--start=32T")
    assert [each["name"] for each in mshare.json("ls")] == ["used"]
    new, old = sorted(mshare.json("ls", "--all"), key=lambda each: each["removed"])
    assert (new["removed"], new["sharers"]) == (False, 0)
    assert (old["removed"], old["name"], old["state"]) == (True, "used", "removed")
    assert (old["memory"], old["sharers"]) == (memory, 1)
    assert [each["pid"] for each in old["processes"]] == [donor.pid]
    text = mshare.ok("ls", "--all")
    assert "used (removed)" in text
    assert f"\nused {donor.pid} " in re.sub(" +", " ", text)
    top = mshare.ok("top", "--once")
    assert f"2 regions, 1 sharer, {output.size(memory)} of memory" in top
    assert f"({output.size(memory)} of it removed)" in top
    assert daemon.metric("removed_regions") == 1
    assert daemon.metric("removed_memory_bytes") == memory
    held = subprocess.run(
        ["du", "-s", "-B1", daemon.mount], check=True, capture_output=True, text=True
    )
    assert int(held.stdout.split()[0]) == memory
    donor.kill()
    eventually(lambda: len(mshare.json("ls", "--all")) == 1, "its end")
    assert daemon.metric("removed_regions") == 0


def test_rm_all_spares_what_is_in_use(
    mshare: Command, daemon: Daemon, spawn: Callable[..., Client]
) -> None:
    donor = donate(spawn, "used")
    make(mshare, "r", "--start=32T")
    (daemon.mount / "bare").touch()
    done = mshare.run("rm", "--all")
    assert (done.returncode, done.stdout) == (1, "removed: bare, 0 bytes\nremoved: r, 0 bytes\n")
    complaint = done.stderr
    assert complaint.count("\n") == 1
    assert f"used: 1 process has it ({donor.pid} client)" in complaint
    assert "--force removes it all the same" in complaint
    assert [each["name"] for each in mshare.json("ls")] == ["used"]
    done = mshare.run("rm", "--all", "--force")
    assert (done.returncode, done.stdout) == (0, "removed: used, 2M\n")
    assert "used: removed; 1 process has it" in done.stderr
    assert mshare.json("ls") == []
    assert donor.do("load", BASE) != "SIGBUS"


def test_another_users_region(mshare: Command, daemon: Daemon) -> None:
    make(mshare, "r", "--anonymous")
    listed = as_nobody(daemon.mount, "ls")
    assert listed.stdout.splitlines()[1].split() == ["r", "-", "-", "0", "-", "-", "root", "0600"]
    told = as_nobody(daemon.mount, "info", "r")
    assert told.returncode == 0
    assert "owner:  root:root" in told.stdout
    refused = as_nobody(daemon.mount, "maps", "r")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("mshare: r: permission denied")
    refused = as_nobody(daemon.mount, "rm", "r")
    assert refused.returncode == 1
    assert "only its owner and root" in refused.stderr
    assert (daemon.mount / "r").exists()


# -- no daemon, a dead one, one that does not answer --

ASKING = (
    ("ls",),
    ("ls", "--json"),
    ("status",),
    ("info", "r"),
    ("maps", "r"),
    ("ptes", "r"),
    ("rm", "r"),
    ("top", "--once"),
    ("create", "q", "--start=2T", "--size=4M"),
)


@pytest.mark.parametrize("words", ASKING)
def test_no_mount(words: tuple[str, ...], directory: Path) -> None:
    assert "msharefs is not mounted; start msharefsd" in Command(None).fails(*words)
    why = Command(directory).fails(*words)
    assert f"no msharefs is mounted on {directory}" in why
    assert "or say where it is (--root, MSHARE_ROOT)" in why


def test_a_dead_daemon(mshare: Command, daemon: Daemon) -> None:
    make(mshare, "r")
    daemon.kill()
    for words in ASKING:
        assert "has died; start msharefsd again" in mshare.fails(*words)
    assert "has died; start msharefsd again" in Command(None).fails("ls")
    for command in (mshare, Command(None)):
        done = command.run("doctor", "--json")
        assert done.returncode == 1
        (mount, *_) = [e for e in json.loads(done.stdout) if e["check"].startswith("mount")]
        assert mount["status"] == "fail"
        assert "has died" in mount["advice"]


@contextlib.contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_a_daemon_that_does_not_answer(mshare: Command, daemon: Daemon) -> None:
    make(mshare, "r")
    with stopped(daemon):
        for words in ASKING:
            assert "no answer from the daemon within 0.3 s" in mshare.fails("--timeout=0.3", *words)
        done = mshare.run("--timeout=0.3", "doctor")
        assert done.returncode == 1
        assert "no answer from the daemon" in done.stdout
    assert [each["name"] for each in mshare.json("ls")][-1] == "r"


@pytest.fixture(name="mute_mount")
def mute_mount_fixture(directory: Path) -> Iterator[Path]:
    """A file system whose daemon takes requests and never answers.

    Who has made one waits in the kernel, and SIGKILL does not change that.
    """
    place = directory / "mute"
    place.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    syscalls.mount("msharefs", str(place), mounting.FSTYPE, 0, options)

    def take() -> None:
        # linux/fuse.h: struct fuse_in_header; fuse_out_header and fuse_init_out.
        request = os.read(fd, 1 << 16)
        _length, opcode, unique = struct.unpack_from("=IIQ", request)
        assert opcode == 26  # FUSE_INIT
        answer = struct.pack("=IIIIHHIIHHII24x", 7, 31, 0, 0, 16, 12, 4096, 1, 0, 0, 0, 0)
        os.write(fd, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)
        with contextlib.suppress(OSError):  # the end of the mount
            while os.read(fd, 1 << 16):
                pass

    taker = threading.Thread(target=take)
    taker.start()
    yield place
    mount = mounts.top_mount(str(place))
    assert mount is not None
    (CONNECTIONS / str(mount.device[1]) / "abort").write_text("1")
    taker.join()
    os.close(fd)
    syscalls.umount(str(place), syscalls.MNT_DETACH)


def test_calls_that_cannot_be_killed(mute_mount: Path) -> None:
    command = Command(mute_mount)
    for words in (("ls",), ("rm", "r"), ("top",)):
        assert "no answer from the daemon" in command.fails("--timeout=0.3", *words)
    done = command.run("--timeout=0.3", "doctor", "--json")
    (mount,) = [e for e in json.loads(done.stdout) if e["check"].startswith("mount ")]
    assert mount["status"] == "warn"
    # They are there still, and hold nothing of ours.
    left = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and str(mute_mount) in (process / "environ").read_text():
                left.append(process)
    assert left
    for process in left:
        assert (process / "stat").read_text().rsplit(")", 1)[1].split()[0] == "D"


def test_what_asks_keeps_no_output_open() -> None:
    """Who reads our output must not wait for a child that could not be killed."""

    def descriptors() -> dict[int, str]:
        found = {}
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the listing's own
                found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
        return found

    found = ask.bounded(descriptors, 10.0)
    assert [found.pop(number) for number in range(3)] == ["/dev/null"] * 3
    (left,) = found.values()
    assert left.startswith("pipe:")


def test_results_and_errors_of_what_asks() -> None:
    assert ask.bounded(lambda: b"x" * 1_000_000, 10.0) == b"x" * 1_000_000

    def missing() -> None:
        raise FileNotFoundError(errno.ENOENT, "no", "name")

    with pytest.raises(FileNotFoundError) as caught:
        ask.bounded(missing, 10.0)
    assert caught.value.filename == "name"

    def gone() -> None:
        raise DaemonGoneError("it is gone", 3)

    with pytest.raises(DaemonGoneError, match="it is gone") as told:
        ask.bounded(gone, 10.0)
    assert told.value.code == 3

    def defect() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as noted:
        ask.bounded(defect, 10.0)
    assert "in defect" in noted.value.__notes__[0]  # the child's traceback is not lost
    with pytest.raises(CommandError, match="ended with -9"):
        ask.bounded(lambda: os.kill(os.getpid(), signal.SIGKILL), 10.0)
    with pytest.raises(NotAnsweringError):
        ask.bounded(lambda: time.sleep(60), 0.05)


# -- the command line --


def test_usage() -> None:
    for words in (
        ("nosuch",),
        ("info",),
        ("rm",),
        ("rm", "--all", "r"),
        ("rm", "--force", "r"),
        ("ls", "--sort=beauty"),
        ("wait",),
        ("wait", "r", "--for=luck"),
        ("wait", "r", "--timeout=-1"),
        ("run",),
        ("ls", "--nosuch"),
        ("create", "r"),
        ("create", "r", "--start=2X", "--size=2M"),
        ("create", "r", "--start=-1", "--size=2M"),
        ("create", "r", "--start=0xg", "--size=2M"),
        ("create", "r", "--start=99999999999T", "--size=2M"),
        ("create", "r", "--start=2T", "--size=2M", "--mode=9"),
        ("create", "r", "--start=2T", "--size=2M", "--mode=1777"),
        ("create", "r", "--start=2T", "--size=2M", "--backing=paper"),
        ("--timeout=0", "ls"),
    ):
        done = CliRunner().invoke(app.app, words)
        assert (done.exit_code, done.stdout) == (2, ""), words
        assert "--help" in done.stderr
    command = Command(None)
    for words, what in (
        (("info",), "missing argument 'NAME': see `mshare info --help`"),
        (("nosuch",), "no such command 'nosuch': see `mshare --help`"),
        (("ls", "--sort"), "option '--sort' requires an argument: see `mshare --help`"),
        (("wait", "r", "--for=luck"), "invalid value for '--for': 'luck' is not one of"),
        (("rm", "r", "--force"), "invalid value for --force: is for --all: see"),
        (("rm", "r", "--all"), "invalid value for NAME: either names or --all, not both: see"),
        (("create", "r"), "invalid value for --size: say how large the region is: --size 64M: see"),
        (
            ("create", "r", "--size=1.5G"),
            "invalid value for '--size': 1.5G: write 4096, 64M, 512G or 0x20000000000: see",
        ),
        (("ptes", "--pid=me"), "invalid value for '--pid': 'me' is not a whole number: see"),
        (("collapse", "--pid=1", "--all"), "invalid value for --pid: either --all or --pid: see"),
    ):
        assert f"mshare: {what}" in command.fails(*words, code=Exit.USAGE)
    assert command.run().stderr.count("\n") + command.run().stdout.count("\n") > 10
    assert command.ok("--version").startswith("mshare ")
    words_of_help = command.ok("--help").split()
    for name in [
        "ls",
        "status",
        "info",
        "maps",
        "top",
        "create",
        "wait",
        "rm",
        "doctor",
        "ptes",
        "run",
    ]:
        assert name in words_of_help
        done = CliRunner().invoke(app.app, [name, "--help"])
        assert done.exit_code == 0
        assert done.stdout.startswith(f"Usage: mshare {name} ")


def test_root_is_an_option_too(mshare: Command, daemon: Daemon) -> None:
    make(mshare, "r")
    for command in (Command(None), Command(Path("/nonexistent"))):
        listed = command.ok("--root", str(daemon.mount), "ls")
        assert listed.splitlines()[1].split()[0] == "r"
    # And without, it is found.
    assert [each["name"] for each in Command(None).json("ls")] == ["r"]
    ran = Command(None).ok("--root", str(daemon.mount), "run", "sh", "-c", "echo $MSHARE_ROOT")
    assert ran == f"{daemon.mount}\n"


def test_the_shell_completes(mshare: Command, daemon: Daemon) -> None:
    make(mshare, "region")
    make(mshare, ODD)

    def complete(command: Command, words: str) -> list[str]:
        more = {"_MSHARE_COMPLETE": "complete_bash", "COMP_WORDS": words}
        return command.ok(COMP_CWORD=str(words.count(" ")), **more).split()

    assert "doctor" in complete(mshare, "mshare do")
    assert complete(mshare, "mshare info r") == ["region"]
    assert complete(mshare, "mshare rm x") == []
    assert complete(Command(Path("/nonexistent")), "mshare info r") == []
    with stopped(daemon):
        assert complete(mshare, "mshare info r") == []
    for shell in ("bash", "zsh", "fish"):
        script = subprocess.run(
            [MSHARE],
            check=True,
            capture_output=True,
            text=True,
            env=environment(None, _MSHARE_COMPLETE=f"source_{shell}"),
        ).stdout
        assert "_MSHARE_COMPLETE" in script


def test_nobody_reads(mshare: Command) -> None:
    make(mshare, "r")
    with subprocess.Popen(
        [MSHARE, "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(mshare.root)
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == -signal.SIGPIPE


# -- on a terminal --


def test_ls_on_a_terminal(mshare: Command, terminal: Callable[..., Terminal]) -> None:
    empty = terminal("ls")
    assert empty.end() == 0
    assert empty.read() == b"no regions\r\n"
    make(mshare, ODD)
    listed = terminal("ls")
    assert listed.end() == 0
    assert ODD_PRINTED.encode() in listed.read()
    assert b"\x1b[31m" not in listed.read()  # what the name tried
    # Nothing is cut where there is little room.
    narrow = terminal("ls", columns=60)
    assert narrow.end() == 0
    assert b"\xe2\x80\xa6" not in narrow.read()  # an ellipsis
    told = terminal("info", ODD)
    assert told.end() == 0
    assert ODD_PRINTED.encode() in told.read()


# -- doctor --


def test_doctor(mshare: Command, daemon: Daemon) -> None:
    done = mshare.run("doctor", "--json")
    findings = {each["check"]: each for each in json.loads(done.stdout)}
    assert done.stderr == ""
    assert done.returncode == (1 if any(e["status"] == "fail" for e in findings.values()) else 0)
    assert findings["mount"]["status"] == "ok"
    assert findings["mount"]["found"] == f"{daemon.mount}, alignment 2M; its daemon answers"
    assert findings["userfaultfd"]["status"] == "ok"
    assert findings["feature kernel_faults"]["status"] == "ok"
    for check in (
        "kernel",
        "FUSE",
        "userfaultfd for users",
        "/dev/shm",
        "/dev/shm huge=",
        "mappings",
        "overcommit",
        "descriptors",
        "cgroup",
    ):
        assert findings[check]["status"] in ("ok", "warn", "fail")
        # What is not right comes with what to do.
        assert findings[check]["status"] == "ok" or findings[check]["advice"]
    assert [check for check in findings if check.startswith("huge pages")]
    text = mshare.run("doctor").stdout
    for each in findings.values():
        # What is free may have changed in between; what is asked has not.
        assert any(
            re.match(rf"(ok  |warn|fail)  {re.escape(each['check'])}: ", line)
            for line in text.splitlines()
        )


def test_doctor_finds_memory_of_nobody(
    own_shm: None, mshare: Command, spawn: Callable[..., Client]
) -> None:
    donate(spawn, "r")
    check = "memory of nobody known"

    def found() -> list[dict[str, str]]:
        return [
            each
            for each in json.loads(mshare.run("doctor", "--json").stdout)
            if each["check"] == check
        ]

    assert found() == []
    left = Path("/dev/shm/msharefs-00000000-0123456789abcdef-0-left")
    others = left.with_name(f"{left.name}-of-mallory")
    left.write_bytes(bytes(8192))
    others.touch()
    os.chown(others, NOBODY, NOBODY)
    try:
        (one,) = found()
        assert one["status"] == "warn"
        assert str(left) in one["found"]
        assert str(others) not in one["found"]
        assert "cp --sparse=always" in one["advice"]
    finally:
        left.unlink()
        others.unlink()
    assert found() == []


def test_doctor_finds_no_mount_and_other_mounts(
    make_daemon: Callable[..., Daemon], directory: Path
) -> None:
    def mounts(command: Command) -> list[dict[str, str]]:
        found = json.loads(command.run("doctor", "--json").stdout)
        return [each for each in found if each["check"].startswith("mount")]

    (none,) = mounts(Command(None))
    assert none["status"] == "fail"
    assert "start msharefsd" in none["advice"]
    one, other = make_daemon().start(), make_daemon().start()
    first, second = mounts(Command(one.mount))
    assert (first["status"], second["status"]) == ("ok", "ok")
    assert second["check"] == f"mount {other.mount}"
    other.kill()
    first, second = mounts(Command(one.mount))
    assert (first["status"], second["status"]) == ("ok", "warn")
    assert second["found"] == os.strerror(errno.ENOTCONN)
    assert "umount --lazy" in second["advice"]


def test_doctor_shows_the_graft(make_daemon: Callable[..., Daemon]) -> None:
    def found() -> list[tuple[str, str]]:
        lines = json.loads(Command(None).run("doctor", "--json").stdout)
        return [(each["status"], each["advice"]) for each in lines if each["check"] == "/sys/fs"]

    daemon = make_daemon(mountpoint=Path("/sys/fs/mshare")).start()
    ((status, _),) = found()
    assert status == "ok"
    daemon.kill()
    ((status, advice),) = found()
    assert status == "warn"
    assert "msharefsd --ungraft" in advice
    daemon.expected.append("taking down the mount that a dead daemon left")
    daemon.start()
    daemon.stop()
    assert found() == []


def test_doctor_as_an_ordinary_user(mshare: Command, daemon: Daemon) -> None:
    done = as_nobody(daemon.mount, "doctor", "--json")
    findings = {each["check"]: each for each in json.loads(done.stdout)}
    assert findings["mount"]["status"] == "ok"
    sysctl = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    closed = sysctl == "0" and not Path("/dev/userfaultfd").stat().st_mode & 0o006
    assert findings["userfaultfd for users"]["status"] == ("warn" if closed else "ok")


def test_doctor_reads_the_configuration(mshare: Command, directory: Path) -> None:
    file = directory / "config.toml"
    file.write_text('alignment = "1G"\nmountpoint = "/run/mshare"\n')
    text = mshare.run("doctor", "--config", str(file)).stdout
    assert f"ok    configuration {file}: mountpoint /run/mshare, alignment 1G" in text
    file.write_text('alignmnet = "1G"\n')
    done = mshare.run("doctor", "--config", str(file))
    assert done.returncode == 1
    assert f"fail  configuration {file}: wrong" in done.stdout
    assert "alignmnet" in done.stdout


@pytest.mark.parametrize(
    ("check", "settings", "status"),
    [
        ("_overcommit", {"overcommit_memory": 0}, "ok"),
        ("_overcommit", {"overcommit_memory": 2}, "warn"),
        ("_map_count", {"max_map_count": 65530}, "ok"),
        ("_map_count", {"max_map_count": 1000}, "warn"),
        ("_map_count", {}, "warn"),
    ],
)
def test_doctor_judges_settings(
    monkeypatch: pytest.MonkeyPatch, check: str, settings: dict[str, int], status: str
) -> None:
    monkeypatch.setattr(doctor, "_number", lambda path: settings.get(os.path.basename(path)))
    finding = getattr(doctor, check)()
    assert finding.status == status
    assert finding.status == "ok" or "vm." in finding.advice


def test_doctor_judges_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UnsupportedError("no userfaultfd to be had")

    monkeypatch.setattr(features, "probe", refuse)
    (finding,) = doctor._capabilities()
    assert (finding.status, finding.advice) == ("fail", "no userfaultfd to be had")
    monkeypatch.undo()
    whole = features.probe
    monkeypatch.setattr(features, "probe", lambda: whole(frozenset({"poison", "device"})))
    findings = {each.check: each for each in doctor._capabilities()}
    assert findings["feature poison"].status == "warn"
    assert "UFFDIO_POISON" in findings["feature poison"].advice
    assert "/dev/userfaultfd" in findings["feature device"].advice
    assert findings["feature write_protect"].advice == ""


# -- run --


@pytest.fixture(scope="module")
def preloaded_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/preloaded.c, compiled without libmshare."""
    program = tmp_path_factory.mktemp("cli") / "preloaded"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", program, SUPPORT / "preloaded.c"], check=True)
    return program


def test_run_an_unmodified_program(
    mshare: Command, daemon: Daemon, preloaded_program: Path
) -> None:
    arguments = [str(preloaded_program), "r", hex(BASE), str(SIZE)]
    alone = subprocess.run(arguments, check=False, env=environment(daemon.mount))
    assert alone.returncode == 1  # there is no such system call
    assert mshare.run("run", "--", *arguments).returncode == 42
    first, second = mshare.json("maps", "r")
    assert (first["start"], first["end"], first["permissions"]) == (
        BASE + 4096,
        BASE + 8192,
        "rw-s",
    )
    assert (second["end"], second["permissions"]) == (BASE + 12288, "r--s")
    assert daemon.sharers("r") == 0


def test_run_hands_everything_on(mshare: Command) -> None:
    library = subprocess.run(
        [sys.executable, "-P", "-m", "libmshare", "--preload"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    library = f"{Path(library).parent / 'libmshare-align.so'}:{library}"
    assert mshare.ok("run", "printenv", "LD_PRELOAD") == f"{library}\n"
    other = core.library_directory()
    assert other is not None
    more = str(other / core.LIBRARY)
    both = mshare.ok("run", "--", "printenv", "LD_PRELOAD", LD_PRELOAD=more)
    assert both == f"{library}:{more}\n"
    # Options after the program's name are the program's.
    assert mshare.ok("run", "echo", "--help", "--json", "--") == "--help --json --\n"
    assert mshare.run("run", "sh", "-c", "exit 7").returncode == 7
    assert mshare.run("run", "sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM
    # Python ignores these two; what else is ignored was so before.
    pythons = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    status = mshare.ok("run", "cat", "/proc/self/status")
    own = Path("/proc/self/status").read_text()
    assert ignored_signals(status) == ignored_signals(own) & ~pythons


def ignored_signals(status: str) -> int:
    return next(int(row.split()[1], 16) for row in status.splitlines() if row.startswith("SigIgn"))


def test_run_what_cannot_be_run(mshare: Command, directory: Path) -> None:
    assert "No such file" in mshare.fails("run", "--", "nosuch-program", code=127)
    assert "is empty" in mshare.fails("run", "", code=127)
    (directory / "file").write_text("")
    assert "Permission denied" in mshare.fails("run", str(directory / "file"), code=126)
    (directory / "file").write_bytes(b"\x7fELF")
    (directory / "file").chmod(0o755)
    assert "Exec format" in mshare.fails("run", str(directory / "file"), code=126)


# -- how things are written --


@given(st.binary(min_size=1, max_size=20), st.binary(min_size=1, max_size=20))
def test_two_names_are_never_printed_alike(first: bytes, second: bytes) -> None:
    one, two = output.printable(first), output.printable(second)
    assert one.isprintable()
    assert " " not in one
    assert (one == two) == (first == second)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1K"),
        (1025, "1.0K"),
        (1536, "1.5K"),
        (100 << 10, "100K"),
        ((100 << 10) + 1, "100K"),
        ((1 << 20) - 1, "1.0M"),
        (512 << 30, "512G"),
        (2 << 40, "2T"),
        (1 << 60, "1E"),
        (None, "-"),
    ],
)
def test_sizes(count: int | None, text: str) -> None:
    assert output.size(count) == text


def test_texts_of_a_daemon() -> None:
    assert texts.parse_info("name: a\u2028size: 3\nsize:  5\n\nx") == {
        "name": "a\u2028size: 3",
        "size": "5",
    }
    heading = "PID      UID      ACCESS     SINCE                COMMAND\n"
    assert texts.parse_sharers(heading) == []
    named, nameless = texts.parse_sharers(
        f"{heading}12       3        read-only  2026-01-01T00:00:00Z two words\n"
        "13       4        read-write 2026-01-01T00:00:00Z \n"
    )
    assert (named.pid, named.uid, named.access, named.command) == (12, 3, "read-only", "two words")
    assert nameless.command == ""
    (item,) = texts.parse_maps("1000-2000 r--p 00001000 fe:01 77      /a file (deleted)\n")
    assert (item["offset"], item["device"], item["inode"]) == (4096, "fe:01", 77)
    assert item["name"] == "/a file (deleted)"


def test_the_mount_is_where_mshare_root_says(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    assert core.mshare_root() == str(daemon.mount)
    monkeypatch.delenv("MSHARE_ROOT")
    assert core.mshare_root() == str(daemon.mount)
    monkeypatch.setenv("MSHARE_ROOT", "/")
    with pytest.raises(FileNotFoundError):
        core.mshare_root()


@pytest.fixture
def dead_mount(directory: Path) -> Iterator[Path]:
    """A msharefs whose daemon went before the kernel knew anything of its files."""
    place = directory / "dead"
    place.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR)
    syscalls.mount(
        "msharefs", str(place), mounting.FSTYPE, 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    )
    os.close(fd)
    yield place
    syscalls.umount(str(place), syscalls.MNT_DETACH)


def test_a_dead_mount_is_told_from_none(
    dead_mount: Path, make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MSHARE_ROOT", raising=False)
    with pytest.raises(OSError, match="has died"):
        core.mshare_root()
    assert "has died" in Command(None).fails("ls")
    assert "has died" in Command(dead_mount).fails("ls")
    # One that lives is preferred.
    living = make_daemon().start()
    assert core.mshare_root() == str(living.mount)


def test_the_mount_has_to_fit(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSHARE_ROOT", str(daemon.mount))
    length = len(os.fsencode(daemon.mount))
    for size, fits in ((length + 1, True), (length, False), (0, False)):
        array = ctypes.create_string_buffer(length + 1)
        assert (core._library.mshare_root(array, size) == 0) == fits
        if not fits:
            assert ctypes.get_errno() == errno.ERANGE
    assert core._library.mshare_root(None, 0) == -1
    assert ctypes.get_errno() == errno.EFAULT
