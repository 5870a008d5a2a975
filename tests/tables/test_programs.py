"""Real programs that nobody changed: what they share costs no page tables, and they work."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commanding import mshare
from conftest import BIN, TESTS, eventually

sys.path.append(str(TESTS.parent))

from benchmarks.fastcgi import request
from msharefsd.linux import features
from msharetables import proc, survey
from msharetables.objects import COLLAPSIBLE

MiB = 1 << 20
WORKERS = 8
RUN = [str(BIN / "mshare"), "run", "--min-size=16M", "--"]

pytestmark = [
    pytest.mark.shm_only,
    pytest.mark.skipif(os.geteuid() != 0, reason="takes root"),
    pytest.mark.skipif(
        not features.probe().collapse, reason="this kernel has no MADV_COLLAPSE of shared memory"
    ),
]


@contextlib.contextmanager
def running(*command: object, **popen: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(  # type: ignore[call-overload] # popen is the test's
        list(map(str, command)), start_new_session=True, text=True, cwd="/", **popen
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def tables(pid: int) -> tuple[int, int]:
    """Of large shared memory: its page tables, and what of it can be had back (bytes)."""
    found = survey.take(proc.with_children([pid]))
    large = [o for o in found.objects if o.size >= 16 * MiB and o.name.kind in COLLAPSIBLE]
    return sum(each.tables for each in large), sum(each.reclaimable for each in large)


def program(*names: str) -> str:
    for directory in (*os.environ["PATH"].split(":"), "/usr/sbin"):
        for name in names:
            for found in sorted(Path(directory).glob(name)):
                return str(found)
    pytest.fail(f"{names[0]} is not installed: scripts/system-packages does that")


SCRIPT = """<?php
if ($_GET['do'] == 'fill') {
    for ($i = 0; $i < 40; $i++) apcu_store("k$i", str_repeat(chr(65 + $i % 26), 1 << 20));
}
$sum = 0;
for ($i = 0; $i < 40; $i++) {
    $value = apcu_fetch("k$i");
    $sum += strlen($value) + ord($value[1 << 19]);
}
usleep(50000);
echo getmypid(), ' ', $sum;
"""
CONFIGURATION = """
[global]
error_log = {directory}/log
[pool]
listen = {directory}/socket
user = nobody
group = nogroup
pm = static
pm.max_children = {workers}
"""


def test_php_fpm_with_apcu(directory: Path) -> None:
    """Its extension is loaded past every preload library: so it is told from outside."""
    (directory / "script.php").write_text(SCRIPT)
    text = CONFIGURATION.format(directory=directory, workers=WORKERS)
    (directory / "fpm.conf").write_text(text)
    command = [
        *(program("php-fpm*"), "--nodaemonize", "--allow-to-run-as-root"),
        *("--fpm-config", str(directory / "fpm.conf")),
        *("-d", "apc.enabled=1", "-d", "apc.shm_size=64M", "-d", "memory_limit=512M"),
    ]
    with running(*command) as server:
        eventually((directory / "socket").exists, "its socket")
        answers = [request(directory / "socket", directory / "script.php", "do=fill")]
        pids: set[str] = set()
        while len(pids) < WORKERS:
            answers.append(request(directory / "socket", directory / "script.php", "do=read"))
            pids.add(answers[-1].split()[0])
        assert len({answer.split()[1] for answer in answers}) == 1, answers
        before, reclaimable = tables(server.pid)
        done = mshare("collapse", "--pid", server.pid, "--min-size=16M", "--budget=100%")
        assert done.returncode in (0, 1), done.stderr
        after, _ = tables(server.pid)
        if reclaimable > before // 2:  # it lies where huge pages fit
            assert after < before // 4
        again = request(directory / "socket", directory / "script.php", "do=read")
        assert again.split()[1] == answers[0].split()[1]


MULTIPROCESSING = f"""
import multiprocessing, sys
from multiprocessing import shared_memory

def work(name, ready, go):
    memory = shared_memory.SharedMemory(name=name, track=False) if sys.version_info >= (3, 13) \
        else shared_memory.SharedMemory(name=name)
    total = sum(memory.buf[at] for at in range(0, memory.size, 4096))
    ready.put(total)
    go.wait()
    memory.close()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    memory = shared_memory.SharedMemory(create=True, size=64 << 20)
    memory.buf[:] = b"\\1" * memory.size
    ready, go = context.Queue(), context.Event()
    arguments = memory.name, ready, go
    workers = [context.Process(target=work, args=arguments) for _ in range({WORKERS})]
    for each in workers: each.start()
    print([ready.get() for _ in workers], flush=True)
    sys.stdin.readline()
    go.set()
    for each in workers: each.join()
    memory.close(), memory.unlink()
    print("done", flush=True)
"""


def test_multiprocessing_with_shared_memory() -> None:
    command = [*RUN, sys.executable, "-c", MULTIPROCESSING]
    with running(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == f"{[64 * MiB // 4096] * WORKERS}\n"
        eventually(lambda: tables(process.pid)[1] == 0, "its tables", 60)
        # Each had 32 tables for it.
        assert tables(process.pid)[0] < (WORKERS + 1) * 32 * 4096 // 4
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        assert process.wait(20) == 0


def test_redis_saves_and_ends_as_ever(directory: Path) -> None:
    path = directory / "socket"
    command = [
        *(program("redis-server"), "--port", 0, "--unixsocket", path, "--dir", directory),
        *("--save", "", "--daemonize", "no"),
    ]
    with running(*RUN, *command, stdout=subprocess.DEVNULL) as server:
        eventually(path.exists, "its socket")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.settimeout(20)
            with connection.makefile("rwb", buffering=0) as stream:

                def ask(*words: str) -> bytes:
                    stream.write(f"*{len(words)}\r\n".encode())
                    for word in words:
                        stream.write(f"${len(word)}\r\n{word}\r\n".encode())
                    return bytes(stream.readline())

                assert ask("SET", "key", "x" * 100_000) == b"+OK\r\n"
                assert b"started" in ask("BGSAVE")
                eventually((directory / "dump.rdb").exists, "its file")
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


NGINX = """
daemon off;
pid {directory}/pid;
error_log {directory}/log;
worker_processes 2;
events {{}}
http {{
    access_log off;
    limit_req_zone $binary_remote_addr zone=a:32m rate=1000r/s;
    server {{
        listen unix:{directory}/socket;
        location / {{ limit_req zone=a burst=1000; return 200 "fine"; }}
    }}
}}
"""


def test_nginx_reloads_as_ever(directory: Path) -> None:
    (directory / "nginx.conf").write_text(NGINX.format(directory=directory))
    command = [program("nginx"), "-c", directory / "nginx.conf", "-e", directory / "log"]
    with running(*RUN, *command) as server:
        eventually((directory / "socket").exists, "its socket")
        assert _get(directory / "socket").endswith(b"fine")
        before = set(proc.with_children([server.pid]))
        server.send_signal(signal.SIGHUP)
        eventually(lambda: len(set(proc.with_children([server.pid])) - before) >= 2, "new workers")
        assert _get(directory / "socket").endswith(b"fine")
        found = survey.take(proc.with_children([server.pid]))
        zones = [each for each in found.objects if each.size == 32 * MiB]
        assert zones
        assert all(each.congruent == len(each.sharers) for each in zones)
        server.send_signal(signal.SIGQUIT)
        assert server.wait(20) == 0


def _get(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        said = b""
        while part := connection.recv(4096):
            said += part
    return said
