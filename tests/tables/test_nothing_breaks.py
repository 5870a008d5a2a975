"""What is collapsed is memory as before, whatever becomes of it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commanding import mshare
from conftest import BIN
from sharers import PRELUDE, Sharer, Sharers, make_sharers  # noqa: F401 - a fixture

from msharefsd.linux import features

MiB = 1 << 20
HUGE = 2 * MiB
CHUNKS = 8
SIZE = CHUNKS * HUGE
PAGES = SIZE // 4096
# Another word in each page.
FILL = f"""
at = shared({SIZE})
def word(n): return ctypes.c_uint32.from_address(at + n * 4096)
for n in range({PAGES}): word(n).value = n + 1
def right(): return sum(word(n).value == n + 1 for n in range({PAGES}))
children(2, right)
"""

pytestmark = [
    pytest.mark.shm_only,
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root"),
    pytest.mark.skipif(
        not features.probe().collapse, reason="this kernel has no MADV_COLLAPSE of shared memory"
    ),
]


def collapsed(program: Sharer) -> None:
    done = mshare("collapse", "--pid", program.pid, "--min-size=4M", "--budget=100%")
    assert f"{CHUNKS} of {CHUNKS} chunks" in done.stdout, (done.stdout, done.stderr)


@contextlib.contextmanager
def swap(file: Path) -> Iterator[None]:
    """A swap file of one's own, for a moment."""
    file.touch(0o600)
    with file.open("wb") as writing:
        os.posix_fallocate(writing.fileno(), 0, 4 * SIZE)
    subprocess.run(["mkswap", "--quiet", file], check=True, capture_output=True)
    done = subprocess.run(["swapon", file], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no swap file here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["swapoff", file], check=True)


def swapped(file: Path) -> int:
    """How much is in it (kB)."""
    lines = [line.split() for line in Path("/proc/swaps").read_text().splitlines()]
    return sum(int(fields[3]) for fields in lines if fields[0] == str(file))


def test_swap(sharers: Sharers, directory: Path) -> None:
    program = sharers(FILL)
    collapsed(program)
    with swap(directory / "swap"):
        program.do(f"libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t({SIZE}), 21)")  # PAGEOUT
        assert swapped(directory / "swap") > 0
        assert program.do("right()") == str(PAGES)
        # What has come back is of small pages, and is made huge again.
        done = mshare("collapse", "--pid", program.pid, "--min-size=4M", "--budget=100%")
        assert done.returncode in (0, 1), done.stderr
        assert program.do("right()") == str(PAGES)
    assert program.do("right()") == str(PAGES)


def test_a_core_dump_has_it(sharers: Sharers, directory: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if "/" in pattern or pattern.startswith("|"):
        pytest.skip(f"cores go elsewhere: {pattern}")
    place = f"os.chdir({str(directory)!r})\n"
    program = sharers(
        f"{place}import resource\nresource.setrlimit(resource.RLIMIT_CORE, (-1, -1))\n"
        f"{FILL}\nif (child := os.fork()) == 0: signal.pause()",
    )
    collapsed(program)
    program.do("[os.kill(child, signal.SIGABRT), os.waitpid(child, 0)]")
    (core,) = [each for each in directory.iterdir() if each.name.startswith("core")]
    with core.open("rb") as dump:
        found = 0
        while part := dump.read(4096):
            word = int.from_bytes(part[:4], sys.byteorder)
            found += 1 <= word <= PAGES and not any(part[4:])
    assert found >= PAGES


def test_an_address_space_that_is_limited(sharers: Sharers) -> None:
    program = sharers(
        "import resource\n"
        f"size = 4096 * int(open('/proc/self/statm').read().split()[0]) + {SIZE} + 32 * MiB\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (size, size))\n{FILL}"
    )
    collapsed(program)
    assert program.do("right()") == str(PAGES)


ACCOUNT = f"""{PRELUDE}
flags = SHARED | ANONYMOUS
at = libc.mmap(None, {SIZE}, 3, flags, -1, 0)
lines = open("/proc/self/smaps").read().splitlines()
first = next(n for n, line in enumerate(lines) if line.startswith(f"{{at:x}}-"))
print(next(line for line in lines[first:] if line.startswith("VmFlags")))
"""


def test_memory_is_accounted_for_as_ever() -> None:
    """What overcommit_memory=2 goes by: a mapping's flag "ac", and who has asked for it."""
    plain = subprocess.run(
        [sys.executable, "-c", ACCOUNT], capture_output=True, text=True, check=True, cwd="/"
    ).stdout
    words = [str(BIN / "mshare"), "run", "--min-size=4M", "--", sys.executable, "-c", ACCOUNT]
    ours = subprocess.run(words, capture_output=True, text=True, check=True, cwd="/").stdout
    assert re.search(r"\bsh\b", plain)
    assert ours == plain
