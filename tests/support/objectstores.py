"""Object stores for the tests: real S3 servers, on the loopback device, and one that is bad.

SeaweedFS and rclone come as packages of programs (requirements/dev.txt, by hash).  They run as
nobody, in a directory of their own, and tell nobody anything.  (Ceph: ceph.py.)
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import temporary

NOBODY = 65534
KEY, SECRET = "MSHARETESTKEY", "secret-that-must-be-seen-nowhere"
READER, READER_SECRET = "MSHARETESTREADER", "another-that-must-be-seen-nowhere"
READY_SECONDS = 60.0
STORE = os.environ.get("MSHARE_TEST_STORE", "seaweedfs")
"""What the tests have for S3: they are one corpus for all."""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class S3:
    """A server that speaks S3."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def source(self, key: str = KEY, secret: str = SECRET) -> str:
        """A sources.toml for it."""
        return (
            "[[source]]\n"
            'prefix = "s3://"\n'
            f'endpoint = "{self.endpoint}"\n'
            'region = "us-east-1"\n'
            f'access_key_id = "{key}"\n'
            f'secret_access_key = "{secret}"\n'
        )

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)


def program(name: str) -> str:
    """Of requirements/dev.txt."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} is in requirements/dev.txt"
    return found


@contextlib.contextmanager
def as_nobody(
    words: list[str],
    directory: Path,
    log: Path,
    executable: str,
    descriptors: list[int],
    environment: dict[str, str],
) -> Iterator[subprocess.Popen[bytes]]:
    """A program in `directory`, which has descriptors of ours, until the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            words,
            executable=executable,
            pass_fds=descriptors,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.defpath, "HOME": str(directory), "TMPDIR": str(directory)}
            | environment,
            start_new_session=True,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            preexec_fn=_end_with_us,  # noqa: PLW1509 - one system call
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> S3:
    """The server, as soon as it answers."""
    deadline = time.monotonic() + READY_SECONDS
    while not _answers(port):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return S3(process, port)


@contextlib.contextmanager
def _running(name: str, arguments: list[str], directory: Path, port: int) -> Iterator[S3]:
    """A server in `directory`, until it answers, and then until the end."""
    log = directory / "log"
    with contextlib.ExitStack() as held:
        # By descriptor: nobody may not be able to enter where it lies.
        fd = os.open(program(name), os.O_RDONLY)
        held.callback(os.close, fd)
        process = held.enter_context(
            as_nobody([name, *arguments], directory, log, f"/proc/self/fd/{fd}", [fd], {})
        )
        yield wait_for(process, port, log)


_libc = ctypes.CDLL(None)


def _end_with_us() -> None:
    """In the child: a test run that is killed leaves no server."""
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


@contextlib.contextmanager
def seaweedfs() -> Iterator[S3]:
    """SeaweedFS, with one who may do everything and one who may only read."""
    with temporary() as directory:
        os.chown(directory, NOBODY, NOBODY)
        ports = free_ports(8)
        identities = [
            (KEY, SECRET, ["Admin", "Read", "Write", "List", "Tagging"]),
            (READER, READER_SECRET, ["Read", "List"]),
        ]
        config = directory / "s3.json"
        config.write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": key,
                            "credentials": [{"accessKey": key, "secretKey": secret}],
                            "actions": actions,
                        }
                        for key, secret, actions in identities
                    ]
                }
            )
        )
        names = "master.port master.port.grpc volume.port volume.port.grpc filer.port"
        names += " filer.port.grpc s3.port s3.port.grpc"
        arguments = [
            "server",
            f"-dir={directory}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer",
            "-s3",
            f"-s3.config={config}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=50",
            *(f"-{name}={port}" for name, port in zip(names.split(), ports, strict=True)),
        ]
        try:
            with _running("weed", arguments, directory, ports[6]) as server:
                yield server
        finally:
            # It makes sockets in /tmp, whatever TMPDIR says, and leaves them.
            for port in ports:
                for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    path.unlink()


@contextlib.contextmanager
def rclone() -> Iterator[S3]:
    """`rclone serve s3`, which ignores If-Match, and answers a range as if it were all."""
    with temporary() as directory:
        os.chown(directory, NOBODY, NOBODY)
        (port,) = free_ports(1)
        data = directory / "data"
        (data / "images").mkdir(parents=True)
        for path in (data, data / "images"):
            os.chown(path, NOBODY, NOBODY)
        arguments = [
            "serve", "s3", str(data), "--addr", f"127.0.0.1:{port}",
            "--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off",
        ]  # fmt: skip
        with _running("rclone", arguments, directory, port) as server:
            yield server


class Bad(ThreadingHTTPServer):
    """A server of files that does what `misdeed` says to a request."""

    daemon_threads = True

    def __init__(self, directory: Path, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _BadHandler)
        self.directory = directory
        self.misdeed: Callable[[_BadHandler, str], bool] = lambda _handler, _path: False
        """Given the request and the path; whether it has answered."""
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is none of our affair."""


class _BadHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bad

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name
        pass

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.server.misdeed(self, self.path):
            return
        file = self.server.directory / self.path.lstrip("/")
        if not file.is_file():
            self.answer(404, b"")
            return
        self.answer(200, file.read_bytes())

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, code: int, body: bytes, *, length: int | None = None, tag: str = "") -> None:
        """`length`: what is said of it."""
        first, last, whole = 0, len(body), len(body)
        wanted = self.headers.get("Range")
        if code == 200 and wanted:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first, last, code = int(low), min(int(high) + 1, whole), 206
        self.send_response(code)
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{whole}")
        self.send_header("Content-Length", str(last - first if length is None else length))
        self.send_header("ETag", tag or f'"{hash(body):x}"')
        self.send_header("Last-Modified", "Mon, 02 Nov 2026 10:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[first:last])
        if length is not None:
            self.close_connection = True


@contextlib.contextmanager
def bad_server(directory: Path) -> Iterator[Bad]:
    with Bad(directory) as server, serving(server):
        yield server


@contextlib.contextmanager
def serving(server: Bad) -> Iterator[None]:
    """It answers, wherever it listens."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session", name="s3")
def s3_fixture() -> Iterator[S3]:
    """SeaweedFS or Ceph (`make test-ceph`), once for all tests."""
    if STORE == "ceph":
        from ceph import ceph as store  # which imports us
    else:
        store = {"seaweedfs": seaweedfs}[STORE]
    with store() as server:
        yield server


@pytest.fixture(name="sources")
def sources_fixture(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a sources.toml for this process and those that it starts."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(directory / "config"))

    def write(content: str) -> Path:
        file = directory / "config" / "msharefs" / "sources.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)
        file.write_text(content)
        return file

    return write
