"""The letter's two programs, as they are printed there, and `make demo`'s script."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import TESTS, Daemon, compile_c

PROJECT = TESTS.parent
EXAMPLES = PROJECT / "examples"


def snippet(program: str) -> str:
    """What stands between the two rules of an example."""
    text = (EXAMPLES / f"letter_{program}.c").read_text()
    rule = "/* ----------------- */\n"
    _, code, _ = text.split(rule)
    return code


def test_the_letters_programs_run_as_printed(
    make_daemon: Callable[..., Daemon], directory: Path
) -> None:
    daemon = make_daemon().start()  # with the letter's alignment, 512 GiB
    for program in ("donor", "consumer"):
        compile_c(EXAMPLES / f"letter_{program}.c", directory / program)
    environment = {"MSHARE_ROOT": str(daemon.mount)}
    donor = subprocess.run(
        [directory / "donor"], env=environment, capture_output=True, text=True, check=True
    )
    assert donor.stdout + donor.stderr == ""
    assert daemon.field("testregion", "start") == hex(2 << 40)
    consumer = subprocess.run(
        [directory / "consumer"],
        cwd=daemon.mount,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert consumer.stdout == (
        "INFO: 549755813888 bytes shared at addr 0x20000000000 \n"
        "Guest mmap at 0x20000000000x:\n"
        "Some random shared text\n"
        "\nDone\n"
    )
    assert not (daemon.mount / "testregion").exists()


def test_the_snippets_are_the_letters() -> None:
    """Line for line, but for white space at the ends of lines."""
    donor, consumer = snippet("donor").split("\n"), snippet("consumer").split("\n")
    assert [line for line in donor if line][:2] == [
        "addr = mmap((void *)TB(2), GB(512), PROT_READ | PROT_WRITE,",
        "MAP_SHARED | MAP_ANONYMOUS, 0, 0);",
    ]
    assert 'err = syscall(MSHARE_SYSCALL, "testregion", (void *)TB(2),' in donor
    assert "GB(512), O_CREAT|O_RDWR|O_EXCL, 600);" in donor
    assert 'fd = open("testregion", O_RDONLY);' in consumer
    assert "if ((count = read(fd, &minfo, sizeof(struct mshare_info)) > 0))" in consumer
    assert 'err = syscall(MSHARE_UNLINK_SYSCALL, "testregion");' in consumer


def test_the_demo_runs_and_takes_everything_down() -> None:
    before = sorted(os.listdir("/sys/fs"))
    done = subprocess.run(
        [EXAMPLES / "demo"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Some random shared text" in done.stdout
    assert "0000000 0000020000000000 0000008000000000" in done.stdout
    assert sorted(os.listdir("/sys/fs")) == before


def test_the_counter_counts(make_daemon: Callable[..., Daemon], directory: Path) -> None:
    daemon = make_daemon().start()
    counter = compile_c(EXAMPLES / "counter.c", directory / "counter", "-Wall", "-Wextra")
    said = [
        subprocess.run(
            [counter], env={"MSHARE_ROOT": str(daemon.mount)}, capture_output=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert said == [b"run 1 at 0x10000000000\n", b"run 2 at 0x10000000000\n"]
