"""`mshare run`: programs that nobody will change lie where huge pages fit, and are watched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commanding import mshare
from conftest import BIN, SUPPORT, TESTS, eventually, huge_pages

sys.path.append(str(TESTS.parent))

from benchmarks.postgres import Postgres
from libmshare.cli import reach
from msharefsd.linux import features
from msharetables import proc, survey
from msharetables.survey import Object

MiB = 1 << 20
TABLE = 4096
KINDS = ("anonymous", "zero", "memfd", "offset", "validate", "sysv")

pytestmark = pytest.mark.shm_only
collapses = [
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root"),
    pytest.mark.skipif(
        not features.probe().collapse, reason="this kernel has no MADV_COLLAPSE of shared memory"
    ),
]


@pytest.fixture(scope="module")
def mapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/support/mapper.c"""
    program = tmp_path_factory.mktemp("run") / "mapper"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", program, SUPPORT / "mapper.c"], check=True)
    return program


def said(*words: object) -> tuple[dict[str, str], str]:
    """What the mapper says of each mapping, and standard error."""
    done = mshare("run", *words)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines()), done.stderr


def test_every_large_shared_mapping_is_aligned_and_nothing_else(mapper: Path) -> None:
    lines, errors = said("--", mapper)
    assert errors == ""
    assert {kind: lines[kind] for kind in KINDS} == dict.fromkeys(KINDS, "0 shared")
    assert lines["hint"] == "0x1000 shared"
    assert (lines["private"], lines["small"], lines["limited"]) == ("ok", "ok", "ok")
    assert lines["errno"] == "Cannot allocate memory"
    assert not {"mprotect:", "munmap:", "shmdt:"} & set(lines)
    lines, _ = said("--min-size", "1G", mapper)
    assert [kind for kind in KINDS if lines[kind] == "0 shared"] != list(KINDS)


def test_huge_pages_of_the_pool_as_far_as_they_are_free(mapper: Path) -> None:
    with huge_pages(100):
        lines, errors = said("--backing", "hugetlb", mapper)
        assert errors == ""
        assert lines["anonymous"] == "0 shared"
        assert not {"mprotect:", "munmap:"} & set(lines)
        held = subprocess.Popen(
            [
                BIN / "mshare", "run", "--backing=hugetlb", "--no-watch", sys.executable, "-c",
                "import mmap; m = mmap.mmap(-1, 90 << 20); print('ready', flush=True); input()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert held.stdout is not None and held.stdin is not None
        assert held.stdout.readline() == b"ready\n"
        # Reserved in full, touched by nobody; a program that finds no room has other memory.
        assert _free("Rsvd") >= 45
        lines, errors = said("--backing", "hugetlb", "--min-size", "64M", mapper)
        if _free() - _free("Rsvd") < 41:
            assert "41 huge pages are needed and not free" in errors
        assert lines["anonymous"] == "0 shared"
        held.stdin.close()
        held.wait()
        held.stdout.close()


def _free(what: str = "Free") -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"HugePages_{what}:"):
            return int(line.split()[1])
    raise AssertionError


def test_who_reads_what_a_program_says_does_not_wait_for_its_watcher() -> None:
    done = mshare("run", "--", "sh", "-c", "sleep 1; echo done", timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_dry_run_runs_nothing(mapper: Path) -> None:
    done = mshare("run", "--dry-run", "--backing=hugetlb", "--", mapper, "a b")
    assert done.returncode == 0
    assert "LD_PRELOAD=" in done.stdout
    assert "of the pool" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{mapper} $'a\\040b'"


# -- what it does not reach, and says so --


def compile_to(program: Path, code: str, *flags: str) -> Path:
    subprocess.run(["cc", "-x", "c", "-", "-o", program, *flags], input=code, text=True, check=True)
    return program


GO_NOTE = r"""
__asm__(".pushsection .note.go.buildid,\"a\",@note\n.long 4, 4, 4\n.ascii \"Go\\0\\0abcd\"\n"
	".popsection");
int main(void) { return 3; }
"""


def test_what_cannot_be_reached_is_said_and_run_all_the_same(directory: Path) -> None:
    main = "int main(void) { return 3; }"
    static = compile_to(directory / "static", main, "-static")
    go = compile_to(directory / "go", GO_NOTE)
    (directory / "script").write_text(f"#!{static}\n")
    (directory / "script").chmod(0o755)
    for program, why in (
        (static, "statically linked"),
        (directory / "script", "statically linked"),
        (go, "Go program"),
    ):
        done = mshare("run", "--", program)
        assert done.returncode == 3
        assert why in done.stderr
        assert done.stderr.count("\n") == 1
    plain = compile_to(directory / "plain", main)
    assert reach.reach(str(plain)) == reach.Reach()
    assert mshare("run", "--", plain).stderr == ""


def test_what_gains_privileges_is_said(directory: Path) -> None:
    program = compile_to(directory / "set-user-id", "int main(void) { return 3; }")
    if os.geteuid() == 0:
        os.chown(program, 65534, 65534)
    program.chmod(0o6755)
    if os.geteuid() == 0:
        assert "gains privileges" in mshare("run", "--", program).stderr


def test_another_architecture_is_said(directory: Path) -> None:
    program = compile_to(directory / "other", "int main(void) { return 3; }")
    data = bytearray(program.read_bytes())
    data[18:20] = (8).to_bytes(2, "little")  # MIPS
    program.write_bytes(data)
    assert "another architecture" in reach.reach(str(program)).obstacle
    assert mshare("run", "--", program).returncode == 126


def test_files_that_are_no_programs_are_no_trouble(directory: Path) -> None:
    file = directory / "file"
    for content in (b"", b"#!", b"#!/nowhere", b"\x7fELF", b"\x7fELF" + bytes(200)):
        file.write_bytes(content)
        file.chmod(0o755)
        reach.reach(str(file))
    assert reach.reach("nosuch-program") == reach.Reach()


def test_a_sanitizer_comes_first(directory: Path) -> None:
    program = directory / "asan"
    code = "int main(void) { return 3; }"
    flags = ["-fsanitize=address"]
    command = ["cc", "-x", "c", "-", "-o", str(program), *flags]
    if subprocess.run(command, input=code, text=True, check=False).returncode:
        pytest.skip("this compiler has no address sanitizer")
    assert reach.reach(str(program)).sanitizer.startswith("libasan.so")
    done = mshare("run", "--", program, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    assert (done.returncode, done.stderr) == (3, "")


def test_a_library_that_others_cannot_read_is_said(directory: Path) -> None:
    library = directory / "closed/library.so"
    library.parent.mkdir(mode=0o700)
    library.write_text("")
    assert reach.closed_to_others(library) == library.parent
    library.parent.chmod(0o755)
    library.chmod(0o600)
    assert reach.closed_to_others(library) == library
    library.chmod(0o644)
    assert reach.closed_to_others(library) is None


DEEPBIND = """
#include <sys/mman.h>
char *make(unsigned long size)
{
	mmap(0, 4096 * 5, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return mmap(0, size, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}
"""


@pytest.mark.usefixtures("directory")
def test_what_passes_by_the_library_is_said_by_the_watcher(directory: Path) -> None:
    library = compile_to(directory / "deep.so", DEEPBIND, "-shared", "-fPIC", "-D_GNU_SOURCE")
    program = (
        "import ctypes, os, sys\n"
        f"lib = ctypes.CDLL({str(library)!r}, mode=os.RTLD_DEEPBIND | os.RTLD_NOW)\n"
        "lib.make.restype = ctypes.c_void_p\n"
        "at = [lib.make(ctypes.c_ulong(80 << 20)) for _ in range(2)]\n"
        "ctypes.memset(at[0], 1, 80 << 20), ctypes.memset(at[1], 1, 80 << 20)\n"
        "if os.fork() == 0: ctypes.memset(at[0], 1, 80 << 20)\n"
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [BIN / "mshare", "run", "--", sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stderr is not None
    line = process.stderr.readline()
    assert "RTLD_DEEPBIND" in line, line
    assert "shmem_enabled" in line
    process.stdin.close()
    assert process.wait(20) == 0
    # The watcher has the other end of this pipe: it ends with the program.
    process.stderr.read()
    process.stderr.close()


# -- PostgreSQL --


@pytest.fixture
def postgres(directory: Path) -> Iterator[Postgres]:
    server = Postgres(directory / "postgres")
    yield server
    server.remove()


def memory(server: Postgres) -> Object:
    """Its shared buffers, and who has how many tables for them."""
    found = survey.take(proc.with_children([server.pid]))
    return max(found.objects, key=lambda each: each.size)


def had_back(server: Postgres) -> bool:
    """All but what is too empty: a few chunks at the ends of what it has used so far."""
    buffers = memory(server)
    return buffers.reclaimable <= 6 * len(buffers.sharers) * TABLE


def tables(server: Postgres) -> int:
    found = [proc.status(pid) for pid in proc.with_children([server.pid])]
    return sum(status.tables for status in found if status)


class TestPostgres:
    pytestmark = collapses

    @pytest.mark.timeout(300)
    def test_connections_have_no_page_tables_and_a_crash_changes_nothing(
        self, postgres: Postgres
    ) -> None:
        settings = {"shared_buffers": "256MB"}
        postgres.start(settings, [str(BIN / "mshare"), "run", "--"])
        postgres.load(8)
        eventually(lambda: had_back(postgres), "its start", 60)
        with postgres.sessions(20):
            eventually(lambda: had_back(postgres), "the connections", 60)
            size = int(postgres.sql("SELECT pg_relation_size('pgbench_accounts')"))
            buffers = memory(postgres)
            assert buffers.congruent == len(buffers.sharers) >= 25
            # A quarter of what each would have for the one table that it has read.
            assert buffers.tables < 20 * (size // (2 * MiB)) * TABLE // 4
        # A backend is killed: the postmaster ends all, and makes its memory anew.
        before = memory(postgres).key
        postgres.pgbench("--client=4", "--transactions=200", "--no-vacuum")
        backend = int(postgres.sql("SELECT pg_backend_pid() FROM pg_sleep(0)"))
        with postgres.sessions(1) as (session,):
            session.begin("SELECT pg_backend_pid()")
            backend = int(session.answer()[-1])
            os.kill(backend, signal.SIGKILL)
            eventually(lambda: "all server processes terminated" in postgres.log(), "crash", 60)
        postgres.wait_until_ready()
        postgres.prewarm()
        assert memory(postgres).key != before
        eventually(lambda: had_back(postgres), "the new memory", 60)
        with postgres.sessions(20):
            eventually(lambda: had_back(postgres), "the connections after it", 60)
            buffers = memory(postgres)
            assert buffers.congruent == len(buffers.sharers)
            assert buffers.tables < 20 * (size // (2 * MiB)) * TABLE // 4
        postgres.check()
        # Immediately, which is another crash; then as it was.
        postgres.stop(signal.SIGQUIT)
        postgres.start(settings)
        postgres.check()
        assert memory(postgres).tables > 0
        postgres.stop()
        postgres.check_sums()

    @pytest.mark.timeout(300)
    def test_a_server_that_runs_gets_them_back_under_load(self, postgres: Postgres) -> None:
        settings = {"shared_buffers": "256MB"}
        postgres.start(settings, [str(BIN / "mshare"), "run", "--no-watch", "--"])
        postgres.load(8)
        with postgres.sessions(20):
            before = tables(postgres)
            load = subprocess.Popen(
                [*postgres.command("pgbench"), "--client=4", "--time=5", "--no-vacuum", "postgres"],
                stdout=subprocess.PIPE,
                text=True,
            )
            time.sleep(1)
            done = mshare("collapse", "--pid", postgres.pid)
            assert load.stdout is not None
            with load.stdout as output:
                assert "number of failed transactions: 0" in output.read()
            assert load.wait() == 0
            assert done.returncode in (0, 1), done.stderr  # 1: what is in use, in spite of all
            assert "sharers" in done.stdout, done.stdout
            mshare("collapse", "--pid", postgres.pid)
            buffers = memory(postgres)
            assert buffers.tables < (before - buffers.tables) // 4
        postgres.check()
        # The postmaster alone is killed: its children follow, and nothing of the memory stays.
        postgres.stop(signal.SIGKILL)
        postgres.start(settings)
        postgres.check()
        postgres.stop()
        postgres.check_sums()
