"""`mshare collapse`: page tables back, from programs that run and do nothing for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commanding import mshare
from conftest import BIN, TESTS, eventually
from sharers import Sharers, make_sharers  # noqa: F401 - a fixture

sys.path.append(str(TESTS.parent))

from benchmarks.memory_group import MemoryGroup, NoMemoryGroupError, memory_group
from msharefsd.linux import features
from msharetables import proc, survey
from msharetables.pace import moderate

MiB = 1 << 20
HUGE = 2 * MiB
NOBODY = 65534
CHUNKS = 16
SIZE = CHUNKS * HUGE
FILL = f"at = shared({SIZE})\ntouch(at, {SIZE})\nchildren(3, lambda: read(at, {SIZE}))"
FILL_MEMFD = (
    f"fd = os.memfd_create('it')\nos.ftruncate(fd, {SIZE})\nat = shared({SIZE}, fd=fd)\n"
    f"touch(at, {SIZE})\nchildren(3, lambda: read(at, {SIZE}))"
)

pytestmark = [
    pytest.mark.shm_only,
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root"),
    pytest.mark.skipif(
        not features.probe().collapse, reason="this kernel has no MADV_COLLAPSE of shared memory"
    ),
]

Watch = Callable[..., subprocess.Popen[str]]


def vmpte(pid: int) -> int:
    """Of a process and all that it started (bytes)."""
    found = [proc.status(each) for each in proc.with_children([pid])]
    return sum(status.tables for status in found if status)


def resident(pid: int) -> int:
    """What a process has of shared memory (bytes)."""
    status = proc.status(pid)
    assert status is not None
    return status.shared


def collapse(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return mshare("collapse", "--min-size", "4M", "--budget", "100%", *words, **more)


def one(*words: object) -> dict[str, Any]:
    """What --json says of the one object."""
    done = collapse("--json", *words)
    assert done.returncode == 0, (done.stdout, done.stderr)
    (found,) = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(name="watch")
def make_watch() -> Iterator[Watch]:
    """Start `mshare collapse --watch`."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object, **popen: Any) -> subprocess.Popen[str]:
        command = [str(BIN / "mshare"), "collapse", "--watch", "--min-size", "4M"]
        process = subprocess.Popen(
            [*command, *map(str, words)], stdout=subprocess.PIPE, text=True, cwd="/", **popen
        )
        started.append(process)
        return process

    yield start
    for each in started:
        each.kill()
        each.wait()
        assert each.stdout is not None
        each.stdout.close()


@pytest.mark.parametrize("code", [FILL, FILL_MEMFD], ids=["anonymous", "memfd"])
def test_a_running_program_gets_its_page_tables_back(sharers: Sharers, code: str) -> None:
    program = sharers(code)
    before, memory = vmpte(program.pid), resident(program.pid)
    done = collapse("--pid", program.pid)
    assert done.returncode == 0, done.stderr
    (line,) = [each for each in done.stdout.splitlines() if "->" in each]
    assert f"{CHUNKS} of {CHUNKS} chunks" in line
    assert "4 sharers" in line
    assert vmpte(program.pid) == before - 4 * CHUNKS * 4096
    assert resident(program.pid) <= memory
    assert program.do(f"read(at, {SIZE})") == str(SIZE // 4096)
    # Whoever comes later has none in the first place.
    program.do(f"children(1, lambda: read(at, {SIZE}))")
    assert collapse("--pid", program.pid).stdout == "nothing to free\n"


def test_a_table_that_has_nothing_in_it_any_more_is_explained(sharers: Sharers) -> None:
    """Of the GiB in the middle of three: all that was in it has been collapsed."""
    code = (
        f"at = shared(3 << 30)\nmiddle = at + (1 << 30) + -at % (1 << 30)\n"
        f"touch(middle, {SIZE})\nchildren(3, lambda: read(middle, {SIZE}))"
    )
    program = sharers(code)
    assert collapse("--pid", program.pid).returncode == 0
    found = survey.take(proc.with_children([program.pid]))
    assert len(found.processes) == 4
    assert [each.other for each in found.processes] == [0] * 4
    # There may be one for each other GiB that the mapping lies in, and there is none.
    assert all(each.tables and each.tables.hollow in (2, 3) for each in found.processes)


def test_all_threads_hurry() -> None:
    """Also the one that asks, which has been there before."""
    code = (
        "import os\nfrom msharetables import pace, patience\n"
        "asking = patience.Patience(10)\nasking.call(int)\npace.hurry()\n"
        "threads = [int(each) for each in os.listdir('/proc/self/task')]\n"
        "print([os.getpriority(os.PRIO_PROCESS, each) for each in threads])\nasking.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[-10, -10]\n"


def test_what_is_mostly_empty_is_left_alone(sharers: Sharers) -> None:
    program = sharers(
        f"at = shared({SIZE})\n"
        f"touch(at, {SIZE}, HUGE)\n"  # a page in each chunk
        f"touch(at + 4 * HUGE, HUGE // 2)\n"  # half of one
        f"touch(at + 5 * HUGE, HUGE)\n"
        f"children(1, lambda: read(at, {SIZE}, HUGE))"
    )
    memory = resident(program.pid)
    plan = one("--dry-run", "--pid", program.pid)
    assert (plan["chunks"], plan["too_empty"], plan["growth"]) == (2, CHUNKS - 2, HUGE // 2)
    assert plan["estimated_seconds"] > 0
    assert resident(program.pid) == memory
    result = one("--pid", program.pid)
    assert result["outcomes"] == {"done": 2}
    # The half that was missing, in the one that is half full.
    blocks = int(program.do("read(at + 4 * HUGE, HUGE)"))
    assert blocks == HUGE // 2 // 4096
    assert one("--pid", program.pid, "--min-filled", "0%")["outcomes"] == {"done": CHUNKS - 2}


def test_what_cannot_be_looked_into_is_judged_by_page_tables(sharers: Sharers) -> None:
    """As the service does, which has not the right to open what processes have mapped."""
    code = (
        f"at = shared({SIZE})\ntouch(at, {SIZE}, HUGE)\ntouch(at + 4 * HUGE, HUGE)\n"
        f"children(1, lambda: read(at, {SIZE}))"
    )
    program = sharers(code)
    words = ["setpriv", "--bounding-set=-sys_admin,-checkpoint_restore", "sh", "-c"]
    command = f"{BIN}/mshare collapse --min-size 4M --json --dry-run --pid {program.pid}"
    done = subprocess.run([*words, command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout)
    # The child's reading has mapped zeros for the rest: pages like others.
    assert plan["chunks"] + plan["too_empty"] == CHUNKS
    assert plan["chunks"] >= 1


def test_what_does_not_fit_is_said_with_what_to_do(sharers: Sharers) -> None:
    program = sharers(f"at = shared({SIZE}, 4096)\ntouch(at, {SIZE})")
    program.do("children(1, lambda: read(at, 64 * MiB // 2))")
    done = collapse("--pid", program.pid, "--name", "anonymous*")
    assert done.returncode == 0
    assert "nothing to free" in done.stdout


def test_without_the_right_it_names_the_capability(sharers: Sharers) -> None:
    program = sharers(f"become({NOBODY})\n{FILL}")
    before = vmpte(program.pid)
    done = collapse("--pid", program.pid, user=NOBODY)
    assert done.returncode == 1
    assert "CAP_SYS_NICE" in done.stderr
    assert done.stderr.count("\n") == 1
    assert vmpte(program.pid) == before


def test_who_forbids_itself_huge_pages_forbids_them_to_nobody_else(sharers: Sharers) -> None:
    """PR_SET_THP_DISABLE: it is done in the name of another one, who has it mapped as well."""
    program = sharers(FILL + "\nlibc.prctl(41, 1, 0, 0, 0)")
    before = vmpte(program.pid)
    found = one("--pid", program.pid)
    assert found["outcomes"].keys() == {"done"}
    assert vmpte(program.pid) < before


def test_the_budget_is_right_for_the_machine_unless_it_is_said(sharers: Sharers) -> None:
    program = sharers(FILL)
    estimates = []
    for more in ((), ("--budget", "auto"), ("--budget", f"{moderate():.2%}"), ("--budget", "1%")):
        done = mshare("collapse", "--min-size=4M", "--dry-run", "--pid", program.pid, *more)
        assert (done.returncode, done.stderr) == (0, "")
        estimates.append(done.stdout)
    assert estimates[0] == estimates[1] == estimates[2] != estimates[3]


def test_wrong_usage() -> None:
    for words in (
        (),
        ("--all", "--budget", "0%"),
        ("--all", "--budget", "many"),
        ("--all", "--min-filled", "101%"),
        ("--all", "--min-size", "big"),
        ("--all", "--interval", "0"),
    ):
        done = mshare("collapse", *words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
    assert collapse("--pid", (1 << 22) + 1).stderr == "mshare: 4194305: no such process\n"
    assert "cannot read" in mshare("collapse", "--config", "/nowhere").stderr


def test_being_killed_in_the_middle_leaves_nothing_behind(sharers: Sharers) -> None:
    program = sharers(FILL)
    started = vmpte(program.pid)
    command = [str(BIN / "mshare"), "collapse", "--min-size", "4M", "--budget", "1%"]
    process = subprocess.Popen([*command, "--pid", str(program.pid)])
    eventually(lambda: vmpte(program.pid) < started, "the first chunk")
    process.kill()
    process.wait()
    assert program.do(f"read(at, {SIZE})") == str(SIZE // 4096)
    assert collapse("--pid", program.pid).returncode == 0
    assert program.do(f"read(at, {SIZE})") == str(SIZE // 4096)
    assert vmpte(program.pid) < started - 4 * CHUNKS * 4096 + 4 * 4096


def test_a_stopped_program_is_helped_as_well(sharers: Sharers) -> None:
    program = sharers(FILL)
    before = vmpte(program.pid)
    everyone = proc.with_children([program.pid])
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    assert one("--pid", program.pid)["outcomes"] == {"done": CHUNKS}
    for pid in everyone:
        os.kill(pid, signal.SIGCONT)
    assert vmpte(program.pid) == before - 4 * CHUNKS * 4096


@pytest.mark.parametrize("room", [64 * MiB, 2 * MiB], ids=["room", "at its limit"])
def test_memory_stays_charged_where_it_was_and_nobody_is_killed(
    sharers: Sharers, room: int
) -> None:
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(1 << 30))
        except NoMemoryGroupError as error:
            pytest.skip(str(error))
        program = sharers(f"input_ = sys.stdin\nat = shared({SIZE})")
        stack.callback(program.end)  # before its group
        group.add(program.pid)
        program.do(f"touch(at, {SIZE})")
        program.do(f"children(3, lambda: read(at, {SIZE}))")
        before = _charged(group)
        assert before >= SIZE
        group.limit(before + room)
        done = collapse("--pid", program.pid, "--json")
        (result,) = json.loads(done.stdout)
        assert sum(result["outcomes"].values()) == CHUNKS
        if room > SIZE:
            assert result["outcomes"] == {"done": CHUNKS}
        # The page tables that went were charged there, too.
        assert SIZE <= _charged(group) <= before + room
        assert program.do(f"read(at, {SIZE})") == str(SIZE // 4096)
        assert len(proc.with_children([program.pid])) == 4


def _charged(group: MemoryGroup) -> int:
    for name in ("memory.usage_in_bytes", "memory.current"):
        with contextlib.suppress(FileNotFoundError):
            return int((group.path / name).read_text())
    raise AssertionError


# -- watching --


def test_the_watch_has_them_back_while_memory_is_being_filled(
    sharers: Sharers, watch: Watch, directory: Path
) -> None:
    program = sharers(f"at = shared({4 * SIZE})\nchildren(1, lambda: read(at, 4096))")
    idle = vmpte(program.pid)
    metrics = directory / "metrics.prom"
    config = directory / "config"
    config.write_text(f'min_size = "4M"\nbudget = "50%"\ninterval = 0.05\nmetrics = "{metrics}"\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(directory / "notify"))
        manager.settimeout(20)
        environment = os.environ | {"NOTIFY_SOCKET": str(directory / "notify")}
        process = watch("--config", config, "--pid", program.pid, env=environment)
        assert manager.recv(100) == b"READY=1"
    assert process.stdout is not None
    for part in range(4):
        program.do(f"touch(at + {part * SIZE}, {SIZE})")
        program.do(f"children(1, lambda: read(at, {(part + 1) * SIZE}))")
        most = idle * (part + 3)  # for the interpreters of new children
        eventually(lambda most=most: vmpte(program.pid) < most, f"part {part}")  # type: ignore[misc]
        assert re.match(r"anonymous of .*: \d+ of \d+ chunks", process.stdout.readline())
    eventually(lambda: 'outcome="done"} 64' in _text(metrics), "64 chunks in the metrics")
    assert "mshare_collapse_page_table_bytes_total" in metrics.read_text()
    process.terminate()
    assert process.wait(20) == 0
    assert program.do(f"read(at, {4 * SIZE})") == str(4 * SIZE // 4096)


def _text(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text()
    return ""


def test_what_was_filled_by_who_has_ended_is_made_huge_before_others_touch_it(
    sharers: Sharers, watch: Watch
) -> None:
    program = sharers(f"at = shared({SIZE})\nchildren(2, lambda: None)")
    process = watch("--pid", program.pid, "--interval", "0.1")
    program.do(f"[os.waitpid(p, 0) for p in [os.fork()] if p or touch(at, {SIZE}) or os._exit(0)]")
    assert process.stdout is not None
    done = 0
    while done < CHUNKS:
        match = re.match(r"anonymous of .*: (\d+) of \d+ chunks", process.stdout.readline())
        assert match is not None
        done += int(match[1])
    before = vmpte(program.pid)
    program.do(f"read(at, {SIZE})")
    # A table of the level above, and what the interpreter itself needs.
    assert vmpte(program.pid) <= before + CHUNKS * 4096 // 4


def test_the_watch_leaves_others_alone(sharers: Sharers, watch: Watch, directory: Path) -> None:
    mine, other = sharers(f"become({NOBODY})\n{FILL}"), sharers(FILL)
    before = vmpte(other.pid)
    (directory / "config").write_text('users = ["nobody"]\ninterval = 0.05\n')
    watch("--config", directory / "config")
    started = vmpte(mine.pid)
    eventually(lambda: vmpte(mine.pid) <= started - 4 * CHUNKS * 4096, "the user's own")
    assert vmpte(other.pid) == before


def test_another_user_namespace_is_left_alone(sharers: Sharers) -> None:
    """Root of a user namespace of its own may not be looked at by everybody; it hinders nobody."""
    program = sharers(f"libc.unshare(0x10000000)\n{FILL}")
    done = collapse("--pid", program.pid, user=NOBODY)
    assert done.returncode == 0, done.stderr
    assert "nothing to free" in done.stdout
    assert "could not be looked at" in done.stdout
    assert "other users' processes take root" in done.stdout
