"""A region whose daemon was stopped for good: everything says so at once, and nothing waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from conftest import Daemon

pytestmark = pytest.mark.shm_only

PROGRAM = """
import os, pickle, sys
from libmshare import Region, Stale

region = Region.create("r", "8M")
region.buf[0] = 1
reader = Region.attach("r", readonly=True)
sent, identity, view = pickle.dumps(region), region.identity, region.buf

def in_child(touch):
    child = os.fork()
    if child == 0:
        touch()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

print("ready", flush=True)
sys.stdin.readline()
calls = {
    "munmap": lambda: region.munmap(4096, 4096),
    "mmap": lambda: region.mmap(4096, 4096),
    "protect": lambda: region.protect(0, 4096, 1),
    "flush": region.flush,
    "populate": region.populate,
    "populate what was there": lambda: region.populate(0, 4096),
    "populate to read": reader.populate,
    "attach": lambda: Region.attach(identity),
    "attach to read": lambda: Region.attach(identity, readonly=True),
    "unpickle": lambda: pickle.loads(sent),
    "unlink": region.unlink,
}
for name, call in calls.items():
    try:
        call()
    except Stale as error:
        print(name, error.errno, error.strerror, flush=True)
print(in_child(lambda: view[0]), in_child(lambda: view[4 << 20]), flush=True)
del view
reader.close()
region.close()
"""


@pytest.mark.parametrize("next_one", [False, True])
def test_every_call_says_so_at_once(daemon: Daemon, next_one: bool) -> None:
    """No daemon is waited for, whether another one has come or not."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"MSHARE_ROOT": str(daemon.mount), "MSHARE_RECONNECT_SECONDS": "3600"},
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            daemon.halt()
            done = daemon.purge("--force")
            assert done.returncode == 0, done.stderr
            if next_one:
                daemon.start()
            said, _ = process.communicate("\n", timeout=60)
        finally:
            process.kill()
    *calls, children = said.splitlines()
    assert [line.split(" 116 ")[0] for line in calls] == [
        "munmap",
        "mmap",
        "protect",
        "flush",
        "populate",
        "populate what was there",
        "populate to read",
        "attach",
        "attach to read",
        "unpickle",
        "unlink",
    ]
    assert all("removed" in line for line in calls)
    # Nothing is there in a child, as after any fork without a daemon.
    assert children == f"{-signal.SIGSEGV} {-signal.SIGSEGV}"
    if not next_one:
        daemon.start()
