"""What has surprised users of shared memory in Python, and the test of what is right.

A test without a file is one of these here.

- Ctrl-C while a region is made:
  test_after_ctrl_c_the_next_start_is_as_the_first
  test_interrupted.py::test_a_handlers_error_ends_every_call
  test_identity.py::test_an_alarm_at_any_moment_leaves_all_or_nothing
- a worker has the last job's region:
  test_identity.py::test_a_worker_computes_on_the_region_that_it_was_sent
- a name is another region's by now:
  test_identity.py::test_by_its_name_one_gets_what_has_it_now
  test_identity.py::test_what_is_stale_says_so
- unlink() beside workers:
  test_the_name_goes_while_workers_go_on
- what is dropped stays attached:
  test_identity.py::test_what_is_dropped_is_given_back
  test_identity.py::test_a_worker_keeps_nothing_of_what_it_is_done_with
- a page that does not come stops all threads:
  test_places.py::test_populating_ends_in_time_and_lets_others_go_on
- an expression over all of buf:
  test_places.py::test_a_region_is_a_buffer
- no memory is SIGBUS:
  test_places.py::test_memory_is_there_after_populating
- refusals without a reason:
  test_places.py::test_reasons
  test_names_and_numbers_are_what_they_say
- addresses by hand:
  test_places.py::test_no_two_regions_meet
  test_places.py::test_what_this_process_has_is_in_nobodys_way
  test_conditions.py::test_under_address_sanitizer_its_gap_is_left_alone
  test_conditions.py::test_under_valgrind_memory_calls_and_forks_work
- a limit of address space:
  test_a_small_region_fits_into_a_small_address_space
- what is large is slow to make:
  test_what_is_large_is_made_without_looking_at_it
- the plain functions beside Region:
  test_identity.py::test_the_plain_functions_take_nothing_from_a_region
- close() in one thread, buf in another:
  test_identity.py::test_close_beside_buf
- the error in a with block:
  test_identity.py::test_the_real_error_leaves_the_block
- arrays are copied:
  test_identity.py::test_arrays_travel_by_reference
  test_travel.py::test_joblib_has_by_reference_what_is_said_to_be
  test_travel.py::test_tensors_travel_by_reference
- readonly=True that writes:
  test_identity.py::test_readonly_is_what_was_asked_for
- empty=True gives memory away:
  test_places.py::test_empty_is_empty
- fork without a daemon:
  test_a_child_that_has_nothing_is_told
- calls that cannot be interrupted:
  test_interrupted.py::test_the_wait_for_the_next_daemon_is_interruptible
  test_interrupted.py::test_a_thread_that_waits_holds_up_no_fork
  test_waiting.py::test_calls_on_other_regions_go_on
- an address that nobody keeps:
  test_identity.py::test_a_pin_keeps_addresses_good
- a region is no buffer:
  test_places.py::test_a_region_is_a_buffer
  test_python_pages.py::test_every_snippet_of_the_python_page_runs
- shapes, orders, types of arrays:
  test_places.py::test_arrays_are_as_numpy_has_them
- arguments that are ignored:
  test_places.py::test_arguments_are_refused_and_not_ignored
- two users of the library in one process:
  test_an_interpreter_in_the_same_process_is_a_user_of_its_own
- types of nothing:
  test_types.py::test_the_interface_is_checked
  test_types.py::test_types_are_there_at_run_time
- no word on pools, fork, locks:
  test_python_pages.py::test_every_snippet_of_the_python_page_runs
- a client that needs FUSE:
  test_import.py::test_a_client_needs_nothing_and_the_daemon_says_what
- names that are bytes or paths:
  test_names_and_numbers_are_what_they_say
- locks and allocators of one's own:
  test_heap.py::test_killed_processes_leave_a_whole_heap
  test_heap.py::test_who_comes_after_the_dead_is_told
- a daemon stopped for good:
  test_stale.py::test_every_call_says_so_at_once
- killed while it makes a region:
  test_making.py::test_killed_at_any_system_call_it_leaves_nothing_without_memory
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from conftest import TESTS, Daemon, eventually
from inside import one_daemon_fixture as _one_daemon_fixture  # noqa: F401 - of every test here
from inside import root_fixture as _root_fixture  # noqa: F401 - the same

import libmshare
from libmshare import MshareError, Region


def test_the_table_names_tests() -> None:
    assert __doc__ is not None
    named = [word for word in __doc__.split() if word.startswith("test_") and len(word) > 5]
    assert len(named) > 40
    for each in named:
        file, _, test = each.rpartition("::")
        (path,) = TESTS.rglob(file or os.path.basename(__file__))
        assert f"def {test}(" in path.read_text(), each


def run(program: str, **popen: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def test_after_ctrl_c_the_next_start_is_as_the_first(daemon: Daemon) -> None:
    """Whatever it was doing: the next one attaches, or makes, a whole region."""
    program = """
    from libmshare import Region
    print("start", flush=True)
    while True:
        with Region.create("job", "512G", exist_ok=True) as region:
            region.buf[-1] = 1
            print("made", flush=True)
            region.unlink()
    """
    for delay in (0.0, 0.003, 0.02):
        with run(program) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert errors.splitlines()[-1] == "KeyboardInterrupt"
        with Region.create("job", "512G", exist_ok=True) as region:
            assert region.buf[0] == 0
            region.unlink()
        assert "job" not in os.listdir(daemon.mount)


def mean(region: Region) -> float:
    return float(region.ndarray(1000).mean())


def test_the_name_goes_while_workers_go_on(daemon: Daemon) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        for job in (1, 2):
            with Region.create("job", "1M") as region:
                region.ndarray(1000)[:] += job
                assert pool.submit(mean, region).result() == job
                region.unlink()
                assert "job" not in os.listdir(daemon.mount)
                assert pool.submit(mean, region).result() == job
    eventually(lambda: daemon.shm_objects() == [], "nothing of either job is left")


def test_names_and_numbers_are_what_they_say() -> None:
    for name in (b"x", pathlib.Path("x"), 5):
        for call in (Region.attach, lambda each: Region.create(each, 4096), libmshare.mshare_stat):
            with pytest.raises(TypeError, match="a name or a path is a str, not"):
                call(name)  # type: ignore[arg-type]
    for odd, code, why in (
        ("/x", errno.EINVAL, "no slash"),
        ("", errno.ENOENT, "not empty"),
        (".x", errno.EPERM, "reserved by msharefs"),
        ("mshare_info", errno.EPERM, "reserved by msharefs"),
        ("x" * 256, errno.ENAMETOOLONG, "at most 255 bytes"),
    ):
        for call in (Region.attach, lambda each: Region.create(each, 4096)):
            with pytest.raises(MshareError, match=why) as caught:
                call(odd)
            assert caught.value.errno == code
    # C would take the lower bits of each.
    nonsense: list[dict[str, Any]] = [
        {"start": 1 << 64},
        {"start": (1 << 64) + (2 << 40)},
        {"start": -1},
        {"start": 0},
        {"size": 1 << 64},
        {"size": (1 << 64) + 4096},
        {"mode": 1 << 32},
        {"mode": -1},
    ]
    for bad in nonsense:
        with pytest.raises(ValueError, match=r"start|size|mode"):
            Region.create("q", **({"size": "2M"} | bad))
    with pytest.raises(TypeError):
        Region.create("q", "2M", start=2.0**42)  # type: ignore[arg-type]
    with pytest.raises(MemoryError, match="no range of so many addresses"):
        Region.create("q", "64T")
    with pytest.raises(MshareError, match="shm"):
        Region.create("q", "2M", backing="foo")


def test_a_small_region_fits_into_a_small_address_space() -> None:
    """As batch systems limit it."""
    program = """
    from libmshare import Region
    with Region.create("small", "64M") as region:
        region.buf[-1] = 5
        with Region.attach("small") as same:
            assert same.buf[-1] == 5
        region.unlink()
    """
    limit = 2 << 30

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with run(program, preexec_fn=limited) as process:
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_what_is_large_is_made_without_looking_at_it() -> None:
    def read() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = read()
    with Region.create(size="8T", ephemeral=True) as region:
        region.buf[0] = region.buf[-1] = 1
    # A page table of it would be 16 GiB in /proc.
    assert read() - before < 1 << 20


def test_a_child_that_has_nothing_is_told(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what it was born with and cannot touch, no call leads it."""
    monkeypatch.setenv("MSHARE_RECONNECT_SECONDS", "0")
    program = """
    import os, sys
    from libmshare import Region, Stale
    region = Region.create("born", "1M")
    region.buf[0] = 1
    print("ready", flush=True)
    sys.stdin.readline()
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), region.buf[0])
    else:
        for call in (lambda: region.buf, lambda: region.ndarray(1), lambda: region[0]):
            try:
                call()
            except Stale as error:
                assert "after fork" in str(error)
            else:
                os._exit(1)
        os._exit(0)
    sys.stdin.readline()
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), region.buf[0])
    else:
        os._exit(region.buf[0])
    region.unlink()
    region.close()
    """
    with run(program, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        daemon.kill()
        daemon.expected.append("taking down the mount")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "0 1\n"
        daemon.start()
        said, errors = process.communicate("\n", timeout=60)
    assert (said, errors) == ("1 1\n", "")


def test_an_interpreter_in_the_same_process_is_a_user_of_its_own(daemon: Daemon) -> None:
    """It may attach what another one has, and end with it attached."""
    program = """
    import sys
    from libmshare import Region
    if sys.version_info >= (3, 13):
        import _interpreters
        made, run = _interpreters.create("legacy"), _interpreters.exec
    else:
        import _xxsubinterpreters as _interpreters
        made, run = _interpreters.create(isolated=False), _interpreters.run_string
    with Region.create("both", "1M") as region:
        region.buf[0] = 7
        assert not run(made, '''if True:
            from libmshare import Region
            region = Region.attach("both")
            assert region.buf[0] == 7
            region.buf[1] = 8
        ''')
        _interpreters.destroy(made)
        assert region.buf[1] == 8
        with Region.attach("both") as again:
            assert again == region
        region.unlink()
    """
    with run(program) as process:
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
