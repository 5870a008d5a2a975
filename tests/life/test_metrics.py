"""Metrics by HTTP: what Prometheus gets, and what who means harm does not."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command, donate
from conftest import ALIGNMENT, Client, Daemon, alive, clients, command_line, eventually

from msharefsd.config import Config, ConfigError, Listen
from msharefsd.front import exporter

MONITORING = Path(__file__).resolve().parents[2] / "examples/monitoring"
TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def served(make_daemon: Callable[..., Daemon], port: int) -> Daemon:
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--metrics-listen={port}").start()
    eventually(lambda: answers(port), "the first answer")
    return daemon


def get(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(port)[0] == 200
    return False


def exporter_of(daemon: Daemon) -> int | None:
    found = [pid for pid in daemon.processes() if command_line(pid).startswith(exporter_name())]
    return found[0] if found else None


def exporter_name() -> bytes:
    return b"msharefsd: metrics"


def sockets(pid: int) -> set[str]:
    links = (os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir())
    return {link for link in links if link.startswith("socket:")}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("9469", Listen("127.0.0.1", 9469)),
        ("127.0.0.2:1", Listen("127.0.0.2", 1)),
        ("[::1]:65535", Listen("::1", 65535)),
        ("/run/x.socket", Listen(path="/run/x.socket")),
        ("unix:/run/x.socket", Listen(path="/run/x.socket")),
        ("", None),
    ],
)
def test_where(text: str, where: Listen | None) -> None:
    assert Config(metrics_listen=text).metrics_address == where


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "65536",
        "x",
        "0.0.0.0:9469",
        "[::]:9469",
        "10.0.0.1:9469",
        "localhost:9469",
        "x.socket",
        "/" + 107 * "x",
        "127.0.0.1:",
        "127.0.0.1:-1",
    ],
)
def test_nowhere_else(text: str) -> None:
    with pytest.raises(ConfigError, match="metrics_listen"):
        _ = Config(metrics_listen=text).metrics_address


def test_what_is_served(served: Daemon, port: int) -> None:
    status, kind, text = get(port)
    assert (status, kind) == (200, TYPE)
    assert text.endswith("# EOF\n")
    ours = (served.mount / ".metrics").read_text()
    families = re.compile(r"^# TYPE .*$", re.MULTILINE)
    assert families.findall(text) == families.findall(ours)
    assert get(port, "/metrics?name[]=x")[0] == 200
    assert get(port, "/")[0] == 404
    assert get(port, method="POST")[0] == 405
    for nonsense in (b"x\r\n\r\n", b"GET /metrics SPDY/1\r\n\r\n", b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), 30) as sock:
            sock.sendall(nonsense)
            assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
    # By a process that has no rights, and no connection of the mount's.
    pid = exporter_of(served)
    assert pid is not None
    status_text = Path(f"/proc/{pid}/status").read_text()
    assert re.search(r"^CapEff:\s*0+$", status_text, re.MULTILINE)
    held = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    assert "/dev/fuse" not in held


def test_who_hangs_keeps_nobody_waiting(served: Daemon, port: int) -> None:
    mshare = Command(served.mount)
    with contextlib.ExitStack() as stack:
        for number in range(3 * exporter.MOST_CONNECTIONS):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
            sock.sendall((b"", b"GET /metrics HTTP/1.1\r\n", b"GET /met")[number % 3])
        assert get(port)[0] == 200
        assert mshare.json("ls") == []
        pid = exporter_of(served)
        assert pid is not None
        theirs = sockets(pid)
        assert len(theirs) <= exporter.MOST_CONNECTIONS + 10
        assert not theirs & sockets(served.pid)  # of none of these the front knows
        # Who asks for more than a request is long is hung up on.
        with (
            socket.create_connection(("127.0.0.1", port), 30) as sock,
            contextlib.suppress(ConnectionError),
        ):
            sock.sendall(b"GET /" + bytes(2 * exporter.MOST_REQUEST))
            assert sock.recv(100)[:12] in (b"HTTP/1.1 400", b"")
    assert get(port)[0] == 200


def test_a_front_that_hangs_is_no_service(served: Daemon, port: int) -> None:
    time.sleep(exporter.FRESH_SECONDS)
    os.kill(served.pid, signal.SIGSTOP)
    try:
        with socket.create_connection(("127.0.0.1", port), 30) as sock:
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert sock.recv(100) == b""
    finally:
        os.kill(served.pid, signal.SIGCONT)
    eventually(lambda: answers(port), "an answer again")


def test_it_is_started_again_and_ends_with_the_front(served: Daemon, port: int) -> None:
    served.expected.append("the process that serves metrics, [0-9]+, has ended")
    pid = exporter_of(served)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: exporter_of(served) not in (None, pid), "another one")
    eventually(lambda: answers(port), "its answer")
    last = exporter_of(served)
    assert last is not None
    served.kill()
    eventually(lambda: not alive(last), "its end")


def test_an_address_that_is_taken(make_daemon: Callable[..., Daemon], port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--metrics-listen={port}").start()
        daemon.expected.append("cannot serve metrics")
        eventually(lambda: "cannot serve metrics on http://127.0.0.1" in daemon.log(), "a line")
    eventually(lambda: answers(port), "an answer, as soon as it is free")


def test_a_socket_in_the_file_system(make_daemon: Callable[..., Daemon], directory: Path) -> None:
    path = directory / "metrics.socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    daemon = make_daemon(f"--alignment={ALIGNMENT}", f"--metrics-listen={path}").start()

    def ask() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(path))
            sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def is_there() -> bool:
        with contextlib.suppress(OSError):  # the one that was left is removed first
            return ask().startswith(b"HTTP/1.1 200 ")
        return False

    eventually(is_there, "an answer")
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"msharefs_regions 0" in ask()
    daemon.stop()
    assert not path.exists()


def test_regions_are_bounded(served: Daemon, port: int) -> None:
    """Names without memory have no figures; and the text is what Prometheus takes."""
    (served.mount / 'x"\\n{}').touch()
    text = get(port)[2]
    assert 'region="x' not in text
    done = subprocess.run(
        ["promtool", "check", "metrics"], check=False, input=text, capture_output=True, text=True
    )
    assert "error while linting" not in done.stderr + done.stdout


# -- a real Prometheus --


@contextlib.contextmanager
def prometheus(directory: Path, target: int) -> Iterator[str]:
    """One that scrapes and evaluates once a second, with our rules."""
    config = (MONITORING / "prometheus.yml").read_text()
    config = config.replace("15s", "1s").replace("9469", str(target))
    (directory / "prometheus.yml").write_text(config)
    (directory / "alerts.yml").write_text((MONITORING / "alerts.yml").read_text())
    port = free_port()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
            cwd=directory,
        )
    try:
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            assert process.poll() is None, (directory / "log").read_text()
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{url}/-/ready", timeout=30) as response,
            ):
                return bool(response.status == 200)
            return False

        eventually(is_ready, "Prometheus")
        yield url
    finally:
        process.kill()
        process.wait()


def ask(url: str, path: str, **query: str) -> Any:
    try:
        with urllib.request.urlopen(
            f"{url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30
        ) as response:
            told = json.load(response)
    except urllib.error.HTTPError as error:
        pytest.fail(f"{query}: {error.read().decode()}")
    assert told["status"] == "success", told
    return told["data"]


def test_prometheus_takes_rules_and_the_dashboards_queries(
    served: Daemon,
    port: int,
    client_program: Path,
    tmp_path: Path,
) -> None:
    for words in (("rules", MONITORING / "alerts.yml"), ("config", MONITORING / "prometheus.yml")):
        subprocess.run(["promtool", "check", *words], check=True, capture_output=True)
    with clients(client_program, served) as spawn, prometheus(tmp_path, port) as url:
        _donor: Client = donate(spawn, "numbers")
        series = 'msharefs_region_memory_bytes{region="numbers",uid="0"}'

        def value() -> float:
            found = ask(url, "query", query=series)["result"]
            return float(found[0]["value"][1]) if found else 0.0

        eventually(lambda: value() == ALIGNMENT, "the region's memory")
        assert served.metric(series.removeprefix("msharefs_")) == ALIGNMENT

        def rules() -> list[Any]:
            (group,) = ask(url, "rules")["groups"]
            return list(group["rules"])

        eventually(lambda: all(rule["health"] == "ok" for rule in rules()), "every rule")
        assert {rule["name"] for rule in rules() if rule["state"] == "firing"} <= {"MsharefsDown"}
        queries = [
            target["expr"]
            for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]
            for target in panel["targets"]
        ]
        assert len(queries) > 15
        metrics = set(ask(url, "label/__name__/values"))
        for query in queries:
            plain = query.replace("$job", ".*").replace("$__rate_interval", "1m")
            named = set(re.findall(r"msharefs_\w+", query))
            assert named <= metrics | UNTIL_IT_HAPPENS, query
            if named & UNTIL_IT_HAPPENS:
                ask(url, "query", query=plain)
            else:  # (A rate takes two looks.)
                eventually(lambda text=plain: bool(ask(url, "query", query=text)["result"]), plain)  # type: ignore[misc]
        for rule in rules():
            named = set(re.findall(r"msharefs_\w+", rule["query"]))
            assert named <= metrics | UNTIL_IT_HAPPENS


UNTIL_IT_HAPPENS = {
    "msharefs_sigbus_total",
    "msharefs_refused_total",
    "msharefs_limited_total",
    "msharefs_collapse_calls_total",
    "msharefs_faults_total",
}
"""What has labels has no series before."""


def test_the_textfile_recipe(daemon: Daemon, tmp_path: Path) -> None:
    subprocess.run([MONITORING / "textfile", daemon.mount, tmp_path], check=True)
    (made,) = tmp_path.iterdir()
    assert made.name == "msharefs.prom"
    assert "msharefs_regions 0" in made.read_text()
    assert made.stat().st_mode & 0o777 == 0o644
    done = subprocess.run(
        ["promtool", "check", "metrics"], check=False, input=made.read_bytes(), capture_output=True
    )
    assert b"error while linting" not in done.stderr, done.stderr
    gone = subprocess.run(
        [MONITORING / "textfile", tmp_path / "none", tmp_path], check=False, capture_output=True
    )
    assert gone.returncode != 0
    assert {path.name for path in tmp_path.iterdir()} == {"msharefs.prom"}
